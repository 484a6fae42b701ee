"""What a posterior says at given inputs: Gaussian, mixture of Gaussians, samples, or class probabilities.

Shapes: "y-shaped" means [n] for one output and [n, t] for several. Gaussians may carry leading batch dimensions.
"""

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
    "Gaussian",
    "Mixture",
    "Predictive",
    "Samples",
    "as_tensor",
    "check_count",
    "generator_for",
    "normalised_weights",
]
