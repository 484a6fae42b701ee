"""Bayesian linear regression, whose posterior is known, and small networks, as problems for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fspace.inference.weights.likelihoods import Classes, GaussianNoise
from fspace.inference.weights.network import Network
from fspace.inference.weights.priors import GaussianPrior
from fspace.inference.weights.problem import Problem, Report, Training
from fspace.kernels import MLP


@dataclass
class Linear:
    """A linear problem and its posterior, N(mean, covariance) over (weights, bias)."""

    problem: Problem
    design: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def diagonal(self) -> torch.Tensor:
        """Variances of the best independent Gaussian: one over the diagonal of the precision."""
        return 1.0 / torch.linalg.inv(self.covariance).diagonal()


def make_problem(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Problem:
    """A problem of float64 data; options replace parts of it."""
    network = Network.of(module.to(x.dtype))
    parts: dict[str, Any] = {
        "likelihood": GaussianNoise(y.shape[1]),
        "temperature": 1.0,
        "seed": 0,
        "training": Training(),
        "prior": GaussianPrior(),
    } | options
    prior = parts.pop("prior")
    return Problem(
        network=network,
        scales=prior.scales(network),
        x=x,
        y=y,
        record=lambda **_: None,
        report=Report(),
        **parts,
    )


@pytest.fixture
def linear() -> Callable[..., Linear]:
    """Makes linear problems of correlated inputs; orthogonal=True: of inputs that are not correlated at all."""

    def make(n: int = 60, d: int = 3, noise: float = 0.3, orthogonal: bool = False, **options: Any) -> Linear:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        if orthogonal:
            x = torch.linalg.qr(torch.cat([torch.ones(n, 1).double(), x], 1))[0][:, 1:] * n**0.5
        else:
            x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
        truth = torch.linspace(-1.0, 1.0, d).double()
        y = (x @ truth)[:, None] + 0.5 + noise**0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
        known = GaussianNoise(1, torch.tensor([noise], dtype=torch.float64).log())
        problem = make_problem(MLP(d, (), 1), x, y, **({"likelihood": known} | options))
        design = torch.cat([x, torch.ones(n, 1).double()], 1)
        prior = torch.diag(1.0 / problem.scales.square())
        covariance = torch.linalg.inv(design.mT @ design / noise + prior)
        mean = covariance @ design.mT @ y[:, 0] / noise
        return Linear(problem, design, mean, covariance * problem.temperature)

    return make


@pytest.fixture
def small() -> Callable[..., Problem]:
    """A network of one hidden layer of 5 on 40 rows of two inputs: numbers (outputs of them) or classes."""

    def make(
        outputs: int = 1, classes: int = 0, n: int = 40, hidden: tuple[int, ...] = (5,), **options: Any
    ) -> Problem:
        g = torch.Generator().manual_seed(2)
        x = torch.randn(n, 2, generator=g, dtype=torch.float64)
        y = torch.stack([torch.sin(2 * x[:, 0]), x[:, 1] * x[:, 0]], 1)[:, :outputs]
        y = y + 0.2 * torch.randn(n, y.shape[1], generator=g, dtype=torch.float64)
        if classes:
            y = torch.bucketize(
                x[:, :1] + 0.3 * y[:, :1], torch.linspace(-0.5, 0.5, classes - 1).double()
            ).double()
            outputs = 1 if classes == 2 else classes
            options = {"likelihood": Classes(classes)} | options
        torch.manual_seed(0)
        return make_problem(MLP(2, hidden, outputs, "tanh"), x, y, **options)

    return make


@pytest.fixture
def made() -> Callable[..., Problem]:
    """`make_problem` itself."""
    return make_problem
