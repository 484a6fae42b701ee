"""Contextual bandits whose memory is a site: a choice and an update cost the same at step ten and at step ten million.

All arms share a basis; the reward of arm a is output a of one posterior, and what was seen of an arm adds to that
output's natural parameters. With `linear_basis` the posterior is Bayesian linear regression of every arm, so that
Thompson sampling and UCB on it are linear Thompson sampling (Agrawal and Goyal 2013) and LinUCB (Li et al. 2010); with
the basis of a fitted GP they are those of a sparse GP.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from gpytorch.kernels import LinearKernel
from jaxtyping import Float, Int
from torch import Tensor

from fspace.decisions.journal import Journal
from fspace.decisions.sources import check_number
from fspace.errors import DataError, ModelFileError, OptionError, UtilityError
from fspace.inference.basis import Basis
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.optimise import MIN_NOISE, gaussian_likelihood
from fspace.predictive import as_tensor, generator_for
from fspace.predictive_base import check_whole

POLICIES = ("thompson", "ucb", "greedy", "uniform")
DRAWS = 1024  # behind Thompson sampling's probabilities


class Moments(NamedTuple):
    """Mean and standard deviation of the expected reward of every arm: [n, arms]."""

    mean: Float[Tensor, "n a"]
    stddev: Float[Tensor, "n a"]


@runtime_checkable
class Arms(Protocol):
    """What a bandit knows about the rewards of its arms."""

    arms: int

    def moments(self, contexts: Float[Tensor, "n d"]) -> Moments:
        """What is known of the expected reward of every arm, not of the noise."""
        ...

    def update(
        self, contexts: Float[Tensor, "n d"], arms: Int[Tensor, " n"], rewards: Float[Tensor, " n"]
    ) -> None:
        """Take in rewards."""
        ...


def linear_basis(width: int, prior_variance: float = 1.0, noise: float = 0.1) -> Basis:
    """The basis of Bayesian linear regression with an intercept: contexts [n, width], N(0, prior_variance) weights.

    noise: variance of a reward given its arm and context, at least 1e-6. Raises OptionError.
    """
    width = check_whole("width", width)
    prior_variance = check_number(prior_variance, "prior_variance", "be a positive number", 0.0)
    noise = check_number(noise, "noise", f"be a number of at least {MIN_NOISE:g}", least=MIN_NOISE)
    kernel = LinearKernel().double()
    kernel.variance = torch.tensor([[prior_variance]], dtype=torch.float64)
    likelihood = gaussian_likelihood(1, noise, torch.device("cpu"))
    likelihood.noise = torch.tensor([[noise]], dtype=torch.float64)
    # unit vectors span all linear functions of (x, 1); the last input is the constant that the contexts are given
    return Basis(kernel.requires_grad_(False), torch.eye(width + 1, dtype=torch.float64), likelihood)


class ArmPosterior:
    """One site an arm on a shared basis: O(m^3) time a batch of updates and O(arms m^2) memory, for ever.

    basis: of one output; its likelihood's noise is that of rewards. mean: prior mean of every reward. reward_scale:
    units of the rewards in those of the basis (its prior variance is that of reward / reward_scale).
    """

    def __init__(self, basis: Basis, arms: int, mean: float = 0.0, reward_scale: float = 1.0):
        if not isinstance(basis, Basis):
            raise OptionError(f"basis={basis!r}: pass `linear_basis(width)`, or the Basis of a fitted GP.")
        self.basis, self.arms = basis, check_whole("arms", arms, 2)
        self.mean = check_number(mean, "mean", "be a number")
        self.reward_scale = check_number(reward_scale, "reward_scale", "be above 0", 0.0)
        self.constant = isinstance(basis.kernel, LinearKernel)
        m = basis.inducing_inputs.shape[0]
        self.precision = basis.factor.new_zeros(arms, m, m)
        self.shift = basis.factor.new_zeros(arms, m)
        self._refresh(range(arms))

    def _refresh(self, arms: Sequence[int]) -> None:
        m = self.shift.shape[-1]
        if not hasattr(self, "_inner"):
            self._inner = torch.eye(m, dtype=self.shift.dtype, device=self.shift.device).repeat(
                self.arms, 1, 1
            )
        pick = torch.tensor(list(arms), device=self.shift.device)
        eye = torch.eye(m, dtype=self.shift.dtype, device=self.shift.device)
        self._inner[pick] = cholesky(eye + self.precision[pick], "I + site precision of an arm")[0]
        self._mean_weights = solve_lower(self._inner, self.shift[..., None])

    def _whitened(self, contexts: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m n"], Float[Tensor, " n"]]:
        if self.constant:
            if contexts.shape[1] != self.basis.inducing_inputs.shape[1] - 1:
                raise DataError(
                    f"A context has {contexts.shape[1]} numbers, but the arms know "
                    f"{self.basis.inducing_inputs.shape[1] - 1}."
                )
            contexts = torch.cat([contexts, torch.ones_like(contexts[:, :1])], -1)
        z = self.basis.embed(contexts)
        return self.basis.whiten(z), self.basis.prior_variance(z)

    @torch.no_grad()
    def moments(self, contexts: Float[Tensor, "n d"]) -> Moments:
        """Mean and standard deviation of the expected reward of every arm."""
        v, prior = self._whitened(contexts)
        w = solve_lower(self._inner, v.expand(self.arms, *v.shape))
        mean = (w.mT @ self._mean_weights)[..., 0].mT
        variance = (prior - v.square().sum(0)).clamp(min=0.0)[:, None] + w.square().sum(-2).mT
        return Moments(mean * self.reward_scale + self.mean, variance.sqrt() * self.reward_scale)

    @torch.no_grad()
    def inducing_draw(self, generator: torch.Generator) -> Float[Tensor, "a m"]:
        """One draw of every arm's expected reward at the inducing inputs (`linear_basis`: weights, constant last)."""
        white = torch.randn(self.shift.shape, generator=generator, dtype=self.shift.dtype)
        white = self._mean_weights + white.to(self.shift)[..., None]
        v = torch.linalg.solve_triangular(self._inner.mT, white, upper=True)[..., 0]
        return v @ self.basis.factor.mT * self.reward_scale + self.mean

    @torch.no_grad()
    def update(
        self, contexts: Float[Tensor, "n d"], arms: Int[Tensor, " n"], rewards: Float[Tensor, " n"]
    ) -> None:
        """Add what rewards say to the sites of their arms."""
        v, _ = self._whitened(contexts)
        target = (rewards - self.mean) / self.reward_scale
        noise = self.basis.noise[0]
        seen = arms.unique().tolist()
        for arm in seen:
            mine = arms == arm
            self.precision[arm] += v[:, mine] @ v[:, mine].mT / noise
            self.shift[arm] += v[:, mine] @ target[mine] / noise
        self._refresh(seen)

    @torch.no_grad()
    def grow(self, contexts: Float[Tensor, "n d"]) -> None:
        """More inducing inputs: what was seen so far says nothing about them beyond what it says of the old ones."""
        before, new = self.shift.shape[-1], self.basis.embed(contexts)
        self.basis = self.basis.grown(new)
        self.precision = torch.nn.functional.pad(self.precision, (0, len(new), 0, len(new)))
        self.shift = torch.nn.functional.pad(self.shift, (0, len(new)))
        inner = torch.eye(before + len(new), dtype=self.shift.dtype, device=self.shift.device)
        self._inner, old = inner.repeat(self.arms, 1, 1), self._inner
        self._inner[:, :before, :before] = old  # the new coordinates are whitened: nothing is known of them
        self._mean_weights = torch.nn.functional.pad(self._mean_weights, (0, 0, 0, len(new)))


