"""A state space whose transition is a sparse Gaussian process, trained by FIVO with an amortised proposal.

    z_t+1 = z_t + f(z_t, c_t) + N(0, Q),   y_t = C z_t + d + N(0, R),   z_0 ~ N(0, I),   f_l ~ GP(0, k)
Whitened inducing values v ~ q(v) make f: a particle carries its draw of v along the series, so that one function moves
it at every step; what v leaves open of f is independent from step to step and joins Q (as in FITC).
Of one series, the weights hold p(v) / q(v) and the log evidence of the filter bounds log p(y). Several series share f:
then all particles of a series carry one draw, and the bound is the sum of their log evidences less KL(q(v) || p(v)).
A draw of its own for every particle would there be no bound.
Sources: Maddison et al. (2017), filtering variational objectives; Ialongo et al. (2019), on dependent draws of f.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks, smc
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.series import parts_of
from fspace.inference.amortized.training import Rows, Step, plan_of, train
from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.numerics import cholesky_unseen, seeded, solve_lower
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.evaluate import covariance, diagonal
from fspace.predictive import Samples, check_count, generator_for

KERNELS = ("rbf", "matern", "linear")
FORECASTS = 200  # paths of a forecast


class Observation(NamedTuple):
    """What one step of the filter is shown: y [B, p], controls of the step before [B, q], message [B, l] twice."""

    y: Tensor
    before: Tensor
    mean: Tensor
    precision: Tensor


class GPStateSpace(AmortizedModel):
    """Gaussian-process state-space model of series, with or without controls.

    Data: one series or a list: y [T] or [T, p], or pairs (y, c) with controls c [T, q] of which c_t moves z_t to
    z_t+1. latents: dimensions of z; kernel of f: "rbf", "matern", "linear"; inducing: number of inducing inputs;
    particles: of the filter; hidden: size of the recurrent network that reads y backwards for the proposal.
    """

    likelihood = "gaussian"  # of y given z

    def __init__(
        self,
        latents: int = 2,
        kernel: str = "rbf",
        inducing: int = 30,
        particles: int = 16,
        hidden: int = 32,
        device: str = "auto",
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise OptionError(f"kernel={kernel!r} does not exist; choose one of {', '.join(KERNELS)}.")
        sizes = {"latents": latents, "inducing": inducing, "particles": particles, "hidden": hidden}
        for name, value in sizes.items():
            checks.count(value, name)
        self.latents, self.kernel, self.inducing, self.particles = latents, kernel, inducing, particles
        self.hidden, self.device = hidden, device

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Rows:
        """Series padded to one length: y [s, T, p], controls [s, T, q], lengths [s]."""
        one = not isinstance(data, list)
        series = [_series(each, k) for k, each in enumerate([data] if one else data)]
        if not series:
            raise DataError("There is no series.")
        widths = {(y.shape[1], c.shape[1]) for y, c in series}
        if len(widths) > 1:
            raise DataError(f"Series differ in the columns of y and of the controls: {sorted(widths)}.")
        longest = max(len(y) for y, _ in series)
        padded = [
            torch.stack([nn.functional.pad(part[i], (0, 0, 0, longest - len(part[i]))) for part in series])
            for i in (0, 1)
        ]
        return *padded, torch.tensor([len(y) for y, _ in series])

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"outputs": rows[0].shape[-1], "controls": rows[1].shape[-1]}

    def build(self, shape: dict[str, Any]) -> None:
        p, q, latents = shape["outputs"], shape["controls"], self.latents
        d = latents + q
        base: Kernel = LinearKernel() if self.kernel == "linear" else RBFKernel(ard_num_dims=d)
        if self.kernel == "matern":
            base = MaternKernel(nu=2.5, ard_num_dims=d)
        self.prior = (base if self.kernel == "linear" else ScaleKernel(base)).double()
        m = d if self.kernel == "linear" else self.inducing  # more would be linear in these
        number = lambda value: nn.Parameter(torch.as_tensor(value).double())  # noqa: E731
        self.inducing_inputs = number(torch.eye(d) if self.kernel == "linear" else 1.5 * torch.randn(m, d))
        self.v_mean = number(0.01 * torch.randn(latents, m))
        self.v_root = number(0.1 * torch.eye(m).expand(latents, m, m).clone())
        self.log_process_noise = number(torch.full((latents,), math.log(0.05)))
        self.log_noise = number(torch.full((p,), math.log(0.1)))
        self.emission = nn.Linear(latents, p).double()
        self.encoder = nn.GRU(p + q, self.hidden, batch_first=True).double()
        self.message = nn.Linear(self.hidden, 2 * latents).double()
        self.register_buffer("y_shift", torch.zeros(p, dtype=torch.float64))
        self.register_buffer("y_scale", torch.ones(p, dtype=torch.float64))

    def begin(self, rows: Rows) -> None:
        """Scales of y; the emission along the principal axes of y."""
        y, _, lengths = rows
        seen = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
        values = y[seen]
        spread = values.std(0, correction=0)
        self.y_shift, self.y_scale = values.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread))
        axes = torch.linalg.svd((values - self.y_shift) / self.y_scale, full_matrices=False)
        rank = min(self.latents, len(axes.S))
        with torch.no_grad():
            self.emission.weight[:, :rank] = axes.Vh[:rank].mT * axes.S[:rank] / len(values) ** 0.5
            self.emission.bias.zero_()
        self._series = len(y)

    # -- the model ---------------------------------------------------------------------------------------------

    def _root_of_v(self) -> Float[Tensor, "l m m"]:
        """Lower factor of the covariance of q(v), with a positive diagonal."""
        diagonal_ = self.v_root.diagonal(dim1=-2, dim2=-1).abs() + 1e-6
        return self.v_root.tril(-1) + torch.diag_embed(diagonal_)

    def divergence(self) -> Float[Tensor, ""]:
        """KL(q(v) || p(v)), over all outputs of f."""
        root = self._root_of_v()
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (root.square().sum() + self.v_mean.square().sum() - self.v_mean.numel() - log_det)

    def _factor(self) -> Float[Tensor, "m m"]:
        k = covariance(self.prior, self.inducing_inputs)
        return cholesky_unseen(k, "kernel matrix of the inducing inputs", FIRST_JITTER)[0]

    def _moved(
        self, factor: Tensor, z: Float[Tensor, "n b l"], c: Float[Tensor, "b q"], v: Float[Tensor, "n b l m"]
    ) -> tuple[Float[Tensor, "n b l"], Float[Tensor, "n b l"]]:
        """Mean and variance of the next state, of the particles' own functions."""
        inputs = torch.cat([z, c.expand(len(z), -1, -1)], dim=-1)
        flat = inputs.reshape(-1, inputs.shape[-1])
        a = solve_lower(factor, covariance(self.prior, self.inducing_inputs, flat))
        left = (diagonal(self.prior, flat) - a.square().sum(0)).clamp(min=0.0).reshape(*z.shape[:2], 1)
        mean = z + torch.einsum("nblm,nbm->nbl", v, a.mT.reshape(*z.shape[:2], -1))
        return mean, self.log_process_noise.exp() + left

    def _emitted(self, z: Tensor, y: Float[Tensor, "b p"]) -> Float[Tensor, "n b"]:
        """log p(y | z), in the units of y."""
        noise = self.log_noise.exp()
        error = (y - self.y_shift) / self.y_scale - self.emission(z)
        each = -0.5 * (error.square() / noise + noise.log() + math.log(2 * math.pi)) - self.y_scale.log()
        return each.sum(-1)

    def _observations(self, y: Tensor, c: Tensor, lengths: Tensor) -> Observation:
        """What the filter is shown, [T, B, ...]; the messages read the rest of the series from its end backwards."""
        scaled = torch.cat([(y - self.y_shift) / self.y_scale, c], dim=-1)
        time = torch.arange(y.shape[1], device=y.device)
        backwards = (lengths[:, None] - 1 - time).clamp(min=0)[..., None]
        read = lambda values: values.gather(1, backwards.expand(-1, -1, values.shape[-1]))  # noqa: E731
        hidden, _ = self.encoder(read(scaled))
        mean, log_precision = self.message(read(hidden)).chunk(2, dim=-1)
        before = torch.cat([torch.zeros_like(c[:, :1]), c[:, :-1]], dim=1)
        parts = (y, before, mean, log_precision.clamp(-12, 12).exp())
        return Observation(*(part.transpose(0, 1) for part in parts))

    def _filtered(
        self,
        rows: Rows,
        particles: int,
        generator: torch.Generator,
        own: bool,
        weighed: bool,
        history: bool = False,
    ) -> smc.Filtered:
        """The filter. own: every particle carries a function of its own; weighed: by p(v) / q(v)."""
        y, c, lengths = rows
        factor, root = self._factor(), self._root_of_v()
        kind: dict[str, Any] = {"generator": generator, "dtype": y.dtype, "device": y.device}

        def landed(mean: Tensor, variance: Tensor, seen: Observation) -> tuple[Tensor, Tensor]:
            """z from the transition's Gaussian times the message, and its weight."""
            precision = 1.0 / variance + seen.precision
            centre = (mean / variance + seen.precision * seen.mean) / precision
            z = centre + torch.randn(centre.shape, **kind) / precision.sqrt()
            prior = _gaussian(z - mean, variance)
            return z, prior - _gaussian(z - centre, 1.0 / precision) + self._emitted(z, seen.y)

        def init(n: int, seen: Observation, noise: Any) -> tuple[Any, Tensor]:
            series = len(seen.y)
            white = torch.randn(n if own else 1, series, *self.v_mean.shape, **kind)
            v = (self.v_mean + torch.einsum("lij,nblj->nbli", root, white)).expand(n, -1, -1, -1)
            zero = torch.zeros(n, series, self.latents, dtype=y.dtype, device=y.device)
            z, weight = landed(zero, torch.ones_like(zero), seen)
            if weighed:
                log_det = root.diagonal(dim1=-2, dim2=-1).log().sum()
                ratio = 0.5 * (white.square().sum((-2, -1)) - v.square().sum((-2, -1))) + log_det
                weight = weight + ratio
            return (z, v), weight

        def step(state: Any, seen: Observation, t: int, noise: Any) -> tuple[Any, Tensor]:
            z, v = state
            z, weight = landed(*self._moved(factor, z, seen.before, v), seen)
            return (z, v), weight

        shown = self._observations(y, c, lengths)
        return smc.filter(init, step, shown, lengths, particles, generator=generator, history=history)

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        alone = self._series == 1
        found = self._filtered(rows, self.particles, generator, own=alone, weighed=alone)
        bound = found.log_evidence - (0.0 if alone else self.divergence() / self._series)
        return Step(bound.detach(), [(bound.sum() / rows[2].sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " s"]:
        """log p of held-out series under functions from q, per step."""
        found = self._filtered(rows, self.particles, generator, own=True, weighed=False)
        return found.log_evidence / rows[2]

    # -- answers -----------------------------------------------------------------------------------------------

    def fit(self, data: Any, **plan: Any) -> Any:
        """Train; a single series judges itself (there is no other). transition_: the posterior of f."""
        rows = self.prepare(data)
        if len(rows[0]) == 1:
            return self._fit_alone(rows, plan)
        super().fit(data, **plan)
        self.transition_ = self._transition()
        return self

    def _fit_alone(self, rows: Rows, plan: dict[str, Any]) -> Any:
        how = plan_of(plan)
        with seeded(how.seed):
            self._make(self.shape_of(rows))
        rows = tuple(r.to(self.where) for r in rows)
        self.history_ = train(self, rows, how, judged=rows)
        self.transition_ = self._transition()
        return self

    @torch.no_grad()
    def _transition(self) -> GPPosterior:
        """The posterior of f(z, c), the change of the state."""
        kernel = copy.deepcopy(self.prior).eval().requires_grad_(False)
        likelihood = gaussian_likelihood(self.latents, 1.0, self.where).requires_grad_(False)
        likelihood.noise = self.log_process_noise.exp()[:, None].clamp(min=1e-6)
        basis = Basis(kernel, self.inducing_inputs.detach().clone(), likelihood)
        root = self._root_of_v()
        eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        whole = torch.cholesky_solve(eye.expand_as(root), root)
        site = Site(
            basis.id, whole - eye, (whole @ self.v_mean[..., None])[..., 0], root.new_zeros(self.latents), 0
        )
        d = self.inducing_inputs.shape[1]
        ones, zeros = torch.ones(d, dtype=root.dtype, device=root.device), root.new_zeros(d)
        scaling = Scaling(ones, ones, zeros, ones, root.new_zeros(self.latents), root.new_ones(self.latents))
        return GPPosterior(basis, site, scaling, vector=False)

    @torch.no_grad()
    def log_likelihood(self, data: Any, samples: int = 1000, seed: int | None = 0) -> Float[Tensor, " s"]:
        """log p of every series under q (nats), by that many particles, each with a function of its own; a lower bound
        in expectation."""
        rows = self.rows_like_fitted(data)
        generator = generator_for(seed, self.where)
        return self._filtered(rows, check_count(samples, 1), generator, own=True, weighed=False).log_evidence

    def bounds(self, data: Any, samples: int = 128, seed: int | None = 0) -> dict[str, Float[Tensor, " s"]]:
        """The bound of every series by so many particles (nats): "fivo"."""
        return {"fivo": self.log_likelihood(data, samples, seed)}

    @torch.no_grad()
    def effective_sample_size(self, data: Any, particles: int = 128, seed: int | None = 0) -> Any:
        """Effective sample size along each series, [T]; a list of these of a list."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        return parts_of(
            self._filtered(rows, particles, generator, own=True, weighed=False).ess, rows[2], data
        )

    @torch.no_grad()
    def encode(self, data: Any, particles: int = 200, seed: int | None = 0) -> Any:
        """Filtered means of the state: [T, l] of a series, a list of these of a list."""
        rows = self.rows_like_fitted(data)
        found = self._filtered(rows, particles, generator_for(seed, self.where), True, False, history=True)
        z = torch.stack([state[0] for state in found.states])  # [T, N, B, l]
        return parts_of((found.weights[..., None] * z).sum(1), rows[2], data)

    @torch.no_grad()
    def reconstruct(self, data: Any) -> Any:
        """Mean of y given the filtered state, [T, p]; a list of these of a list."""
        found = self.encode(data)
        decode = lambda z: self.emission(z) * self.y_scale + self.y_shift  # noqa: E731
        return [decode(z) for z in found] if isinstance(data, list) else decode(found)

    @torch.no_grad()
    def forecast(self, data: Any, horizon: int, controls: Any = None, seed: int | None = 0) -> Samples:
        """The next values of one series, [horizon, p], given what it was; samples are whole paths, each moved by one
        function throughout. controls [horizon, q]: of the steps from the last observation on."""
        rows = self.rows_like_fitted(data)
        if len(rows[0]) != 1:
            raise DataError("forecast takes one series at a time.")
        generator, horizon = generator_for(seed, self.where), check_count(horizon, 1)
        found = self._filtered(rows, FORECASTS, generator, own=True, weighed=False)
        weights = found.log_weights[int(rows[2]) - 1, :, 0].softmax(0)
        picked = torch.multinomial(weights, FORECASTS, replacement=True, generator=generator)
        z, v = (part[picked] for part in found.states[-1])
        steps = self._controls(controls, horizon, rows[1].shape[-1])
        return Samples(*self._paths(z, v, steps, generator))

    def _paths(
        self, z: Tensor, v: Tensor, controls: Float[Tensor, "h q"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "s h p"], Float[Tensor, "h p"]]:
        """Means of y along simulated states, and its noise, in the units of y."""
        factor, means = self._factor(), []
        for c in controls:
            mean, variance = self._moved(factor, z, c[None], v)
            white = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            z = mean + variance.sqrt() * white
            means.append(self.emission(z[:, 0]) * self.y_scale + self.y_shift)
        noise = (self.log_noise.exp() * self.y_scale.square()).expand(len(controls), -1)
        return torch.stack(means, dim=1), noise

    def _controls(self, controls: Any, horizon: int, q: int) -> Float[Tensor, "h q"]:
        if controls is None:
            controls = np.zeros((horizon, q))
        controls = torch.as_tensor(np.asarray(controls, dtype=np.float64)).to(self.where)
        controls = controls.reshape(len(controls), -1) if controls.ndim else controls
        if controls.shape != (horizon, q) or not bool(controls.isfinite().all()):
            raise DataError(
                f"controls must be finite numbers [{horizon}, {q}]; they are {list(controls.shape)}."
            )
        return controls

    @torch.no_grad()
    def sample(
        self, n: int = 1, seed: int | None = None, steps: int = 100, controls: Any = None
    ) -> Float[Tensor, "n t p"]:
        """n new series from q, each moved by one function throughout."""
        generator = generator_for(seed, self.where)
        kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": self.where}
        n, q = check_count(n, 1), self.shape_["controls"]
        white = torch.randn(n, 1, *self.v_mean.shape, **kind)
        v = self.v_mean + torch.einsum("lij,nblj->nbli", self._root_of_v(), white)
        z = torch.randn(n, 1, self.latents, **kind)
        first = self.emission(z[:, 0]) * self.y_scale + self.y_shift
        means, noise = first[:, None], self.log_noise.exp() * self.y_scale.square()
        if steps > 1:
            later, _ = self._paths(z, v, self._controls(controls, steps - 1, q), generator)
            means = torch.cat([means, later], dim=1)
        return means + noise.sqrt() * torch.randn(means.shape, **kind)


def _gaussian(error: Tensor, variance: Tensor) -> Tensor:
    """Log density, summed over the last dimension."""
    return -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)


def _series(data: Any, k: int) -> tuple[Float[Tensor, "T p"], Float[Tensor, "T q"]]:
    y, c = data if isinstance(data, tuple) else (data, None)
    y = numbers(y, f"The steps of series {k}", np.float64)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim == 0:
        raise DataError(f"Series {k} must be [T] or [T, p] with T at least 2; it is a single value.")
    c = (
        torch.zeros(len(y), 0).double()
        if c is None
        else numbers(c, f"The controls of series {k}", np.float64)
    )
    c = c[:, None] if c.ndim == 1 else c
    if y.ndim != 2 or c.ndim != 2 or len(y) != len(c) or len(y) < 2:
        raise DataError(
            f"Series {k}: y {list(y.shape)} must be [T] or [T, p] with T at least 2, controls {list(c.shape)} [T, q]."
        )
    for what, values in (("y", y), ("controls", c)):
        bad = ~values.isfinite().all(1)
        if bool(bad.any()):
            raise DataError(
                f"Series {k}: row {int(bad.nonzero()[0])} of {what} holds NaN or infinite values."
            )
    return y, c
