"""What a fitted function depends on: relevance of inputs, and the parts of an additive kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from torch import Tensor

from fspace.errors import NotFittedError, NumericalError, OptionError
from fspace.gaussians import Coregionalised, Gaussian
from fspace.inference.gp import GPPosterior
from fspace.inference.numerics import solve_lower
from fspace.kernels.deep import SplitKernel, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal
from fspace.posterior import FunctionPosterior, MixturePosterior

METHODS = ("slope", "ard", "permutation", "shapley")
BACKGROUND, EXPLAINED = 50, 200  # rows behind Shapley values


def relevance(model: Any, X: Any, y: Any = None, method: str = "slope", seed: int = 0) -> dict[str, float]:
    """How much each input column matters to a fitted estimator, by name; every method's shares sum to one.

    method: "slope" (root mean square slope of the mean times the column's spread; known from the fit), "ard" (inverse
    lengthscales of a plain kernel), "permutation" (what the score on X, y loses when a column is shuffled;
    scikit-learn's), "shapley" (mean absolute Shapley value of the mean, or of the probability of the likeliest class;
    needs the package shap). Raises OptionError for a method that the model or the arguments do not allow.
    NumericalError where it is NaN.
    Sources: MacKay (1995); Breiman (2001); Lundberg and Lee (2017).
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r} does not exist; choose one of {', '.join(METHODS)}.")
    if not hasattr(model, "posterior_"):
        raise NotFittedError(f"This {type(model).__name__} instance is not fitted yet. Call 'fit' first.")
    names, sources = model.encoder_.feature_names, model.encoder_.source_columns
    if not sources:
        raise OptionError("Images and sequences have no columns; relevance is for tables.")
    values = np.zeros(len(names))
    if method == "permutation":
        if y is None:
            raise OptionError("method='permutation' measures a score: give y as well as X.")
        from sklearn.inspection import permutation_importance

        values = permutation_importance(model, X, y, n_repeats=5, random_state=seed).importances_mean.clip(
            0.0
        )
    elif method == "shapley":
        np.add.at(values, sources, _shapley(model, X, seed))
    else:
        np.add.at(values, sources, model.relevance_ if method == "slope" else _ard(model.posterior_))
    if np.isnan(values).any():  # a mean slope of NaN says nothing, and shares of it less
        raise NumericalError(
            f"method={method!r}: the relevance is NaN for this model, as a warning in its fit said if it is by slopes; "
            "use method='permutation', which needs no gradient of the kernel."
        )
    total = values.sum()
    shares = values / total if total > 0 else np.full(len(values), 1 / len(values))
    return dict(zip(names, shares.tolist()))


def _ard(posterior: FunctionPosterior) -> np.ndarray:
    """Inverse lengthscales of encoded columns, averaged over the members."""
    members, weights = [posterior], [1.0]
    if isinstance(posterior, MixturePosterior):
        members, weights = posterior.members, posterior.weights.tolist()
    total: Any = 0.0
    for member, weight in zip(members, weights):
        assert isinstance(member, GPPosterior)
        kernel = member.basis.kernel
        base = kernel.base_kernel if isinstance(kernel, ScaleKernel) else kernel
        lengthscale = getattr(base, "lengthscale", None)
        if lengthscale is None or lengthscale.shape[-1] != member.scaling.shift.shape[0]:
            raise OptionError(
                f"method='ard' reads one lengthscale for each input, which {type(base).__name__} has not; fit "
                "kernel='matern' or 'rbf', or use method='slope'."
            )
        total = total + weight / lengthscale.detach().cpu().numpy().reshape(-1)
    return total


def _shapley(model: Any, X: Any, seed: int) -> np.ndarray:
    try:
        import shap
    except ImportError as error:
        raise OptionError("method='shapley' needs the package shap: pip install 'fspace[shap]'.") from error
    x = np.asarray(model.encoder_.transform(X), dtype=np.float64)
    rng = np.random.default_rng(seed)
    pick = rng.permutation(len(x))
    classes = hasattr(model, "classes_")

    @torch.no_grad()
    def mean(rows: np.ndarray) -> np.ndarray:
        predictive: Any = model.posterior_.observed(torch.tensor(rows, dtype=torch.float64))
        return (predictive.probs if classes else predictive.mean).cpu().numpy()

    explainer = shap.explainers.Permutation(mean, x[pick[:BACKGROUND]], seed=seed)
    # one permutation and its reverse for each row: the mean over rows evens out the order
    evaluations = 2 * x.shape[1] + 1
    values = np.abs(explainer(x[pick[:EXPLAINED]], max_evals=evaluations, silent=True).values)
    return values.mean(axis=0) if values.ndim == 2 else values.mean(axis=(0, 2))


