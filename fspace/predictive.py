"""What a posterior says at given inputs: Gaussians, mixtures, other observations, samples, class probabilities.

Shapes: "y-shaped" means [n] for one output and [n, t] for several. Gaussians may carry leading batch dimensions.
"""

from collections.abc import Sequence

from torch import Tensor

from fspace.compound import Compound
from fspace.errors import DataError
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
    parts = [p for p in predictives if isinstance(p, Gaussian | Compound | Mixture)]
    if len(parts) < len(predictives):
        kinds = ", ".join(sorted({type(p).__name__ for p in predictives}))
        raise DataError(f"These predictives cannot be mixed: {kinds}.")
    return Mixture(parts, weights)
