"""What all Gaussian-process estimators share: options, encoded rows, the fit of a plan, prediction in parts."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from fspace.data import TableEncoder
from fspace.errors import NotFittedError, NumericalError, OptionError
from fspace.front import FunctionEstimator, slope_relevance
from fspace.inference.candidates import Plan, fit_deep, fit_plain, input_scaling, named_kernel
from fspace.inference.choice import Choice, choose
from fspace.inference.gp import GPPosterior
from fspace.inference.numerics import pick_device, pick_dtype
from fspace.inference.source import AT_ONCE, RowSource
from fspace.inference.streaming import forget, take_in
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.posterior import FunctionPosterior, MixturePosterior
from fspace.predictive_base import check_seed, check_whole

MOST_INDUCING = 2000
KERNELS = ("auto", "deep", "matern", "rbf", "neural", "additive")


class GPEstimator(FunctionEstimator):
    """Options and attributes that `GPRegressor` and `GPClassifier` have in common."""

    kernel: Any
    inducing: Any
    members: Any

    def _fit_plan(
        self,
        encoder: TableEncoder,
        x: Any,
        modelled: np.ndarray,
        shift: np.ndarray,
        scale: np.ndarray,
        weight: np.ndarray | None = None,
        **settings: Any,
    ) -> None:
        """Fit what is modelled [n, t], y = shift + scale * that, and set the attributes of a fitted estimator."""
        device, dtype = pick_device(self.device), pick_dtype(self.dtype)
        tensor = lambda a: torch.tensor(a, dtype=torch.float64, device=device)  # noqa: E731
        with self._recording() as record:
            plan = Plan(
                x=tensor(x) if x.ndim == 2 else RowSource.of(x, device),
                y=tensor(modelled),
                y_shift=tensor(shift),
                y_scale=tensor(scale),
                inducing=min(int(self.inducing) if self.inducing >= 1 else MOST_INDUCING, len(x)),
                dtype=dtype,
                seed=check_seed(self.seed),
                tolerance=0.0 if self.inducing >= 1 else float(self.inducing),
                record=record,
                weight=None if weight is None else tensor(weight),
                **settings,
            )
            choice = self._fit(plan, x)
        self.choice_ = choice.report
        if self.interrupted_:
            warnings.warn(
                f"Interrupted while fitting {self._interrupted_in}; the best state so far is kept "
                f"({', '.join(self.choice_['weights'])}).",
                stacklevel=3,
            )
        self._adopt(encoder)
        heaviest = choice.fits[int(choice.weights.argmax())]
        self.log_evidence_ = heaviest.log_evidence
        posteriors = [fit.posterior for fit in choice.fits]
        self.posterior_: FunctionPosterior = (
            posteriors[0] if len(posteriors) == 1 else MixturePosterior(posteriors, choice.weights.cpu())
        )
        self.relevance_ = slope_relevance(self.posterior_, plan.x)
        largest = max(len(member.basis.inducing_inputs) for member in self._members())
        self.budget_ = max(plan.inducing, largest)

    def _fit(self, plan: Plan, x: Any) -> Choice:
        if isinstance(self.kernel, str) and self.kernel == "auto":
            return choose(plan, self.members)
        if plan.vary is None:  # whoever names a kernel gets that model; "heteroscedastic" asks for the other
            plan = replace(plan, vary=False)
        weight = None if plan.weight is None else plan.weight.cpu().numpy()
        scaling = input_scaling(x, False, weight) if x.ndim == 2 else channel_scaling(x)
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
                else named_kernel(self.kernel, x.shape[1], not plan.gaussian)
            )
            name = self.kernel if isinstance(self.kernel, str) else type(self.kernel).__name__
            check_kernel(plain, torch.tensor(x[:3], dtype=torch.float64))
            fits = fit_plain(plan, plain, scaling, name)
        weights = torch.full((len(fits),), 1.0 / len(fits), dtype=torch.float64)
        report = {
            "scores": {fit.name: fit.score for fit in fits},
            "chosen": fits[0].name,
            "weights": {fit.name: 1.0 / len(fits) for fit in fits},
            "unit": "log density a row, standardised y" if plan.gaussian else "log density a row",
        }
        return Choice(fits, weights, report)

    def _check_shape(self, x: Any) -> None:
        """Only a deep kernel whose extractor reads rows of this shape can be fitted to images and sequences."""
        deep = isinstance(self.kernel, DeepKernel)
        dims = self.kernel.input_dims if isinstance(self.kernel, DeepKernel) else 1
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

    def _check_shared_options(self) -> None:
        if isinstance(self.kernel, str) and self.kernel not in KERNELS:
            raise OptionError(
                f"kernel={self.kernel!r} does not exist; choose one of {', '.join(KERNELS)} or pass a gpytorch kernel."
            )
        if not isinstance(self.kernel, str | Kernel):
            raise OptionError(f"kernel is a {type(self.kernel).__name__}; pass a name or a gpytorch kernel.")
        if self.progress is not False and self.progress != "auto":
            raise OptionError(f"progress={self.progress!r} does not exist; choose 'auto' or False.")
        check_whole("members", self.members)
        check_seed(self.seed)
        share = isinstance(self.inducing, float | np.floating) and 0 < self.inducing < 1
        if not share and (not isinstance(self.inducing, int | np.integer) or self.inducing < 1):
            raise OptionError(
                f"inducing={self.inducing!r} must be a whole number of at least 1, or a share of the prior variance "
                "between 0 and 1 that may stay unexplained."
            )

    @property
    def sites_(self) -> dict[str, int]:
        """Rows behind every site of the posterior, by name: what `fit` saw first, then each `partial_fit`."""
        return {name: site.count for name, site in self._members()[0].sites.items()}

    def forget(self, site: Any) -> GPEstimator:
        """Take back what one site (a name in `sites_`) says, as if its rows had never come; kernel and noise stay.

        Raises OptionError for a site that is not there, or the only one.
        """
        if not isinstance(site, str):
            raise OptionError(f"forget({site!r}): name one site, a key of sites_: {', '.join(self.sites_)}.")
        self._replace([forget(member, site) for member in self._members()])
        return self

    def _take_in(self, x: np.ndarray, y: np.ndarray, site: Any, discount: Any) -> None:
        """Encoded rows x and y [n] or [n, t] as one more site of every member."""
        members = self._members()
        name = site if site is not None else self._free_name(members[0].sites)
        self._replace(
            [
                take_in(
                    member,
                    torch.from_numpy(x),
                    torch.from_numpy(y),
                    name,
                    self.budget_,
                    discount,
                )
                for member in members
            ]
        )

    @staticmethod
    def _free_name(taken: Mapping[str, Any]) -> str:
        return next(name for k in itertools.count(1) if (name := f"batch {k}") not in taken)

    def _members(self) -> list[GPPosterior]:
        if not hasattr(self, "posterior_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet. Call 'fit' first.")
        posterior = self.posterior_
        members = posterior.members if isinstance(posterior, MixturePosterior) else [posterior]
        return [member for member in members if isinstance(member, GPPosterior)]

    def _replace(self, members: list[GPPosterior]) -> None:
        old = self.posterior_
        self.posterior_ = (
            MixturePosterior(members, old.weights) if isinstance(old, MixturePosterior) else members[0]
        )


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


def channel_scaling(x: Any) -> dict[str, np.ndarray]:
    """One shift and scale a channel, shaped to broadcast against x: [c, 1, 1] for images [n, c, h, w], [d] for
    sequences [n, t, d]. Constant channels stay at zero."""
    others, channel, shape = ((0, 2, 3), 1, (-1, 1, 1)) if x.ndim == 4 else ((0, 1), 2, (-1,))
    count, shift, square = 0, np.zeros(x.shape[channel]), np.zeros(x.shape[channel])
    for start in range(0, len(x), AT_ONCE):  # x may be on disk
        part = np.asarray(x[start : start + AT_ONCE], dtype=np.float64)
        seen = (~np.isnan(part)).sum(axis=others)  # the ends of short sequences are NaN
        mean = np.nansum(part, axis=others) / np.maximum(seen, 1)
        centred = part - (mean.reshape(-1, 1, 1) if x.ndim == 4 else mean)
        square += np.nansum(centred**2, axis=others) + (mean - shift) ** 2 * count * seen / np.maximum(
            count + seen, 1
        )
        count = count + seen
        shift += (mean - shift) * seen / np.maximum(count, 1)
    scale = np.sqrt(square / np.maximum(count, 1))
    scale = np.where(scale > 1e-12 * np.abs(shift), scale, 1.0)
    one = np.ones_like(shift)
    parts = {"unit": one, "power": one, "shift": shift, "scale": scale}
    return {name: part.reshape(shape) for name, part in parts.items()}