def components(posterior: GPPosterior, x: Any) -> dict[str, Gaussian]:
    """Predictives of the functions whose sum f is, where the kernel is a sum, in the units of y, without y's mean.

    Keys: position and kind of each part, with the columns it reads. Covariances between parts are left out: the
    variances need not sum to that of f. Raises OptionError where the kernel is no sum.
    Source: Duvenaud et al. (2011), section 3.
    """
    kernel = embedded_kernel(posterior.basis.kernel)
    parts = _parts(kernel)
    if len(parts) < 2:
        raise OptionError(
            f"{type(kernel).__name__} is no sum of kernels; fit kernel='additive', or a gpytorch AdditiveKernel."
        )
    basis, site = posterior.basis, posterior.site
    z = posterior.embedded(posterior.numbers(x, "x"))
    mixing, scale = posterior.scaling.mixing, posterior.scaling.y_scale
    if mixing is not None:  # at first in the units of what is modelled
        scale = torch.ones_like(scale)
    found = {}
    with torch.no_grad():
        eye = torch.eye(site.shift.shape[-1], dtype=torch.float64, device=z.device)
        inner = torch.linalg.cholesky(eye + site.precision)
        centre = torch.cholesky_solve(site.shift[..., None], inner)
        for name, part, columns in parts:
            inputs, at = (basis.inducing_inputs, z) if columns is None else (
                basis.inducing_inputs[:, columns], z[:, columns])  # fmt: skip
            v = solve_lower(basis.factor, covariance(part, inputs, at))
            w = solve_lower(inner, v.expand(len(inner), *v.shape))
            mean = (v.mT @ centre)[..., 0] * scale[:, None]
            variance = (diagonal(part, at) - v.square().sum(0) + w.square().sum(1)).clamp(min=0.0)
            variance = variance * scale.square()[:, None]
            found[name] = (
                Gaussian(mean[0], variance[0]) if posterior.vector else Gaussian(mean.mT, variance.mT)
            )
            if mixing is not None:
                found[name] = Coregionalised(found[name], posterior.scaling.units, torch.zeros_like(scale))
    return found


def anova(posterior: GPPosterior, x: Any) -> dict[str, float]:
    """Share of each part of an additive kernel in the variance of the mean function over the rows x [n, d]."""
    spread = {name: float(part.mean.var(0).sum()) for name, part in components(posterior, x).items()}
    total = sum(spread.values())
    return {name: value / total if total > 0 else 1 / len(spread) for name, value in spread.items()}


def _parts(kernel: Kernel) -> list[tuple[str, Kernel, slice | None]]:
    """Name, kernel and columns (None: all) of the parts of a sum."""
    if isinstance(kernel, SplitKernel):
        return [
            ("deep", kernel.base, slice(0, kernel.split)),
            ("plain", kernel.plain, slice(kernel.split, None)),
        ]
    if isinstance(kernel, ScaleKernel) and isinstance(kernel.base_kernel, AdditiveKernel):
        scaled = [ScaleKernel(part).double() for part in kernel.base_kernel.kernels]
        for part in scaled:
            part.outputscale = kernel.outputscale.detach()
        return [(_name(k, part), part, None) for k, part in enumerate(scaled)]
    if isinstance(kernel, AdditiveKernel):
        return [(_name(k, part), part, None) for k, part in enumerate(kernel.kernels)]
    return []


def _name(position: int, kernel: Kernel) -> str:
    base = kernel.base_kernel if isinstance(kernel, ScaleKernel) else kernel
    dims: Tensor | None = base.active_dims if base.active_dims is not None else kernel.active_dims
    read = "" if dims is None else f" of {', '.join(str(d) for d in dims.tolist())}"
    return f"{position}: {type(base).__name__.removesuffix('Kernel').lower()}{read}"
