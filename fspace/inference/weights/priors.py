"""Gaussian priors over the weights of a network, stated layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.network import Network


@dataclass(frozen=True)
class GaussianPrior:
    """Independent weights: N(0, weight_variance / fan-in) and biases N(0, bias_variance).

    With scaled=False all weights have variance weight_variance, whatever the fan-in. The scaled form is the one whose
    wide limit is `NeuralKernel` of the same two variances, so that a prior over functions stands behind it however
    wide the network is. In maximum a posteriori fits it is weight decay: 1 / (2 variance) for each squared weight.
    """

    weight_variance: float = 2.0
    bias_variance: float = 1.0
    scaled: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_variance", "bias_variance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise OptionError(f"{name}={value!r} of a weight prior must be a positive number.")

    def scales(self, network: Network) -> Float[Tensor, " p"]:
        """Standard deviation of every weight, in the order of the flat vector."""
        scale = torch.empty(network.size, dtype=torch.float64)
        for layer in network.layers:
            scale[slice(*layer.weight)] = math.sqrt(
                self.weight_variance / (layer.fan_in if self.scaled else 1)
            )
            if layer.bias is not None:
                scale[slice(*layer.bias)] = math.sqrt(self.bias_variance)
        return scale


def named_prior(prior: Any) -> GaussianPrior:
    """The prior that an option names: "scaled", the standard deviation of every weight, or a `GaussianPrior`.

    Raises OptionError for anything else."""
    if isinstance(prior, GaussianPrior):
        return prior
    if isinstance(prior, str) and prior == "scaled":
        return GaussianPrior()
    if isinstance(prior, int | float) and not isinstance(prior, bool) and 0 < prior < math.inf:
        variance = float(prior) * float(prior)
        if not 0 < variance < math.inf:
            raise OptionError(
                f"prior={prior!r} is the standard deviation of every weight; its square must be a positive float64."
            )
        return GaussianPrior(variance, variance, scaled=False)
    raise OptionError(
        f"prior={prior!r} does not exist; choose 'scaled' (variance 2 / fan-in, biases 1), a positive number (the "
        "standard deviation of every weight), or GaussianPrior(weight_variance, bias_variance)."
    )
