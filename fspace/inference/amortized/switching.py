"""Switching linear dynamics: a hidden Markov state says which linear system moves the latents.

    s_t ~ Markov,   z_t = A_s z_t-1 + b_s + N(0, Q_s) with s = s_t,   y_t = C z_t + d + N(0, R),   z_0 ~ N(m, P)
Given the states, z is linear and Gaussian: a particle carries its state and the Kalman filter's mean and covariance, so
that only states are sampled (Rao-Blackwellised). They are proposed from p(s_t | s_t-1, y_1:t), fully adapted, and the
weight of a particle is p(y_t | its past).
A sampled state has no pathwise gradient. What is climbed is the log joint density of the particles' paths and y, by
their final weights: its gradient is that of log p(y) as the particles grow (Fisher's identity), which that of the log
evidence with the states held fixed is not. With relaxed states (Concrete), the log evidence itself is climbed.
Sources: Doucet, de Freitas, Murphy and Russell (2000), Rao-Blackwellised particle filtering; Maddison et al. (2017),
filtering variational objectives; Maddison, Mnih and Teh (2017), the Concrete distribution; Fong, Godsill, Doucet and
West (2002), smoothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks, smc
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.concrete import Concrete
from fspace.inference.amortized.kalman import Updated, drawn, predicted, updated
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.proposals import gumbel
from fspace.inference.amortized.resampling import inverse_cdf
from fspace.inference.amortized.series import parts_of
from fspace.inference.amortized.switching_start import Regressions, regressions, scores
from fspace.inference.amortized.training import Rows, Step, plan_of, train
from fspace.inference.amortized.vae import TEMPERATURES
from fspace.inference.numerics import seeded
from fspace.predictive import check_count, generator_for
from fspace.sampled import Samples

OBJECTIVES = ("marginal", "concrete")
SMALLEST = 1e-6  # variance of y given z, relative to that of y
NOISE = 0.002  # variance of y given z at the start, beside what the components leave
FORECASTS = 200  # paths of a forecast
REACH = 1.0  # of the relaxed proposal from its prior, in logits, at the start
AT_ONCE = 8  # series smoothed at once


class SwitchingLinear(AmortizedModel):
    """Switching linear dynamical system of series [T, p] or [T], or a list of them of any lengths.

    components: number of linear systems; latents: dimensions of z; objective: "marginal" (states are sampled) or
    "concrete" (relaxed in training; what is reported is always of the model with discrete states); particles: of the
    filter in training.
    """

    likelihood = "gaussian"  # of y given z

    def __init__(
        self,
        components: int = 3,
        latents: int = 2,
        objective: str = "marginal",
        particles: int = 16,
        device: str = "auto",
    ):
        super().__init__()
        if objective not in OBJECTIVES:
            raise OptionError(
                f"objective={objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}."
            )
        for name, value in (("components", components), ("latents", latents), ("particles", particles)):
            checks.count(value, name)
        self.components, self.latents, self.objective = components, latents, objective
        self.particles, self.device = particles, device

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Rows:
        """Series padded to one length: y [s, T, p] and lengths [s]."""
        series = [_series(y, k) for k, y in enumerate(data if isinstance(data, list) else [data])]
        if not series:
            raise DataError("There is no series.")
        widths = {y.shape[1] for y in series}
        if len(widths) > 1:
            raise DataError(f"Series differ in the columns of a step: {sorted(widths)}.")
        longest = max(len(y) for y in series)
        y = torch.stack([nn.functional.pad(y, (0, 0, 0, longest - len(y))) for y in series])
        return y, torch.tensor([len(y) for y in series])

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"columns": rows[0].shape[-1]}

    def build(self, shape: dict[str, Any]) -> None:
        p, k, latents = shape["columns"], self.components, self.latents
        number = lambda *size: nn.Parameter(torch.zeros(*size, dtype=torch.float64))  # noqa: E731
        self.initial_logits, self.transition_logits = number(k), number(k, k)
        self.a, self.b, self.log_q = number(k, latents, latents), number(k, latents), number(k, latents)
        self.z_mean, self.z_log_variance = number(latents), number(latents)
        self.emission = nn.Linear(latents, p).double()
        self.log_r = number(p)
        self.log_reach = nn.Parameter(torch.tensor(REACH, dtype=torch.float64).log())
        self.register_buffer("y_shift", torch.zeros(p, dtype=torch.float64))
        self.register_buffer("y_scale", torch.ones(p, dtype=torch.float64))

    @torch.no_grad()
    def begin(self, rows: Rows) -> None:
        """Scale of y; emission along principal components, dynamics of the states by regressions of their scores.

        Of the several optima of these, the one under which y itself is most probable."""
        y, lengths = rows
        series = [each[:length] for each, length in zip(y, lengths.tolist())]
        values = torch.cat(series)
        spread = values.std(0, correction=0)
        self.y_shift, self.y_scale = values.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread))
        scaled = [(each - self.y_shift) / self.y_scale for each in series]
        z = scores(scaled, self.latents)
        every, target = torch.cat(z), torch.cat(scaled)
        gram = every.mT @ every + torch.eye(self.latents, dtype=y.dtype, device=y.device)
        weight = torch.linalg.solve(gram, every.mT @ target)
        self.emission.weight.copy_(weight.mT)
        self.emission.bias.zero_()
        # the components take their part of the noise too
        free = max(y.shape[-1] - self.latents, 1) / y.shape[-1]
        self.log_r.copy_(((target - every @ weight).square().mean(0) / free + NOISE).log())
        generator = torch.Generator(y.device)
        starts = regressions(z, self.components, generator.manual_seed(0))
        worth = []
        for start in starts:
            self._start(start)
            worth.append(
                self._filtered(rows, self.particles, generator.manual_seed(0)).log_evidence.sum().item()
            )
        self._start(starts[int(np.argmax(worth))])

    def _start(self, found: Regressions) -> None:
        self.a.copy_(found.a)
        self.b.copy_(found.b)
        noise = self.log_r.exp().mean()  # twice in a difference of scores, which q took for its own
        self.log_q.copy_(torch.maximum(found.q - noise, 0.3 * found.q).log())
        self.transition_logits.copy_(found.transition.log())

    def fit(self, data: Any, **plan: Any) -> Any:
        """Train; a single series judges itself (there is no other). Keywords as in `training.Plan`."""
        how, rows = plan_of(plan), self.prepare(data)
        with seeded(how.seed):
            self._make(self.shape_of(rows))
        rows = tuple(r.to(self.where) for r in rows)
        self.history_ = train(self, rows, how, judged=rows if len(rows[0]) == 1 else None)
        return self

    # -- the filter --------------------------------------------------------------------------------------------

    def _seen(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Updated:
        """z ~ N(mean, covariance) after y."""
        error = (y - self.y_shift) / self.y_scale - self.emission(mean)
        found = updated(mean, covariance, error, self.emission.weight, self.log_r.exp() + SMALLEST)
        return found._replace(log_density=found.log_density - self.y_scale.log().sum())

    def _each(self, state: dict[str, Tensor], y: Float[Tensor, "b p"]) -> Updated:
        """One step by every linear system: Updated with a dimension [N, B, k] more."""
        mean, covariance = state["mean"][:, :, None], state["covariance"][:, :, None]
        return self._seen(*predicted(mean, covariance, self.a, self.b, self.log_q.exp()), y[:, None])

    def _first(self, n: int, y: Float[Tensor, "b p"]) -> Updated:
        """The first step, which no system has moved: the same for all n particles."""
        covariance = self.z_log_variance.exp().diag().expand(len(y), -1, -1)
        found = self._seen(self.z_mean.expand(len(y), -1), covariance, y)
        return Updated(*(part.expand(n, *part.shape) for part in found))

    def _filtered(
        self, rows: Rows, particles: int, generator: torch.Generator, history: bool = False
    ) -> smc.Filtered:
        """The filter with sampled states. A particle is s, mean and covariance of z, and the log joint of its path."""
        initial, move = self.initial_logits.log_softmax(0), self.transition_logits.log_softmax(1)

        def init(n: int, y: Tensor, noise: Any) -> tuple[Any, Tensor]:
            moved = self._first(n, y)
            s = _picked(initial.expand(n, len(y), -1), generator)
            joint = initial[s] + moved.log_density
            state = {"s": s, "mean": moved.mean, "covariance": moved.covariance, "joint": joint}
            return state, moved.log_density

        def step(state: Any, y: Tensor, t: int, noise: Any) -> tuple[Any, Tensor]:
            moved = self._each(state, y)
            each = move[state["s"]] + moved.log_density
            s = _picked(each, generator)

            def pick(leaf: Tensor) -> Tensor:
                index = s.reshape(*s.shape, *[1] * (leaf.ndim - 2))
                return leaf.gather(2, index.expand(*s.shape, 1, *leaf.shape[3:]))[:, :, 0]

            joint = state["joint"] + pick(each)
            state = {"s": s, "mean": pick(moved.mean), "covariance": pick(moved.covariance), "joint": joint}
            return state, each.logsumexp(-1)

        return self._run(init, step, rows, particles, generator, history)

    def _relaxed(self, rows: Rows, particles: int, generator: torch.Generator) -> smc.Filtered:
        """The filter with relaxed states: systems are averaged by them, proposal and prior are both Concrete.

        The proposal goes some way from the prior to p(s_t | s_t-1, y_1:t), and learns how far: what y rules out costs
        a discrete proposal nothing, a relaxed one as many nats as the logits are apart."""
        hot, cold = TEMPERATURES

        def init(n: int, y: Tensor, noise: Any) -> tuple[Any, Tensor]:
            moved = self._first(n, y)
            logits = self.initial_logits.log_softmax(0).expand(n * len(y), -1)
            soft = Concrete(logits, cold).sample(1, generator)[0].exp().reshape(n, len(y), -1)
            return {"soft": soft, "mean": moved.mean, "covariance": moved.covariance}, moved.log_density

        def step(state: Any, y: Tensor, t: int, noise: Any) -> tuple[Any, Tensor]:
            logits, reach = (state["soft"] @ self.transition_logits.softmax(1)).log(), self.log_reach.exp()
            told = (logits + self._each(state, y).log_density).log_softmax(-1) - logits
            prior = Concrete(logits.flatten(0, 1), cold)
            proposal = Concrete((logits + reach * torch.tanh(told / reach)).flatten(0, 1), hot)
            value = proposal.sample(1, generator)
            soft = value[0].exp().reshape(logits.shape)
            mixed = [
                torch.einsum("nbk,k...->nb...", soft, leaf) for leaf in (self.a, self.b, self.log_q.exp())
            ]
            moved = self._seen(*predicted(state["mean"], state["covariance"], *mixed), y)
            ratio = (prior.log_prob(value) - proposal.log_prob(value)).reshape(soft.shape[:2])
            state = {"soft": soft, "mean": moved.mean, "covariance": moved.covariance}
            return state, moved.log_density + ratio

        return self._run(init, step, rows, particles, generator, history=False)

    def _run(
        self, init: Any, step: Any, rows: Rows, particles: int, generator: torch.Generator, history: bool
    ) -> smc.Filtered:
        y, lengths = rows
        y = y[:, : int(lengths.max())].transpose(0, 1)
        return smc.filter(init, step, y, lengths, particles, generator=generator, history=history)

    def _fisher(self, found: smc.Filtered) -> Float[Tensor, " s"]:
        """Log joint density of the paths and y, by the paths' weights; its gradient estimates that of log p(y)."""
        return (found.log_weights_by_step[-1].softmax(0) * found.states[-1]["joint"]).sum(0)

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        if self.objective == "concrete":
            with torch.no_grad():
                hard = self._filtered(rows, self.particles, generator).log_evidence
            ascent = self._relaxed(rows, self.particles, generator).log_evidence
        else:
            found = self._filtered(rows, self.particles, generator)
            hard = found.log_evidence.detach()
            ascent = self._fisher(found)
        return Step(hard, [(ascent.sum() / rows[1].sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " s"]:
        """Log evidence with sampled states, per step."""
        return self._filtered(rows, self.particles, generator).log_evidence / rows[1]

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 128, seed: int | None = 0) -> dict[str, Float[Tensor, " s"]]:
        """Bounds of every series by so many particles (nats): "fivo" of the model with discrete states, and "relaxed",
        the one that objective "concrete" climbs, which is no bound of that model."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        hard = self._filtered(rows, check_count(samples, 1), generator).log_evidence
        return {"fivo": hard, "relaxed": self._relaxed(rows, samples, generator).log_evidence}

    @torch.no_grad()
    def log_likelihood(self, data: Any, samples: int = 128, seed: int | None = 0) -> Float[Tensor, " s"]:
        """log p of every series (nats), by a filter of so many particles: a lower bound in expectation."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        return self._filtered(rows, check_count(samples, 1), generator).log_evidence

    @torch.no_grad()
    def encode(self, data: Any, particles: int = 128, seed: int | None = 0) -> Any:
        """Filtered means of z, [T, l] of a series; a list of these of a list."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        found = self._filtered(rows, particles, generator, history=True)
        means = torch.stack([state["mean"] for state in found.states])
        return parts_of((found.weights[..., None] * means).sum(1), rows[1], data)

    @torch.no_grad()
    def reconstruct(self, data: Any, particles: int = 128, seed: int | None = 0) -> Any:
        """Mean of y given the filtered z, [T, p]; a list of these of a list."""
        decode = lambda z: self.emission(z) * self.y_scale + self.y_shift  # noqa: E731
        found = self.encode(data, particles, seed)
        return [decode(z) for z in found] if isinstance(data, list) else decode(found)

    @torch.no_grad()
    def effective_sample_size(self, data: Any, particles: int = 128, seed: int | None = 0) -> Any:
        """Effective sample size along each series, [T]; a list of these of a list."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        return parts_of(self._filtered(rows, particles, generator).ess, rows[1], data)

    @torch.no_grad()
    def state_probabilities(
        self, data: Any, particles: int = 100, paths: int = 100, seed: int | None = 0
    ) -> Any:
        """p(s_t | all of y) [T, k] of a series, by paths drawn backwards; a list of these of a list."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        check_count(paths, 1)
        found = []
        for part in zip(*(r.split(AT_ONCE) for r in rows)):
            s = self._paths(self._filtered(part, particles, generator, history=True), paths, generator)
            share = nn.functional.one_hot(s, self.components).double().mean(1)
            found += parts_of(share, part[1], [])
        return found if isinstance(data, list) else found[0]

    def states(self, data: Any, particles: int = 100, paths: int = 100, seed: int | None = 0) -> Any:
        """The most probable state of every step given all of y, [T]; a list of these of a list."""
        found = self.state_probabilities(data, particles, paths, seed)
        return [each.argmax(-1) for each in found] if isinstance(data, list) else found.argmax(-1)

    def _paths(self, found: smc.Filtered, paths: int, generator: torch.Generator) -> Int[Tensor, "T m b"]:
        """States of paths drawn given all of y: backwards, each with a z of its own drawn from its particle's
        Gaussian, conditioned on the z that followed."""
        move = self.transition_logits.log_softmax(1)
        steps, series = len(found.states), len(found.lengths)
        uniforms = torch.rand(
            steps, paths, series, dtype=torch.float64, generator=generator, device=self.where
        )
        last = found.states[-1]
        index = inverse_cdf(found.log_weights_by_step[-1].softmax(0), uniforms[-1])
        s = smc.gather(last["s"], index)
        z = drawn(smc.gather(last["mean"], index), smc.gather(last["covariance"], index), generator)
        path = [s]
        for t in range(steps - 1, 0, -1):
            state, moves = found.states[t - 1], t < found.lengths
            a, b, q = self.a[s], self.b[s], self.log_q[s].exp()
            means, covariances = state["mean"][:, None], state["covariance"][:, None]
            ahead = updated(means, covariances, z - predicted(means, covariances, a, b, q)[0], a, q)
            density = ahead.log_density + move[state["s"][:, None], s]
            density = density + found.log_weights_by_step[t - 1][:, None]
            index = inverse_cdf(density.softmax(0), uniforms[t - 1][None])[0].clamp(max=len(density) - 1)
            mean, covariance = smc.gather(state["mean"], index), smc.gather(state["covariance"], index)
            chosen = updated(mean, covariance, z - predicted(mean, covariance, a, b, q)[0], a, q)
            before = drawn(chosen.mean, chosen.covariance, generator)
            s, z = (
                torch.where(moves, smc.gather(state["s"], index), s),
                torch.where(moves[:, None], before, z),
            )
            path.append(s)
        return torch.stack(path[::-1])

    # -- what comes next ---------------------------------------------------------------------------------------

    def _simulated(
        self, s: Int[Tensor, " n"], z: Float[Tensor, "n l"], steps: int, generator: torch.Generator
    ) -> Float[Tensor, "n t p"]:
        """Means of y along paths that go on from s and z."""
        move, means = self.transition_logits.softmax(1), []
        for _ in range(steps):
            s = torch.multinomial(move[s], 1, generator=generator)[:, 0]
            white = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            z = (self.a[s] @ z[..., None])[..., 0] + self.b[s] + (0.5 * self.log_q[s]).exp() * white
            means.append(self.emission(z) * self.y_scale + self.y_shift)
        return torch.stack(means, dim=1)

    @property
    def noise_variance(self) -> Float[Tensor, " p"]:
        """Variance of y given z, in squared units of y."""
        return (self.log_r.detach().exp() + SMALLEST) * self.y_scale.square()

    @torch.no_grad()
    def forecast(self, data: Any, horizon: int, seed: int | None = 0) -> Samples:
        """The next values of one series, [horizon, p], given what it was; samples are whole paths."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        if len(rows[0]) != 1:
            raise DataError("forecast takes one series at a time.")
        found = self._filtered(rows, FORECASTS, generator)
        weights = found.log_weights_by_step[-1][:, 0].softmax(0)
        picked = torch.multinomial(weights, FORECASTS, replacement=True, generator=generator)
        state = {name: leaf[picked, 0] for name, leaf in found.states[-1].items()}
        z = drawn(state["mean"], state["covariance"], generator)
        means = self._simulated(state["s"], z, check_count(horizon, 1), generator)
        return Samples(means, self.noise_variance.expand(horizon, -1))

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, steps: int = 100) -> Float[Tensor, "n t p"]:
        """n new series."""
        generator, steps = generator_for(seed, self.where), check_count(steps, 1)
        first = self.initial_logits.softmax(0)
        s = torch.multinomial(first, check_count(n, 1), replacement=True, generator=generator)
        z = drawn(self.z_mean.expand(n, -1), self.z_log_variance.exp().diag().expand(n, -1, -1), generator)
        means = (self.emission(z) * self.y_scale + self.y_shift)[:, None]
        if steps > 1:
            means = torch.cat([means, self._simulated(s, z, steps - 1, generator)], dim=1)
        white = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        return means + self.noise_variance.sqrt() * white


def _picked(logits: Float[Tensor, "n b k"], generator: torch.Generator) -> Int[Tensor, "n b"]:
    return (logits.detach() + gumbel(logits, 1, generator)[0]).argmax(-1)


def _series(y: Any, k: int) -> Float[Tensor, "T p"]:
    y = numbers(y, f"The steps of series {k}", np.float64)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or len(y) < 2:
        raise DataError(f"Series {k} must be [T] or [T, p] with at least two steps; it is {list(y.shape)}.")
    bad = ~y.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(f"Series {k}: step {int(bad.nonzero()[0])} holds NaN or infinite values.")
    return y
