"""The scikit-learn front: fit a Gaussian process regression with one line."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor

from fspace.data import TableEncoder, check_target, target_names
from fspace.errors import DataError, NotFittedError, NumericalError, OptionError
from fspace.inference.candidates import (
    EXACT_ROWS,
    Choice,
    Plan,
    choose,
    fit_deep,
    fit_plain,
    input_scaling,
    named_kernel,
)
from fspace.inference.numerics import pick_device, pick_dtype
from fspace.inference.optimise import MIN_NOISE, gaussian_likelihood
from fspace.interrupts import Interrupts, interrupts
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.posterior import FunctionPosterior, MixturePosterior, Predictive
from fspace.predictive_base import as_tensor, check_seed
from fspace.progress import progress

LIKELIHOODS = ("auto", "gaussian", "heteroscedastic")
INFERENCE = ("auto", "exact", "collapsed", "sites")
MOST_INDUCING = 2000
KERNELS = ("auto", "deep", "matern", "rbf", "neural")
CHUNK_VALUES = 2**20  # input values predicted at a time, so that memory does not grow with the rows


class GPRegressor(RegressorMixin, BaseEstimator):
    """Gaussian process regression with deep or plain kernels, exact or sparse.

    kernel: "auto" (the data choose between plain and deep), "deep", "matern", "rbf", "neural" (infinitely wide
        network), or a gpytorch kernel, which sees standardised inputs. Images [n, c, h, w] and sequences [n, t, d]
        need a `DeepKernel` with an extractor that reads them.
    inference: "auto", "exact" (Cholesky over all rows), "collapsed" (Titsias' bound), or "sites" (kernel and network
        learned from minibatches by natural-gradient steps; the posterior is then that of "collapsed").
    likelihood: "auto" (with kernel="auto" the data say whether the noise varies over the inputs; else constant),
        "gaussian" (constant), "heteroscedastic" (varies), or a gpytorch GaussianLikelihood, whose noise is in units
        of standardised y and is where the fit starts.
    inducing: most inducing inputs of the collapsed posterior; or a number below 1, the share of the prior variance
        they may leave unexplained, and as many are taken (2,000 at most).
    members: deep kernels in the ensemble.
    categories, missing: as in `TableEncoder`; missing="impute" fills NaN.
    device: "auto", "cpu", "cuda". dtype: of networks; GP algebra is float64.
    seed: the same seed gives the same fit on the same machine.
    progress: "auto" (a bar on a terminal, where the fit takes more than two seconds) or False.

    After fit: posterior_, log_evidence_ (nats, standardised y, of the heaviest member), history_ (dicts with "step",
    "stage", "loss", "heldout"), choice_ ("scores" of the kernels tried, the one "chosen", and the "weights" with which
    they predict together), relevance_ (share of each encoded column or channel), target_names_,
    interrupted_ (Ctrl-C ended the fit early: the best state so far is kept, and a warning says which).
    """

    def __init__(  # scikit-learn: options are checked in fit, so that they can be set in any order
        self,
        kernel: Any = "auto",
        inference: Any = "auto",
        likelihood: Any = "auto",
        inducing: Any = 512,
        members: Any = 3,
        categories: Any = None,
        missing: Any = "error",
        device: Any = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        progress: Any = "auto",
    ):
        self.kernel = kernel
        self.inference = inference
        self.likelihood = likelihood
        self.inducing = inducing
        self.members = members
        self.categories = categories
        self.missing = missing
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> GPRegressor:
        """Fit to X [n, d] (or images, sequences) and y [n] or [n, t]. Raises a FspaceError for data or options that
        cannot be used."""
        self._check_options()
        device, dtype = pick_device(self.device), pick_dtype(self.dtype)
        encoder = TableEncoder(self.categories, self.missing, owner=type(self).__name__)
        x = np.asarray(encoder.fit_transform(X), dtype=np.float64)
        self._check_shape(x)
        target = check_target(y, len(x))
        if len(x) < 2:
            raise DataError("X has 1 sample (n_samples=1); a fit needs at least 2 rows.")
        columns = target.reshape(len(x), -1)
        shift = columns.mean(axis=0)
        spread = (columns - shift).std(axis=0)
        scale = np.where(spread > 1e-13 * np.maximum(np.abs(shift), 1e-300), spread, 1.0)
        tensor = lambda a: torch.tensor(a, dtype=torch.float64, device=device)  # noqa: E731
        self.history_: list[dict[str, Any]] = []
        self._interrupted_in: str | None = None
        with interrupts() as held, progress("fitting", self.progress == "auto") as tell:
            plan = Plan(
                x=tensor(x),
                y=tensor((columns - shift) / scale),
                y_shift=tensor(shift),
                y_scale=tensor(scale),
                vector=target.ndim == 1,
                exact=self.inference == "exact" or (self.inference == "auto" and len(x) <= EXACT_ROWS),
                sites=self.inference == "sites",
                inducing=min(int(self.inducing) if self.inducing >= 1 else MOST_INDUCING, len(x)),
                dtype=dtype,
                seed=check_seed(self.seed),
                tolerance=0.0 if self.inducing >= 1 else float(self.inducing),
                vary={"auto": None, "heteroscedastic": True}.get(self.likelihood, False)
                if isinstance(self.likelihood, str)
                else False,
                likelihood=None
                if isinstance(self.likelihood, str)
                else own_likelihood(self.likelihood, columns.shape[1]),
                record=self._recorder(tell, held),
            )
            choice = self._fit(plan, x)
        if held.waiting:  # it came when all training was done
            self._interrupted_in = self._interrupted_in or "the last steps"
        self.choice_ = choice.report
        self.interrupted_ = self._interrupted_in is not None
        if self.interrupted_:
            warnings.warn(
                f"Interrupted while fitting {self._interrupted_in}; the best state so far is kept "
                f"({', '.join(self.choice_['weights'])}).",
                stacklevel=2,
            )
        self.encoder_ = encoder
        self.n_features_in_ = encoder.n_features_in_
        if hasattr(encoder, "feature_names_in_"):
            self.feature_names_in_ = encoder.feature_names_in_
        self.target_names_ = target_names(y, target)
        heaviest = choice.fits[int(choice.weights.argmax())]
        self.log_evidence_ = heaviest.log_evidence
        posteriors = [fit.posterior for fit in choice.fits]
        self.posterior_: FunctionPosterior = (
            posteriors[0] if len(posteriors) == 1 else MixturePosterior(posteriors, choice.weights.cpu())
        )
        self.relevance_ = _relevance(self.posterior_, plan.x)
        return self

    def _fit(self, plan: Plan, x: np.ndarray) -> Choice:
        if isinstance(self.kernel, str) and self.kernel == "auto":
            return choose(plan, self.members)
        if plan.vary is None:  # whoever names a kernel gets that model; "heteroscedastic" asks for the other
            plan = replace(plan, vary=False)
        scaling = input_scaling(x, warp=False) if x.ndim == 2 else channel_scaling(x)
        if isinstance(self.kernel, DeepKernel) or self.kernel == "deep":
            kernel = self.kernel if isinstance(self.kernel, DeepKernel) else None
            if kernel is not None:
                check_kernel(copy.deepcopy(kernel).eval(), torch.tensor(x[:3], dtype=torch.float64))
            fits = []
            for k in range(self.members):
                fits.append(fit_deep(plan, kernel, scaling, k, f"deep {k + 1}"))
                if self._interrupted_in is not None:
                    break
        else:
            plain = (
                copy.deepcopy(self.kernel).double()
                if isinstance(self.kernel, Kernel)
                else named_kernel(self.kernel, x.shape[1])
            )
            name = self.kernel if isinstance(self.kernel, str) else type(self.kernel).__name__
            check_kernel(plain, torch.tensor(x[:3], dtype=torch.float64))
            fits = fit_plain(plan, plain, scaling, name)
        weights = torch.full((len(fits),), 1.0 / len(fits), dtype=torch.float64)
        report = {
            "scores": {fit.name: fit.score for fit in fits},
            "chosen": fits[0].name,
            "weights": {fit.name: 1.0 / len(fits) for fit in fits},
            "unit": "log density a row, standardised y",
        }
        return Choice(fits, weights, report)

    def _recorder(self, tell: Callable[..., None], held: Interrupts) -> Callable[..., None]:
        """What training calls at every step: keeps the history, lets Ctrl-C through, moves the progress bar."""

        def record(**entry: Any) -> None:
            tell(**entry)
            if entry.get("interrupted") and self._interrupted_in is None:
                self._interrupted_in = str(entry.get("stage", "the model"))
            if "held_out" in entry:  # a score; a history holds losses
                entry["heldout"] = -entry.pop("held_out")
            self.history_.append({"step": len(self.history_), **entry})
            held.check()

        return record

    def _check_shape(self, x: np.ndarray) -> None:
        """Only a deep kernel whose extractor reads rows of this shape can be fitted to images and sequences."""
        deep = isinstance(self.kernel, DeepKernel)
        dims = self.kernel.input_dims if isinstance(self.kernel, DeepKernel) else 1
        if x.ndim > 4:
            raise DataError(
                f"X has shape {list(x.shape)}; this estimator reads tables [n, columns], sequences [n, t, d] and "
                "images [n, c, h, w]."
            )
        if x.ndim > 2 and not deep:
            what = "images" if x.ndim == 4 else "sequences"
            example = "ConvNet(in_channels)" if x.ndim == 4 else "CausalConv(in_features)"
            raise OptionError(
                f"X has shape {list(x.shape)} ({what}); kernel={self.kernel!r} reads tables. Pass "
                f"kernel=DeepKernel({example}, MaternKernel()), with both from fspace.kernels, or flatten the rows."
            )
        if deep and dims is not None and dims != x.ndim - 1:
            raise OptionError(
                f"X has shape {list(x.shape)}, but the kernel's {type(self.kernel.extractor).__name__} reads rows of "
                f"{dims} dimension{'s' * (dims != 1)}; reshape X to {dims + 1} dimensions, or take another extractor."
            )

    def _check_options(self) -> None:
        if isinstance(self.kernel, str) and self.kernel not in KERNELS:
            raise OptionError(
                f"kernel={self.kernel!r} does not exist; choose one of {', '.join(KERNELS)} or pass a gpytorch kernel."
            )
        if not isinstance(self.kernel, str | Kernel):
            raise OptionError(f"kernel is a {type(self.kernel).__name__}; pass a name or a gpytorch kernel.")
        if self.inference not in INFERENCE:
            raise OptionError(
                f"inference={self.inference!r} does not exist; choose one of {', '.join(INFERENCE)}."
            )
        if self.progress is not False and self.progress != "auto":
            raise OptionError(f"progress={self.progress!r} does not exist; choose 'auto' or False.")
        if isinstance(self.likelihood, str) and self.likelihood not in LIKELIHOODS:
            raise OptionError(
                f"likelihood={self.likelihood!r} does not exist; choose one of {', '.join(LIKELIHOODS)} or pass a "
                "gpytorch GaussianLikelihood."
            )
        if not isinstance(self.likelihood, str | GaussianLikelihood):
            raise OptionError(
                f"likelihood is a {type(self.likelihood).__name__}; pass a name or a gpytorch GaussianLikelihood."
            )
        if not isinstance(self.members, int | np.integer) or self.members < 1:
            raise OptionError(f"members={self.members!r} must be a whole number of at least 1.")
        check_seed(self.seed)
        share = isinstance(self.inducing, float | np.floating) and 0 < self.inducing < 1
        if not share and (not isinstance(self.inducing, int | np.integer) or self.inducing < 1):
            raise OptionError(
                f"inducing={self.inducing!r} must be a whole number of at least 1, or a share of the prior variance "
                "between 0 and 1 that may stay unexplained."
            )

    def _parts(self, X: Any) -> Iterator[Tensor]:
        """Encoded rows, some at a time."""
        if not hasattr(self, "posterior_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet. Call 'fit' first.")
        for part in self.encoder_.batches(X, CHUNK_VALUES):
            yield torch.tensor(part, dtype=torch.float64)

    def predictive(self, X: Any) -> Predictive:
        """Distribution of y at X [n, d]: mean, variance, log_prob, quantile, interval, samples."""
        x = torch.cat(list(self._parts(X)))
        return self.posterior_.observed(x)

    @torch.no_grad()
    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """Mean of y [n] or [n, t]; with return_std also its standard deviation, with return_cov the joint covariance.

        Both include the noise. Rows are taken some at a time, so millions fit in memory (not with return_cov).
        Raises OptionError when both are asked for.
        """
        if return_std and return_cov:
            raise OptionError("predict gives either return_std or return_cov, not both.")
        if return_cov:
            joint: Any = self.predictive(X)
            return joint.mean.cpu().numpy(), joint.covariance.cpu().numpy()
        means, deviations = [], []
        for x in self._parts(X):
            predictive = self.posterior_.observed(x)
            means.append(predictive.mean.cpu().numpy())
            if return_std:
                deviations.append(predictive.stddev.cpu().numpy())
        mean = np.concatenate(means)
        return (mean, np.concatenate(deviations)) if return_std else mean

    def predict_cdf(self, X: Any, thresholds: Any) -> np.ndarray:
        """P(y <= threshold) at every row, for a threshold or one a row."""
        predictive: Any = self.predictive(X)
        y = as_tensor(thresholds, predictive.mean.device, "thresholds").to(torch.float64)
        try:
            y = y.expand_as(predictive.mean)
        except RuntimeError as error:
            raise DataError(
                f"thresholds has shape {tuple(y.shape)}, but the prediction has shape {tuple(predictive.mean.shape)}."
            ) from error
        return predictive.cdf(y).cpu().numpy()

    @torch.no_grad()
    def sample_y(self, X: Any, n_samples: int = 1, random_state: int | None = 0) -> np.ndarray:
        """Joint samples of y: [n, n_samples], or [n, t, n_samples]."""
        return np.moveaxis(self.predictive(X).rsample(n_samples, random_state).cpu().numpy(), 0, -1)

    def save(self, path: str | Path) -> Path:
        """Write the fitted model to one file (safetensors and JSON; nothing in it can run code)."""
        from fspace.saving import save

        return save(self, path)


def check_kernel(kernel: Kernel, x: Tensor) -> None:
    """Raises OptionError for a kernel that gives no covariance of rows [k, d] (or images, sequences)."""
    what = f"kernel={type(kernel).__name__} cannot be used on rows of shape {list(x.shape[1:])}"
    try:
        with torch.no_grad():
            k = covariance(embedded_kernel(kernel), embed(kernel, x))
    except NumericalError:
        raise
    except Exception as error:  # whatever a foreign kernel raises
        raise OptionError(
            f"{what}: {error}. Its ard_num_dims, active_dims and number of inputs must be those of the encoded table."
        ) from error
    if k.shape != (len(x), len(x)):
        raise OptionError(
            f"{what}: it gives a covariance of shape {list(k.shape)} for {len(x)} rows. Pass a kernel of one function, "
            "without batch_shape or tasks; several outputs share it."
        )


def own_likelihood(given: GaussianLikelihood, outputs: int) -> GaussianLikelihood:
    """A copy in float64 with one noise an output; one given for all outputs starts them all."""
    like = copy.deepcopy(given).double()
    if not like.raw_noise.requires_grad:
        raise OptionError(
            "likelihood has a noise that is fixed; this estimator learns it. Leave requires_grad on."
        )
    constraint = like.noise_covar.raw_noise_constraint
    if math.isfinite(constraint.upper_bound) or constraint.lower_bound > 1e-4 or list(like.named_priors()):
        raise OptionError(
            "likelihood has a prior or bounds on its noise, which this estimator would not keep; pass one without, "
            "whose noise is where the fit starts."
        )
    if like.noise.numel() not in (1, outputs):
        raise OptionError(
            f"likelihood has {like.noise.numel()} noise variances, but y has {outputs} outputs."
        )
    noise = like.noise.detach().reshape(-1, 1).expand(outputs, 1).clone()
    own = gaussian_likelihood(outputs, 0.1, torch.device("cpu"))
    own.noise = noise.clamp(min=1.001 * MIN_NOISE)
    return own


def channel_scaling(x: np.ndarray) -> dict[str, np.ndarray]:
    """One shift and scale a channel, shaped to broadcast against x: [c, 1, 1] for images [n, c, h, w], [d] for
    sequences [n, t, d]. Constant channels stay at zero."""
    others, shape = ((0, 2, 3), (-1, 1, 1)) if x.ndim == 4 else ((0, 1), (-1,))
    shift, scale = x.mean(axis=others), x.std(axis=others)
    scale = np.where(scale > 1e-12 * np.abs(shift), scale, 1.0)
    one = np.ones_like(shift)
    parts = {"unit": one, "power": one, "shift": shift, "scale": scale}
    return {name: part.reshape(shape) for name, part in parts.items()}


def _relevance(posterior: FunctionPosterior, x: Tensor) -> np.ndarray:
    """Share of each encoded column (or channel) in the function: root mean square of the mean's slope times the
    column's spread."""
    pick = x[:: max(1, len(x) // 200)].clone().requires_grad_()
    mean = posterior.latent(pick).mean.sum()
    slope = (
        torch.autograd.grad(mean, pick)[0] if mean.requires_grad else torch.zeros_like(x[:1])
    )  # a constant kernel
    channel = 1 if x.ndim == 4 else x.ndim - 1
    slopes = (slope * x.std(dim=0)).movedim(channel, -1).flatten(0, -2)
    share = slopes.square().mean(dim=0).sqrt().nan_to_num(0.0)
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1.0 / len(share))
    return share.cpu().numpy()
