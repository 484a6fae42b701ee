"""What every method is given: a network, a prior, a likelihood and data, four independent things."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.likelihoods import LOG_NOISE, NetworkLikelihood
from fspace.inference.weights.network import Network
from fspace.predictive_base import generator_for

MANY_ROWS = 4096


@dataclass(frozen=True)
class Training:
    """How networks are trained: passes over the rows, rows in a step, the highest step size of Adam (None: by size
    of the data)."""

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float = 1e-2


@dataclass
class Report:
    """What a fit tells beside its posterior: figures of the method, and whether it was cut short."""

    figures: dict[str, Any] = field(default_factory=dict)
    interrupted: str | None = None
    diverged: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """Standardised rows x [n, *row] and y [n, t] (positions of classes: [n, 1]), and what is assumed of them.

    A state is theta = (weights, tail), `[s, p + r]` for s of them; r is the likelihood's `tail`. The tempered
    posterior is (likelihood * prior) ** (1 / temperature): 1 is Bayes' rule, below 1 is a cold posterior.
    """

    network: Network
    scales: Float[Tensor, " p"]
    likelihood: NetworkLikelihood
    x: Tensor
    y: Tensor
    temperature: float
    seed: int
    training: Training
    record: Callable[..., None]
    report: Report

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.x)

    @property
    def size(self) -> int:
        """Numbers in a state."""
        return self.network.size + self.likelihood.tail

    @property
    def epochs(self) -> int:
        """Passes over the rows: at least 40, and enough for some thousand steps, twice as many on tables of more than a
        few thousand rows (more passes still helped on kin8nm and naval, whose rows are that many)."""
        steps = 3000 if self.n < MANY_ROWS else 6000
        return self.training.epochs or math.ceil(max(40, min(1000, steps * self.batch_size / self.n)))

    @property
    def batch_size(self) -> int:
        """Rows in a step."""
        return min(self.n, self.training.batch_size or min(256, max(32, self.n // 16)))

    @property
    def steps(self) -> int:
        """Steps of a training run."""
        return max(1, self.epochs * math.ceil(self.n / self.batch_size))

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers of one of several independent streams, on the device of the data."""
        seeds = torch.randint(2**31, (stream + 1,), generator=generator_for(self.seed, torch.device("cpu")))
        return generator_for(int(seeds[stream]), self.x.device)

    def split(self, theta: Float[Tensor, "*s q"]) -> tuple[Float[Tensor, "*s p"], Float[Tensor, "*s r"]]:
        """Weights and tail of states."""
        return theta[..., : self.network.size], theta[..., self.network.size :]

    def start(self, s: int, stream: int = 0) -> Float[Tensor, "s q"]:
        """Random states to start from; noise at the mean of its prior."""
        w = self.network.initial(s, self.generator_cpu(stream)).to(self.x)
        return torch.cat([w, w.new_full((s, self.likelihood.tail), LOG_NOISE[0])], dim=1)

    def generator_cpu(self, stream: int = 0) -> torch.Generator:
        """As `generator`, on the host: starts are the same on every device."""
        seeds = torch.randint(2**31, (stream + 1,), generator=generator_for(self.seed, torch.device("cpu")))
        return generator_for(int(seeds[stream]), torch.device("cpu"))

    def log_likelihood(self, theta: Float[Tensor, "s q"], x: Tensor, y: Tensor) -> Float[Tensor, "s b"]:
        """Log density of rows under each state."""
        w, tail = self.split(theta)
        return self.likelihood.log_prob(self.network.many(w, x), tail, y)

    def log_prior(self, theta: Float[Tensor, "*s q"]) -> Float[Tensor, "*s"]:
        """Log prior density of states."""
        scales, means = self.prior_scales.to(theta), self.prior_means.to(theta)
        return -0.5 * ((theta - means) / scales).square().sum(-1) - self._log_normaliser

    @cached_property
    def _log_normaliser(self) -> float:
        """Of the prior density of a state."""
        tail = self.likelihood.tail * math.log(LOG_NOISE[1])
        return self.scales.log().sum().item() + tail + 0.5 * self.size * math.log(2 * math.pi)

    @cached_property
    def prior_scales(self) -> Float[Tensor, " q"]:
        """Prior standard deviation of every number of a state."""
        tail = self.scales.new_full((self.likelihood.tail,), LOG_NOISE[1])
        return torch.cat([self.scales, tail]).to(self.x)

    @cached_property
    def prior_means(self) -> Float[Tensor, " q"]:
        """Prior mean of every number of a state."""
        means = torch.zeros(self.size, dtype=torch.float64, device=self.x.device)
        means[self.network.size :] = LOG_NOISE[0]
        return means.to(self.x)

    def require_bayes(self, method: str) -> None:
        """Raises OptionError for a temperature, which a method without a posterior cannot have."""
        if self.temperature != 1.0:
            raise OptionError(
                f"temperature={self.temperature!r} says how much a posterior is sharpened, and inference="
                f"{method!r} claims none; leave temperature=1."
            )

    def require_curvature(self, method: str) -> None:
        """Raises OptionError for a likelihood without a Gauss-Newton curvature."""
        f = torch.zeros(1, self.likelihood.outputs, dtype=torch.float64)
        if self.likelihood.curvature(f, f.new_zeros(self.likelihood.tail)) is None:
            raise OptionError(
                f"inference={method!r} linearises the network around its mean function, for which noise must be "
                "constant; take likelihood='gaussian', or another inference for noise that varies."
            )
