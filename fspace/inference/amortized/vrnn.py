"""The variational recurrent network, a VAE at every step of a series, trained by ELBO, IWAE or FIVO.

    z_t ~ p(z_t | h_t),   x_t ~ p(x_t | z_t, h_t),   h_t+1 = GRU(h_t, x_t, z_t),   proposal q(z_t | h_t, x_t)
A particle carries h and with it all that its latents were. The three bounds are one filter: with particles that are
resampled its log evidence is FIVO, without it is IWAE, and the mean of the particles' log weights is the ELBO.
Latents that are bits are relaxed (Concrete) in training, under both p and q; what is reported is of hard bits.
Sources: Chung et al. (2015), a recurrent latent variable model for sequential data; Maddison et al. (2017), filtering
variational objectives; Maddison, Mnih and Teh (2017), the Concrete distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import OptionError
from fspace.inference.amortized import checks, smc
from fspace.inference.amortized.concrete import BinaryConcrete
from fspace.inference.amortized.series import LIKELIHOODS, SeriesModel, log_gaussian, moments, parts_of
from fspace.inference.amortized.training import Rows, Step
from fspace.inference.amortized.vae import TEMPERATURES
from fspace.kernels.extractors import MLP
from fspace.predictive import check_count, generator_for

OBJECTIVES = ("elbo", "iwae", "fivo")
LATENTS = ("gaussian", "bits")


class VRNN(SeriesModel):
    """Variational recurrent network for series [T, p], or a list of them of any lengths.

    latents, hidden: sizes of z and h; objective: "fivo", "iwae" or "elbo"; particles: samples of each series; latent:
    "gaussian" or "bits"; likelihood: "bernoulli" (values 0 and 1) or "gaussian". Bounds are in nats, in the units of x.
    """

    def __init__(
        self,
        latents: int = 16,
        hidden: int = 32,
        objective: str = "fivo",
        particles: int = 4,
        latent: str = "gaussian",
        likelihood: str = "bernoulli",
        device: str = "auto",
    ):
        super().__init__()
        for name, value, known in (
            ("objective", objective, OBJECTIVES),
            ("latent", latent, LATENTS),
            ("likelihood", likelihood, LIKELIHOODS),
        ):
            if value not in known:
                raise OptionError(f"{name}={value!r} does not exist; choose one of {', '.join(known)}.")
        for name, size in (("latents", latents), ("hidden", hidden), ("particles", particles)):
            checks.count(size, name)
        self.latents, self.hidden, self.objective, self.particles = latents, hidden, objective, particles
        self.latent, self.likelihood, self.device = latent, likelihood, device

    def build(self, shape: dict[str, Any]) -> None:
        p, h, latents = shape["columns"], self.hidden, self.latents
        self.read_x, self.read_z = MLP(p, (h,), h), MLP(latents, (h,), h)
        numbers = 2 * latents if self.latent == "gaussian" else latents
        self.prior, self.proposal = MLP(h, (h,), numbers), MLP(2 * h, (h,), numbers)
        self.emission = MLP(2 * h, (h,), p if self.likelihood == "bernoulli" else 2 * p)
        self.cell = nn.GRUCell(2 * h, h)
        self.start = nn.Parameter(torch.zeros(h))
        self.remember(p)

    # -- the filter --------------------------------------------------------------------------------------------

    def _proposed(
        self, prior: Tensor, told: Tensor, generator: torch.Generator, relaxed: bool
    ) -> tuple[Float[Tensor, "n b l"], Float[Tensor, "n b"]]:
        """z drawn from the proposal, which says how far it is from the prior; and log p(z) - log q(z)."""
        if self.latent == "gaussian":
            (mean, variance), (shift, spread) = moments(prior), moments(told)
            white = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            z = mean + shift + spread.sqrt() * white
            return z, log_gaussian(z - mean, variance) - log_gaussian(z - mean - shift, spread)
        logits = prior + told
        if not relaxed:
            z = torch.bernoulli(logits.sigmoid(), generator=generator)
            mass = lambda each: -nn.functional.binary_cross_entropy_with_logits(each, z, reduction="none")  # noqa: E731
            return z, (mass(prior) - mass(logits)).sum(-1)
        hot, cold = TEMPERATURES
        q, p = BinaryConcrete(logits.flatten(0, 1), hot), BinaryConcrete(prior.flatten(0, 1), cold)
        value = q.sample(1, generator)
        ratio = (p.log_prob(value) - q.log_prob(value)).reshape(logits.shape[:2])
        return value[0].sigmoid().reshape(logits.shape), ratio

    def _read(self, z: Float[Tensor, "*b l"]) -> Float[Tensor, "*b h"]:
        return self.read_z(z if self.latent == "gaussian" else 2 * z - 1)

    def _filtered(
        self,
        rows: Rows,
        particles: int,
        criterion: str,
        generator: torch.Generator,
        history: bool = False,
        relaxed: bool = False,
    ) -> smc.Filtered:
        x, lengths = rows
        x = x[:, : int(lengths.max())]
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(there[..., None], x, 0.0).transpose(0, 1)
        read = self.read_x((x - self.x_shift) / self.x_scale)

        def landed(h: Tensor, total: Any, seen: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
            value, told = seen
            told = told.expand(len(h), -1, -1)
            z, ratio = self._proposed(
                self.prior(h), self.proposal(torch.cat([h, told], -1)), generator, relaxed
            )
            read_z = self._read(z)
            weight = self.density(value, self.emission(torch.cat([h, read_z], -1))) + ratio
            moved = self.cell(torch.cat([told, read_z], -1).flatten(0, 1), h.flatten(0, 1))
            return {"h": moved.reshape(h.shape), "before": h, "z": z, "total": total + weight}, weight

        def init(n: int, seen: Any, noise: Any) -> tuple[Any, Tensor]:
            return landed(self.start.expand(n, x.shape[1], -1), 0.0, seen)

        def step(state: Any, seen: Any, t: int, noise: Any) -> tuple[Any, Tensor]:
            return landed(state["h"], state["total"], seen)

        return smc.filter(
            init,
            step,
            (x, read),
            lengths,
            particles,
            criterion=criterion,
            generator=generator,
            history=history,
        )

    def _bound(
        self, rows: Rows, objective: str, particles: int, generator: torch.Generator, relaxed: bool = False
    ) -> Tensor:
        criterion = "ess" if objective == "fivo" else "never"
        found = self._filtered(rows, particles, criterion, generator, relaxed=relaxed)
        return found.states[-1]["total"].mean(0).double() if objective == "elbo" else found.log_evidence

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        if self.latent == "bits":
            with torch.no_grad():
                hard = self._bound(rows, self.objective, self.particles, generator)
            climbed = self._bound(rows, self.objective, self.particles, generator, relaxed=True)
            return Step(hard, [(climbed.sum() / rows[1].sum(), list(self.parameters()))])
        bound = self._bound(rows, self.objective, self.particles, generator)
        return Step(bound.detach(), [(bound.sum() / rows[1].sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " s"]:
        return self._bound(rows, self.objective, self.particles, generator) / rows[1]

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 128, seed: int | None = 0) -> dict[str, Float[Tensor, " s"]]:
        """ELBO, IWAE and FIVO of every series with so many particles (nats); of bits these are with hard values, and
        "relaxed" is what is climbed, which is no bound of the model with bits."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        found: dict[str, list[Tensor]] = {name: [] for name in OBJECTIVES}
        for part in zip(*(r.split(64) for r in rows)):
            for name in OBJECTIVES:
                found[name].append(self._bound(part, name, check_count(samples, 1), generator))
            if self.latent == "bits":
                soft = self._bound(part, self.objective, samples, generator, relaxed=True)
                found.setdefault("relaxed", []).append(soft)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def log_likelihood(self, data: Any, samples: int = 128, seed: int | None = 0) -> Float[Tensor, " s"]:
        """log p of every series (nats), by a filter of so many particles: a lower bound in expectation."""
        return self.bounds(data, samples, seed)["fivo"]

    @torch.no_grad()
    def _history(self, data: Any, particles: int, seed: int | None) -> tuple[Rows, smc.Filtered]:
        rows = self.rows_like_fitted(data)
        return rows, self._filtered(rows, particles, "ess", generator_for(seed, self.where), history=True)

    @torch.no_grad()
    def encode(self, data: Any, particles: int = 64, seed: int | None = 0) -> Any:
        """Filtered means of the latents, [T, l] of a series; a list of these of a list."""
        rows, found = self._history(data, particles, seed)
        z = torch.stack([state["z"] for state in found.states])
        return parts_of((found.weights[..., None] * z).sum(1), rows[1], data)

    @torch.no_grad()
    def reconstruct(self, data: Any, particles: int = 64, seed: int | None = 0) -> Any:
        """Mean of x given the filtered latents, [T, p]; a list of these of a list."""
        rows, found = self._history(data, particles, seed)
        means = [
            self.mean_of(self.emission(torch.cat([state["before"], self._read(state["z"])], -1)))
            for state in found.states
        ]
        return parts_of((found.weights[..., None] * torch.stack(means)).sum(1), rows[1], data)

    def effective_sample_size(self, data: Any, particles: int = 64, seed: int | None = 0) -> Any:
        """Effective sample size along each series, [T]; a list of these of a list."""
        rows, found = self._history(data, particles, seed)
        return parts_of(found.ess, rows[1], data)

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, steps: int = 100) -> Float[Tensor, "n t p"]:
        """n new series."""
        generator = generator_for(seed, self.where)
        h, found = self.start.expand(check_count(n, 1), -1), []
        kind: dict[str, Any] = {"generator": generator, "device": self.where}
        for _ in range(check_count(steps, 1)):
            if self.latent == "bits":
                z = torch.bernoulli(self.prior(h).sigmoid(), generator=generator)
            else:
                mean, variance = moments(self.prior(h))
                z = mean + variance.sqrt() * torch.randn(mean.shape, **kind)
            read_z = self._read(z)
            out = self.emission(torch.cat([h, read_z], -1))
            if self.likelihood == "bernoulli":
                x = torch.bernoulli(out.sigmoid(), generator=generator)
            else:
                white = torch.randn(len(h), len(self.x_shift), **kind)
                x = self.mean_of(out) + white * (0.5 * out.chunk(2, -1)[1]).exp() * self.x_scale
            found.append(x)
            told = self.read_x((x - self.x_shift) / self.x_scale)
            h = self.cell(torch.cat([told, read_z], -1), h)
        return torch.stack(found, dim=1)
