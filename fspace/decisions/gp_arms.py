"""A GP bandit that learns its kernel: rarely, from few rows, so that a reward costs the same for ever on average.

The kernel (Matern + linear, one lengthscale a column), the noise and the inducing inputs are learned anew, from
nothing, at 10, 20, 40, ... rewards; the sites of the arms are then made from all rewards so far. In between, a reward
adds to the site of its arm, and a context that the inducing inputs explain badly joins them while there is room. After
the last such refit the rows are dropped: what is left is an `ArmPosterior`, and its size is fixed.

What is learned is a function of the rewards in the order in which they were told, however they were batched: a bandit
that goes on from its journal is where it was.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import AdditiveKernel, MaternKernel, PolynomialKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float, Int
from torch import Tensor

from fspace.decisions.bandits import ArmPosterior, Moments
from fspace.decisions.sources import check_number
from fspace.errors import DataError
from fspace.inference.basis import Basis
from fspace.inference.exact import log_marginal_likelihood
from fspace.inference.inducing import greedy_variance
from fspace.inference.optimise import lbfgs
from fspace.inference.streaming import unexplained
from fspace.kernels.evaluate import covariance
from fspace.predictive_base import check_seed, check_whole

FIRST = 10  # rewards before anything is learned; then at every doubling
SUBSET = 256  # random rows whose evidence teaches the kernel
STEPS = 25  # of L-BFGS
TOLERANCE = 1e-4  # share of the prior variance that inducing inputs may leave unexplained at a refit
# Least noise variance, of reward_scale squared. Rewards that jump (a class, a region) look free of noise: learned
# without a floor the noise goes to zero, lengthscales shrink until every context is new, and exploration never ends.
NOISE_FLOOR = 0.01
# Least variance of the Matern part. Before a rare reward is met all rewards are alike, and evidence alone would say
# that all rewards ever will be.
SIGNAL_FLOOR = 0.1


class _Rows(NamedTuple):
    contexts: Float[Tensor, "n d"]
    arms: Int[Tensor, " n"]
    rewards: Float[Tensor, " n"]

    def part(self, start: int, end: int | None) -> _Rows:
        return _Rows(*(column[start:end] for column in self))


class GPArms:
    """Knowledge about arms for a `Bandit`: independent functions of one learned kernel, Matern 5/2 + linear.

    width: numbers in a context, of any units (they are standardised). mean, reward_scale: what rewards are expected to
    be before any is seen, and how far they may be from it; the noise is taken to be at least 0.1 reward_scale. most:
    inducing inputs. remember: rewards up to which the kernel is learned; their rows are kept until then, none after.
    Source: maximum a posteriori of the exact evidence of a subset, the posterior of Titsias (2009) a site an arm.
    """

    def __init__(
        self,
        width: Any,
        arms: Any,
        mean: float = 0.0,
        reward_scale: float = 1.0,
        most: Any = 100,
        remember: Any = 10_000,
        seed: int = 0,
    ):
        self.width, self.arms = check_whole("width", width), check_whole("arms", arms, 2)
        self.most, remember = check_whole("most", most), check_whole("remember", remember, FIRST)
        self.mean = check_number(mean, "mean", "be a finite number")
        self.reward_scale = check_number(reward_scale, "reward_scale", "be finite and above 0", 0.0)
        self.seed = check_seed(seed)
        self.last_refit = FIRST * 2 ** int(math.log2(remember / FIRST))
        self.known: ArmPosterior | None = None
        self.seen, self.refitted = 0, 0  # rewards so far, and at the last refit
        self._rows: list[_Rows] = []

    def moments(self, contexts: Float[Tensor, "n d"]) -> Moments:
        """Mean and standard deviation of the expected reward of every arm; before the first refit, the prior's."""
        self._require_width(contexts)
        if self.known is None:
            prior = torch.full((len(contexts), self.arms), self.reward_scale, dtype=torch.float64)
            return Moments(torch.full_like(prior, self.mean), prior)
        return self.known.moments(self._standard(contexts))

    def update(
        self, contexts: Float[Tensor, "n d"], arms: Int[Tensor, " n"], rewards: Float[Tensor, " n"]
    ) -> None:
        """Take in rewards, in this order; learn the kernel anew where a doubling is reached."""
        self._require_width(contexts)
        new = _Rows(contexts.double(), arms, rewards.double())
        self.seen += len(rewards)
        if self.refitted < self.last_refit:
            self._rows.append(new)
        due = min(self.last_refit, FIRST * 2 ** int(math.log2(max(self.seen, FIRST) / FIRST)))
        if self.seen >= due > self.refitted:
            rows = _Rows(*(torch.cat(parts) for parts in zip(*self._rows, strict=True)))
            new = rows.part(due, None)
            self._refit(rows.part(0, due))
            self.refitted = due
            self._rows = [rows] if due < self.last_refit else []
        if self.known is not None:
            self._add(self.known, new)

    def _add(self, known: ArmPosterior, rows: _Rows) -> None:
        """One by one while inducing inputs are added, so that batches do not matter; the rest together."""
        z, start = self._standard(rows.contexts), 0
        while start < len(z) and len(known.basis.inducing_inputs) < self.most:
            one = z[start : start + 1]
            if len(unexplained(known.basis, one, 1)):
                known.grow(one)
            known.update(one, *rows.part(start, start + 1)[1:])
            start += 1
        if start < len(z):
            known.update(z[start:], *rows.part(start, None)[1:])

    def _refit(self, rows: _Rows) -> None:
        self._shift, spread = rows.contexts.mean(0), rows.contexts.std(0)
        constant = spread <= 1e-9 * rows.contexts.abs().amax(0)
        self._scale = torch.where(constant, torch.ones_like(spread), spread)
        z, y = self._standard(rows.contexts), (rows.rewards - self.mean) / self.reward_scale
        generator = torch.Generator().manual_seed(self.seed)
        some = torch.randperm(len(y), generator=generator)[:SUBSET]
        kernel, likelihood = learned(z[some], rows.arms[some], y[some])
        inducing = z[greedy_variance(kernel, z, self.most, TOLERANCE)]
        self.known = ArmPosterior(
            Basis(kernel, inducing, likelihood), self.arms, self.mean, self.reward_scale
        )
        self.known.update(z, rows.arms, rows.rewards)

    def _standard(self, contexts: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (contexts.double() - self._shift) / self._scale

    def _require_width(self, contexts: Float[Tensor, "n d"]) -> None:
        if contexts.shape[1] != self.width:
            raise DataError(f"A context has {contexts.shape[1]} numbers, but the arms know {self.width}.")


def learned(
    z: Float[Tensor, "n d"], arms: Int[Tensor, " n"], y: Float[Tensor, " n"]
) -> tuple[AdditiveKernel, GaussianLikelihood]:
    """Kernel and noise that all arms share, by L-BFGS on the log evidence of independent functions, one an arm.

    Lengthscales have a log-normal prior around sqrt(d), of spread 0.7.
    """
    d = z.shape[1]
    matern = MaternKernel(nu=2.5, ard_num_dims=d)
    curved = ScaleKernel(matern, outputscale_constraint=GreaterThan(SIGNAL_FLOOR)).double()
    curved.base_kernel.lengthscale, curved.outputscale = math.sqrt(d), 0.5
    straight = ScaleKernel(PolynomialKernel(power=1)).double()  # variance (x'x + offset)
    straight.outputscale, straight.base_kernel.offset = 0.5 / d, 1.0
    kernel = AdditiveKernel(curved, straight)
    likelihood = GaussianLikelihood(
        noise_constraint=GreaterThan(NOISE_FLOOR), batch_shape=torch.Size([1])
    ).double()
    likelihood.noise = torch.tensor([[0.1]], dtype=torch.float64)
    same = (arms[:, None] == arms).to(torch.float64)
    parameters = [*kernel.parameters(), *likelihood.parameters()]

    def loss() -> Tensor:
        evidence = log_marginal_likelihood(covariance(kernel, z) * same, y[:, None], likelihood.noise[..., 0])
        prior = (curved.base_kernel.lengthscale.log() - 0.5 * math.log(d)).square().sum()
        value = (prior - evidence) / len(y)
        value.backward()
        return value.detach()

    lbfgs(loss, parameters, STEPS, lambda value: None)
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None
    return kernel, likelihood