class Choice(NamedTuple):
    """A decision to act on: its number (to tell the reward by), the arm, and the probability that it was taken with."""

    id: int
    arm: int
    probability: float


class Bandit:
    """Chooses arms and learns from rewards, which may come late, in batches, in any order, or never.

    arms: what is known about rewards (`ArmPosterior`, `NeuralLinear`). policy: "thompson" (an arm with the probability
    that it is the best), "ucb" (mean + width standard deviations), "greedy", or "uniform". journal: a file; what
    `choose` and `tell` have returned from is in it, and a new Bandit on the same file goes on from there.
    """

    def __init__(
        self,
        arms: Arms,
        policy: Any = "thompson",
        width: float = 2.0,
        journal: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ):
        if not isinstance(policy, str) or policy not in POLICIES:
            raise OptionError(f"policy={policy!r} does not exist; choose one of {', '.join(POLICIES)}.")
        if not isinstance(arms, Arms):
            raise OptionError(f"arms={arms!r}: pass what is known of rewards, such as GPArms(width, arms).")
        width = check_number(width, "width", "be a number of standard deviations, 0 or more", least=0.0)
        self.known, self.policy, self.width = arms, policy, width
        self.pending: dict[int, tuple[list[float], int]] = {}
        self.told, self._next = 0, 0
        self.journal = None if journal is None else Journal(journal)
        self._generator = generator_for(seed, torch.device("cpu"))
        if self.journal is not None:
            self._replay(self.journal)
            self._generator.manual_seed(
                (seed + 1_000_003 * self._next) % 2**32
            )  # goes on, and not from the start

    def _replay(self, journal: Journal) -> None:
        contexts, arms, rewards = [], [], []
        line = 0
        try:
            for entry in journal.entries:
                line += 1
                if "context" in entry:
                    if not entry["arm"] < self.known.arms:
                        raise OptionError(
                            f"The journal has a choice of arm {entry['arm']}, but the bandit has {self.known.arms} "
                            "arms: it is another bandit's."
                        )
                    self.pending[int(entry["id"])] = (
                        _double([entry["context"]])[0].tolist(),
                        int(entry["arm"]),
                    )
                    self._next = max(self._next, entry["id"] + 1)
                else:
                    context, arm = self.pending.pop(entry["id"])
                    contexts.append(context)
                    arms.append(arm)
                    rewards.append(check_number(entry["reward"], "reward", "be a finite number"))
            seen = _double(contexts)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, OptionError) and "another bandit" in str(error):
                raise
            raise ModelFileError(
                f"{str(journal.path)!r}, line {line}, is no line of a bandit's journal ({error!r})."
            ) from error
        self.told = len(rewards)
        if rewards:
            self.known.update(seen, torch.tensor(arms), _double(rewards))

    def probabilities(self, contexts: Any) -> Float[Tensor, "n a"]:
        """Probability with which the policy takes each arm (of Thompson sampling estimated by draws, at least one of
        which is given to every arm so that none is impossible)."""
        contexts = self._contexts(contexts)
        n, a = len(contexts), self.known.arms
        if self.policy == "uniform":
            return torch.full((n, a), 1.0 / a, dtype=torch.float64)
        at = self.known.moments(contexts)
        if self.policy != "thompson":
            width = self.width if self.policy == "ucb" else 0.0
            best = (at.mean + width * at.stddev).argmax(-1)
            return torch.nn.functional.one_hot(best, a).to(torch.float64)
        draws = at.mean + at.stddev * torch.randn(
            DRAWS, n, a, generator=self._generator, dtype=torch.float64
        ).to(at.mean)
        wins = torch.nn.functional.one_hot(draws.argmax(-1), a).sum(0)
        return (wins + 1.0).to("cpu", torch.float64) / (DRAWS + a)

    def choose(self, context: Any, propensity: bool = True) -> Choice:
        """The arm for one context [d]. propensity: whether to estimate the probability it is taken with (for
        `off_policy_value`), which Thompson sampling does not need to act; without, it is NaN."""
        try:
            contexts = self._contexts([np.asarray(context, dtype=np.float64)])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"A context must be finite numbers [d]; it is {context!r}.") from error
        if self.policy == "uniform" or propensity:
            shares = self.probabilities(contexts)[0]
            arm = int(torch.multinomial(shares, 1, generator=self._generator))
            probability = float(shares[arm])
        else:
            at = self.known.moments(contexts)
            noise = torch.randn(at.mean.shape, generator=self._generator, dtype=torch.float64).to(at.mean)
            width: Any = {"thompson": noise, "ucb": self.width, "greedy": 0.0}[self.policy]
            arm, probability = int((at.mean + width * at.stddev)[0].argmax()), math.nan
        choice = Choice(self._next, arm, probability)
        row = contexts[0].tolist()
        if self.journal is not None:
            self.journal.append({"id": choice.id, "context": row, "arm": arm, "probability": probability})
        self.pending[choice.id] = (row, arm)
        self._next += 1
        return choice

    def tell(self, ids: Any, rewards: Any) -> None:
        """Rewards [n] of earlier choices, by their ids [n].

        Raises DataError for a choice that is not waiting for one (told already, or never made), UtilityError for NaN;
        then nothing is taken in.
        """
        try:
            ids = [int(i) for i in ids]
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"ids must be the numbers of choices, [choice.id, ...]; they are {ids!r}."
            ) from error
        values = as_tensor(rewards, None, "rewards").to(torch.float64)
        if values.shape != (len(ids),):
            raise DataError(f"There are {len(ids)} ids for rewards of shape {tuple(values.shape)}.")
        if not bool(values.isfinite().all()):
            at = int((~values.isfinite()).nonzero()[0])
            raise UtilityError(
                f"The reward of choice {ids[at]} is {values[at].item()}; leave out what is not known."
            )
        unknown = [i for i in ids if i not in self.pending]
        if unknown or len(set(ids)) < len(ids):
            raise DataError(
                f"Choice {(unknown or ids)[0]} is not waiting for a reward: it was told already, twice here, or never "
                "made."
            )
        if not ids:
            return
        if self.journal is not None:
            self.journal.append(*({"id": i, "reward": r} for i, r in zip(ids, values.tolist(), strict=True)))
        seen = [self.pending.pop(i) for i in ids]
        contexts, arms = _double([row for row, _ in seen]), torch.tensor([arm for _, arm in seen])
        self.known.update(contexts, arms, values)
        self.told += len(ids)

    def _contexts(self, contexts: Any) -> Float[Tensor, "n d"]:
        rows = as_tensor(contexts, None, "the context").to(torch.float64)
        if rows.ndim != 2 or len(rows) == 0 or not bool(rows.isfinite().all()):
            raise DataError(
                f"A context must be finite numbers [d]; it has shape {tuple(rows.shape[1:])}, or holds NaN."
            )
        return rows


def _double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
