"""BoTorch's formulas for Gaussians are refused on models that say what they are instead (`not_gaussian`)."""

from __future__ import annotations

from typing import Any

from botorch.acquisition import analytic
from torch.nn.modules.module import register_module_module_registration_hook

from fspace.errors import OptionError

# These read a mean and a variance only; the other analytic functions integrate against a Gaussian.
_FROM_MOMENTS = (
    analytic.PosteriorMean,
    analytic.ScalarizedPosteriorMean,
    analytic.PosteriorStandardDeviation,
    analytic.UpperConfidenceBound,
)


def _refuse_analytic_functions(module: Any, name: str, submodule: Any) -> None:
    """Mean and variance of another distribution would silently be taken for a Gaussian's; called when a function gets
    its model."""
    if not isinstance(module, analytic.AnalyticAcquisitionFunction) or isinstance(module, _FROM_MOMENTS):
        return
    what = getattr(submodule, "not_gaussian", "")
    instead = ", or one member: posterior.members[0].as_botorch()" if "mixture" in what else ""
    if what:
        raise OptionError(
            f"{type(module).__name__} is a formula for Gaussians, and this posterior is {what}. Use a Monte Carlo "
            f"acquisition function (qLogExpectedImprovement, qLogNoisyExpectedImprovement, ...){instead}."
        )


register_module_module_registration_hook(_refuse_analytic_functions)
