"""Variational inference with a Gaussian process prior over the function, not a prior over weights.

q is an independent Gaussian over weights; at measurement points its functions, linearised in the weights, are Gaussian,
and their divergence from the process there is in closed form. The bound is of the rows given the function and of the
divergence at the points of each step, which is less than that of the whole functions: more points, a stronger prior.
Sources: Sun et al. (2019, functional ELBO); Rudner et al. (2022, linearised divergence).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.numerics import cholesky
from fspace.inference.weights.curvature import Region, jacobian
from fspace.inference.weights.distributions import Diagonal
from fspace.inference.weights.function_prior import (
    check_kernel_name,
    learned_kernel,
    measurement_points,
    prior_covariance,
)
from fspace.inference.weights.likelihoods import GaussianNoise, NetworkLikelihood
from fspace.inference.weights.mfvi import drawn_outputs
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import Loss, train
from fspace.predictive_base import check_whole

JITTER = 1e-6  # of the mean variance of the prior: what functions may differ by unpunished


@dataclass(frozen=True)
class FunctionVI:
    """Function-space variational inference.

    kernel: "matern", "rbf" or "neural", learned by the evidence of at most 400 rows (classes: as it starts). Noise that
        is not given is learned with it, and held: the bound alone would let it fall with the training error.
    points: measurement points of each step (at most 512 / outputs), half rows and half uniform in their box.
    start_scale: deviations of whitened weights at the start. The weights' own prior has no part in it.
    """

    kernel: str = "matern"
    points: int = 64
    start_scale: float = 0.1
    name: ClassVar[str] = "fvi"

    def __post_init__(self) -> None:
        check_kernel_name(self.kernel)
        check_whole("points", self.points, 2)
        if not 0 < self.start_scale <= 1:
            raise OptionError(f"start_scale={self.start_scale!r} must be above 0 and at most 1.")

    def fit(self, problem: Problem) -> tuple[Diagonal, NetworkLikelihood]:
        """The Gaussian of greatest functional bound."""
        problem.require_curvature(self.name)
        kernel, log_noise = learned_kernel(problem, self.kernel, self.name)
        likelihood = problem.likelihood
        if isinstance(likelihood, GaussianNoise) and likelihood.log_variance is None:
            problem = replace(problem, likelihood=GaussianNoise(likelihood.targets, log_noise))
        generator = problem.generator(16)
        count = min(self.points, max(2, 512 // problem.likelihood.outputs))

        def points() -> tuple[Tensor, Tensor]:
            x = measurement_points(problem, count, generator)
            return x, prior_covariance(kernel, x)

        return fit_functions(problem, points, self.start_scale), problem.likelihood


def fit_functions(
    problem: Problem, points: Callable[[], tuple[Tensor, Tensor]], start_scale: float
) -> Diagonal:
    """The independent Gaussian over states of greatest bound; points() gives rows and the prior covariance there."""
    centre = (problem.start(1) - problem.prior_means) / problem.prior_scales
    start = torch.cat([centre, torch.full_like(centre, math.log(start_scale))], dim=1)
    mean, log_scale = (
        train(problem, start, _negative_bound(problem, points), "fvi").theta[0].split(problem.size)
    )
    return Diagonal(problem.prior_means + problem.prior_scales * mean, problem.prior_scales * log_scale.exp())


def _negative_bound(problem: Problem, points: Callable[[], tuple[Tensor, Tensor]]) -> Loss:
    generator = problem.generator(5)
    p = problem.network.size

    def loss(state: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        mean, log_scale = state[0].split(problem.size)
        f, tail = drawn_outputs(problem, mean, log_scale.exp(), problem.x[rows], generator)
        density = problem.likelihood.log_prob(f, tail, problem.y[rows]).mean()
        x, k = points()
        w = problem.prior_means[:p] + problem.prior_scales[:p] * mean[:p]
        deviation = (problem.prior_scales[:p] * log_scale[:p].exp()).double()
        noise = 0.5 * (mean[p:].square() + (2 * log_scale[p:]).exp() - 1.0)
        divergence = (noise - problem.temperature * log_scale[p:]).sum()
        centre = problem.network(w, x).double()
        # as in the second source's code, no slopes through the Jacobian itself
        root = jacobian(problem.network, w.detach(), x, Region(0, p)).detach() * deviation
        divergence = divergence + _divergence(centre, root, k, problem.temperature)
        return (-density + divergence / problem.n)[None]

    return loss


def _divergence(
    mean: Float[Tensor, "m o"], root: Float[Tensor, "m o p"], k: Float[Tensor, "m m"], temperature: float
) -> Tensor:
    """KL of N(mean, root root') from N(0, k), summed over outputs, with the entropy times the temperature."""
    m = len(k)
    level = JITTER * k.diagonal().mean()
    jitter = level * torch.eye(m, dtype=k.dtype, device=k.device)
    factor, _ = cholesky(k + jitter, "prior at measurement points")
    total = mean.new_zeros(())
    for c in range(mean.shape[1]):
        parts = torch.cat([mean[:, c : c + 1], root[:, c], jitter / level.sqrt()], dim=1)
        white = torch.linalg.solve_triangular(factor, parts, upper=False)
        own, _ = cholesky(root[:, c] @ root[:, c].mT + jitter, "functions at measurement points")
        entropy = own.diagonal().log().sum() - factor.diagonal().log().sum()
        total = total + 0.5 * white.square().sum() - 0.5 * m - temperature * entropy
    return total
