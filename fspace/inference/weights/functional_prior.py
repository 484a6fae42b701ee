"""A prior over weights whose functions are like those of a Gaussian process, then the posterior by SGHMC.

The variances of each layer's weights and biases are chosen so that functions drawn from the network and from the
process have near the same distribution at random points: the sliced Wasserstein distance between draws is made small.
Source: Tran et al. (2022), with random one-dimensional projections in place of a learned critic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from fspace.inference.numerics import cholesky
from fspace.inference.weights.distributions import Points
from fspace.inference.weights.function_prior import (
    check_kernel_name,
    learned_kernel,
    measurement_points,
    prior_covariance,
)
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.network import Network
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.sgmcmc import SGHMC
from fspace.predictive_base import check_whole

DRAWS = 128
PROJECTIONS = 64
POINTS = 24


@dataclass(frozen=True)
class FunctionalPrior:
    """The posterior under a weight prior that is tuned to a process.

    kernel: as in `FunctionVI`; steps: of Adam on the log deviations of layers; samples, chains, thinning: of `SGHMC`.
    The distance before and after, and the factors on the prior deviations, are in the figures.
    """

    kernel: str = "matern"
    steps: int = 300
    samples: int = 160
    chains: int = 8
    thinning: int = 200
    name: ClassVar[str] = "functional_prior"

    def __post_init__(self) -> None:
        check_kernel_name(self.kernel)
        check_whole("steps", self.steps)
        SGHMC(self.samples, self.chains, self.thinning)

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The kept states of the chains."""
        problem.require_curvature(self.name)
        kernel, _ = learned_kernel(problem, self.kernel, self.name)
        scales = tuned_scales(problem, kernel, self.steps)
        tuned = replace(problem, scales=scales)
        return SGHMC(self.samples, self.chains, self.thinning).sample(tuned), problem.likelihood


def tuned_scales(problem: Problem, kernel: Kernel, steps: int) -> Float[Tensor, " p"]:
    """Prior deviations of the weights, one factor for the weights and one for the biases of each layer, under which
    the network's functions are nearest those of the process."""
    network, generator = problem.network, problem.generator(17)
    groups = _groups(network)
    membership = torch.zeros(network.size, dtype=torch.long, device=problem.x.device)
    for k, (a, b) in enumerate(groups):
        membership[a:b] = k
    factors = torch.zeros(len(groups), dtype=torch.float64, device=problem.x.device, requires_grad=True)
    optimiser = torch.optim.Adam([factors], lr=0.03)
    history = []
    try:
        for step in range(0 if problem.report.interrupted else steps):  # Ctrl-C while the kernel was learned
            x = measurement_points(problem, POINTS, generator)
            white = torch.randn(
                DRAWS, network.size, generator=generator, device=x.device, dtype=torch.float64
            )
            w = white * problem.scales * factors.exp()[membership]
            ours = problem.likelihood.functions(network.many(w.to(x.dtype), x)).double()[..., 0]
            root, _ = cholesky(prior_covariance(kernel, x), "prior at measurement points")
            normal = torch.randn(DRAWS, POINTS, generator=generator, device=x.device, dtype=torch.float64)
            distance = sliced_wasserstein(ours, normal @ root.mT, generator)
            optimiser.zero_grad()
            distance.backward()
            optimiser.step()
            history.append(distance.item())
            if (step + 1) % 20 == 0:
                problem.record(stage="functional_prior: prior", loss=history[-1], done=step + 1, total=steps)
    except KeyboardInterrupt:
        problem.record(stage="functional_prior: prior", interrupted=True)
        problem.report.interrupted = "functional_prior"
    few = max(1, len(history) // 10)
    problem.report.figures |= {
        "distance_before": sum(history[:few]) / few if history else None,
        "distance_after": sum(history[-few:]) / few if history else None,
        "prior_factors": factors.exp().tolist(),
    }
    return problem.scales * factors.detach().exp()[membership]


def sliced_wasserstein(
    a: Float[Tensor, "s m"], b: Float[Tensor, "s m"], generator: torch.Generator
) -> Tensor:
    """Mean squared 2-Wasserstein distance of projections on random directions (Bonneel et al. 2015)."""
    directions = torch.randn(a.shape[1], PROJECTIONS, generator=generator, device=a.device, dtype=a.dtype)
    directions = directions / directions.norm(dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean()


def _groups(network: Network) -> list[tuple[int, int]]:
    return [ends for layer in network.layers for ends in (layer.weight, layer.bias) if ends is not None]
