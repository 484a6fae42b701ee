"""What a posterior says at given inputs: Gaussians, mixtures, other observations, samples, class probabilities.

Shapes: "y-shaped" means [n] for one output and [n, t] for several. Gaussians may carry leading batch dimensions.
"""

from collections.abc import Sequence

from torch import Tensor

from fspace.compound import Compound
from fspace.errors import OptionError
from fspace.gaussians import Gaussian, Mixture
from fspace.predictive_base import (
    Predictive,
    as_tensor,
    check_count,
    generator_for,
    normalised_weights,
)
from fspace.sampled import Categorical, Samples

__all__ = [
    "Categorical",
    "Compound",
    "Gaussian",
    "Mixture",
    "Predictive",
    "Samples",
    "as_tensor",
    "check_count",
    "generator_for",
    "mixed",
    "normalised_weights",
]


def mixed(predictives: Sequence[Predictive], weights: Tensor) -> Predictive:
    """The mixture of predictives of which one is right."""
    if all(isinstance(p, Categorical) for p in predictives):
        return Categorical.mixed([p for p in predictives if isinstance(p, Categorical)], weights)
    for predictive in predictives:
        if not isinstance(predictive, Gaussian | Compound):
            raise OptionError(
                f"Members of a mixture must predict Gaussians, observations of one likelihood, or classes, not "
                f"{type(predictive).__name__}."
            )
    return Mixture(predictives, weights)
