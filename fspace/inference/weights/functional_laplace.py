"""The trained network as a Gaussian process: its own answer as mean, its tangent kernel as covariance.

k(x, x') = J(x) P J(x')' with the prior covariance P of the weights and the Jacobian J at the mode. Conditioned on all
rows this is Laplace's approximation with the full curvature; the algebra is of rows, not of weights.
Source: Khan et al. (2019); Immer, Korzepa and Bauer (2021, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fspace.inference.weights.curvature import region_of
from fspace.inference.weights.distributions import StateDistribution
from fspace.inference.weights.laplace import LARGEST, Laplace, mode_and_factors
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.predictive_base import check_whole


@dataclass(frozen=True)
class FunctionalLaplace:
    """Laplace's approximation in function space, conditioned on at most `rows` rows (drawn at random; of them all, it
    is exact for the linearised network; of fewer, uncertainty comes out larger).

    tune, rounds: as in `Laplace`, with one factor on the prior precision; the evidence is that of the rows.
    """

    rows: int = 1000
    tune: bool = True
    rounds: int = 3
    name: ClassVar[str] = "functional_laplace"

    def __post_init__(self) -> None:
        check_whole("rows", self.rows)
        Laplace("full", "all", self.tune, self.rounds)

    def fit(self, problem: Problem) -> tuple[StateDistribution, NetworkLikelihood]:
        """The Gaussian process as a Gaussian over weights, and the likelihood with its noise as tuned."""
        problem.require_curvature(self.name)
        outputs = problem.likelihood.outputs
        most = min(problem.n, self.rows, LARGEST // outputs)
        rows = torch.randperm(problem.n, generator=problem.generator_cpu(11))[:most].to(problem.x.device)
        problem.report.figures["rows"] = most
        settings = Laplace("full", "all", self.tune, self.rounds)
        region = region_of(problem.network, "all")
        return mode_and_factors(problem, settings, region, rows, "full", self.name)
