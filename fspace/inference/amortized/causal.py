"""A VAE of series by dilated causal convolutions: a latent at every step, and all steps computed at once.

    z_t ~ p(z_t | x_<t),   x_t ~ p(x_t | x_<t, z_<=t),   q(z_t | x_<=t)
The past enters prior and emission through a WaveNet of x one step late, the latents enter the emission through another,
and a third one is the encoder. The bound is sum_t E_q[log p(x_t | x_<t, z_<=t)] - KL(q(z_t | x_<=t) || p(z_t | x_<t)).
Sources: van den Oord et al. (2016), WaveNet; Lai et al. (2018), stochastic WaveNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.proposals import DiagonalGaussian
from fspace.inference.amortized.series import LIKELIHOODS, SeriesModel, log_gaussian, moments, parts_of
from fspace.inference.amortized.training import Rows, Step
from fspace.kernels.extractors import MLP, CausalConv
from fspace.predictive import check_count, generator_for

AT_ONCE = 16  # samples of a series held together


class Inferred(NamedTuple):
    """Features of the past [b, T, k], and means and variances of the prior and of q at every step [b, T, l]."""

    past: Tensor
    prior: tuple[Tensor, Tensor]
    posterior: tuple[Tensor, Tensor]


class CausalVAE(SeriesModel):
    """Variational autoencoder of WaveNet-style causal convolutions, for series [T, p] or a list of them of any lengths.

    latents: of every step; channels, dilations: of the convolutions, which look back sum(dilations) steps; samples: of
    each series; likelihood: "bernoulli" (values 0 and 1) or "gaussian". Bounds are in nats, in the units of x.
    """

    def __init__(
        self,
        latents: int = 8,
        channels: int = 32,
        dilations: Sequence[int] = (1, 2, 4, 8),
        samples: int = 1,
        likelihood: str = "bernoulli",
        device: str = "auto",
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise OptionError(
                f"likelihood={likelihood!r} does not exist; choose one of {', '.join(LIKELIHOODS)}."
            )
        sizes = {
            "latents": latents,
            "channels": channels,
            "samples": samples,
            "dilations": min(dilations, default=0),
        }
        for name, size in sizes.items():
            checks.count(size, name)
        self.latents, self.channels, self.dilations = latents, channels, list(dilations)
        self.samples, self.likelihood, self.device = samples, likelihood, device

    def build(self, shape: dict[str, Any]) -> None:
        p, k = shape["columns"], self.channels
        self.past = CausalConv(p, k, self.dilations, k)
        self.encoder = CausalConv(p, k, self.dilations, 2 * self.latents)
        self.carried = CausalConv(self.latents, k, self.dilations, k)
        self.prior = MLP(k, (k,), 2 * self.latents)
        self.emission = MLP(2 * k, (k,), p if self.likelihood == "bernoulli" else 2 * p)
        self.remember(p)

    # -- the model ---------------------------------------------------------------------------------------------

    def inferred(self, x: Float[Tensor, "b T p"]) -> Inferred:
        """Prior and q of all steps; nothing at step t is told of x after t, nor the prior of x at t."""
        scaled = (x - self.x_shift) / self.x_scale
        past = self.past.steps(nn.functional.pad(scaled, (0, 0, 1, 0))[:, :-1])
        mean, variance = moments(self.prior(past))
        moved, spread = moments(self.encoder.steps(scaled))  # q says how far from the prior
        return Inferred(past, (mean, variance), (mean + moved, spread))

    def emitted(self, past: Float[Tensor, "b T k"], z: Float[Tensor, "n b T l"]) -> Float[Tensor, "n b T q"]:
        """What the emission says of every step, given the past and the latents up to it."""
        carried = self.carried.steps(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return self.emission(torch.cat([past.expand(len(z), -1, -1, -1), carried], dim=-1))

    def _drawn(
        self, rows: Rows, samples: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x | z) and log-weights of samples [n, b], and KL(q || p) [b], each summed over the steps there are."""
        x, lengths = rows
        x = x[:, : int(lengths.max())]
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(there[..., None], x, 0.0)
        past, (mean, variance), (centre, spread) = self.inferred(x)
        kind: dict[str, Any] = {"generator": generator, "dtype": x.dtype, "device": x.device}
        z = centre + spread.sqrt() * torch.randn((samples, *centre.shape), **kind)
        fits = self.density(x, self.emitted(past, z))
        weights = fits + log_gaussian(z - mean, variance) - log_gaussian(z - centre, spread)
        ratio = spread / variance
        divergence = 0.5 * (ratio + (centre - mean).square() / variance - 1 - ratio.log()).sum(-1)
        fits, weights, divergence = (
            torch.where(there, part, 0.0).sum(-1) for part in (fits, weights, divergence)
        )
        return fits, weights, divergence

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        fits, _, divergence = self._drawn(rows, self.samples, generator)
        bound = fits.mean(0) - divergence
        return Step(bound.detach(), [(bound.sum() / rows[1].sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " s"]:
        return self.step(rows, generator).bound / rows[1]

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 64, seed: int | None = 0) -> dict[str, Float[Tensor, " s"]]:
        """ELBO, and IWAE with so many samples, of every series (nats)."""
        rows, generator = self.rows_like_fitted(data), generator_for(seed, self.where)
        check_count(samples, 1)
        elbo, total = [], []
        for part in zip(*(r.split(64) for r in rows)):
            found = [
                self._drawn(part, min(AT_ONCE, samples - done), generator)
                for done in range(0, samples, AT_ONCE)
            ]
            elbo.append(torch.cat([fits for fits, _, _ in found]).mean(0) - found[0][2])
            weights = torch.cat([weights for _, weights, _ in found]).double()
            total.append(weights.logsumexp(0) - math.log(samples))
        return {"elbo": torch.cat(elbo), "iwae": torch.cat(total)}

    def log_likelihood(self, data: Any, samples: int = 64, seed: int | None = 0) -> Float[Tensor, " s"]:
        """log p of every series (nats), by importance sampling: a lower bound in expectation."""
        return self.bounds(data, samples, seed)["iwae"]

    @torch.no_grad()
    def encode(self, data: Any) -> Any:
        """q(z_t | x_<=t) of a series, mean and std [T, l]; a list of these of a list."""
        x, lengths = self.rows_like_fitted(data)
        mean, variance = self.inferred(x).posterior
        pairs = zip(
            parts_of(mean.transpose(0, 1), lengths, [0]), parts_of(variance.transpose(0, 1), lengths, [0])
        )
        found = [DiagonalGaussian(m, v.sqrt()) for m, v in pairs]
        return found if isinstance(data, list) else found[0]

    @torch.no_grad()
    def reconstruct(self, data: Any) -> Any:
        """Mean of x at every step given the past and the means of the latents, [T, p]; a list of these of a list."""
        x, lengths = self.rows_like_fitted(data)
        past, _, (centre, _) = self.inferred(x)
        return parts_of(self.mean_of(self.emitted(past, centre[None])[0]).transpose(0, 1), lengths, data)

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, steps: int = 100) -> Float[Tensor, "n t p"]:
        """n new series; each step looks back as far as the convolutions do."""
        generator, n = generator_for(seed, self.where), check_count(n, 1)
        kind: dict[str, Any] = {"generator": generator, "device": self.where}
        back = self.past.receptive_field
        x = torch.zeros(n, 0, len(self.x_shift), device=self.where)
        z = torch.zeros(n, 0, self.latents, device=self.where)
        late = torch.zeros(n, 1, len(self.x_shift), device=self.where)  # scaled, one step late
        for _ in range(check_count(steps, 1)):
            past = self.past.steps(late[:, -back:])[:, -1:]
            mean, variance = moments(self.prior(past))
            z = torch.cat([z, mean + variance.sqrt() * torch.randn(mean.shape, **kind)], dim=1)[:, -back:]
            carried = self.carried.steps(z)[:, -1:]
            out = self.emission(torch.cat([past, carried], dim=-1))
            if self.likelihood == "bernoulli":
                new = torch.bernoulli(out.sigmoid(), generator=generator)
            else:
                white = torch.randn(n, 1, len(self.x_shift), **kind)
                new = self.mean_of(out) + white * (0.5 * out.chunk(2, -1)[1]).exp() * self.x_scale
            x = torch.cat([x, new], dim=1)
            late = torch.cat([late, (new - self.x_shift) / self.x_scale], dim=1)
        return x
