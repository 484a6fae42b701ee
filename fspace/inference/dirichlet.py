"""Classification as regression: the label of a row stands for one Gaussian observation of every class' function.

A label says that class probabilities are Dirichlet with parameters a_c = concentration + [c is the label]. They are
Gamma variables over their sum, and each Gamma variable is taken for a log-normal of its mean and variance: the
function of class c is observed to be log a_c - s2_c / 2 with noise variance s2_c = log(1 / a_c + 1).
The posterior is then in closed form, and what a row says depends on no other row: sites of this likelihood are exact,
and add up whatever their order.
Source: Milios, Camoriano, Michiardi, Rosasco and Filippone (2018), Dirichlet-based Gaussian processes.
"""

from __future__ import annotations

import math

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError


class DirichletLikelihood(SoftmaxLikelihood):
    """Labels of classes, each a Gaussian observation of every class' function; probabilities are their softmax.

    concentration: of the prior over class probabilities; the smaller, the surer a label is taken to be. Raises
    OptionError where it is not positive. Source: Milios et al. (2018), eqs. 5 and 6.
    """

    concentration: Tensor

    def __init__(self, num_classes: int, concentration: float = 0.01):
        super().__init__(num_classes=num_classes, mixing_weights=False)
        if not 0 < concentration < math.inf:
            raise OptionError(f"concentration={concentration!r} must be a positive number.")
        self.register_buffer("concentration", torch.tensor(concentration, dtype=torch.float64))

    @property
    def unlabelled(self) -> float:
        """What the function of a class that a row is not of is observed to be."""
        return (self.concentration.log() - 0.5 * (1.0 / self.concentration + 1.0).log()).item()

    def pseudo_observations(
        self, labels: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, "c n"], Float[Tensor, "c n"]]:
        """What every class' function is observed to be at rows with these labels, and the noise variance."""
        classes = torch.arange(self.num_classes, device=labels.device)
        a = self.concentration + (labels.mT == classes[:, None]).to(torch.float64)
        noise = (1.0 / a + 1.0).log()
        return a.log() - 0.5 * noise, noise
