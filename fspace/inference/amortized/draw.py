"""DRAW: an image is drawn onto a canvas step by step, by a network that looks where it wants to and writes there.

At every step the encoder reads the image and what the canvas lacks, q(z_t) follows, and the decoder adds to the canvas;
the last canvas gives the likelihood. The bound is E[log p(x | canvas)] - sum_t KL(q(z_t | ...) || N(0, I)).
Source: Gregor et al. (2015), eq. 1-17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import attention, bounds, checks
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.evaluate import LogLikelihood
from fspace.inference.amortized.evaluate import log_likelihood as by_importance
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.observations import Observations, check_rows
from fspace.inference.amortized.training import Rows, Step
from fspace.predictive import check_count, generator_for


class Drawing(NamedTuple):
    """What came of some samples: canvas [k, b, c h w] before the likelihood; log p(z), log q(z) and KL [k, b]; means of
    the latents of all steps [k, b, steps l], each given what was drawn before."""

    canvas: Tensor
    prior: Tensor
    proposal: Tensor
    divergence: Tensor
    means: Tensor


class DRAW(AmortizedModel):
    """Deep recurrent attentive writer of images [n, c, h, w].

    latents: of every step; hidden: of encoder and decoder; steps: how many; patch: side of the patch that is read and
    written (0: the whole image, no attention); likelihood: "bernoulli" or "gaussian"; samples: of every image.
    """

    def __init__(
        self,
        latents: int = 10,
        hidden: int = 128,
        steps: int = 10,
        patch: int = 5,
        likelihood: str = "bernoulli",
        samples: int = 1,
        device: str = "auto",
    ):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise OptionError(f"likelihood={likelihood!r} does not exist; choose 'bernoulli' or 'gaussian'.")
        for name, value in (("latents", latents), ("hidden", hidden), ("steps", steps), ("samples", samples)):
            checks.count(value, name)
        if patch < 0:
            raise OptionError(f"patch={patch!r} must not be negative; 0 is without attention.")
        self.latents, self.hidden, self.steps, self.patch = latents, hidden, steps, patch
        self.likelihood, self.samples, self.device = likelihood, samples, device

    def prepare(self, data: Any) -> Rows:
        """Images, float32."""
        x = numbers(data)
        if x.ndim != 4 or len(x) == 0:
            raise DataError(f"Data must be images [n, c, h, w], at least one; they are {list(x.shape)}.")
        check_rows(x.flatten(1), self.likelihood)
        return (x,)

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"image": list(rows[0].shape[1:])}

    def build(self, shape: dict[str, Any]) -> None:
        c, h, w = shape["image"]
        seen = c * (self.patch**2 if self.patch else h * w)
        self.observations = Observations(self.likelihood, c * h * w)
        self.reader = nn.LSTMCell(2 * seen + self.hidden, self.hidden)
        self.proposal = nn.Linear(self.hidden, 2 * self.latents)
        self.writer = nn.LSTMCell(self.latents, self.hidden)
        self.patch_of = nn.Linear(self.hidden, seen)
        self.look = nn.Linear(self.hidden, 5)
        self.place = nn.Linear(self.hidden, 5)
        self.blank = nn.Parameter(torch.zeros(c * h * w))

    def begin(self, rows: Rows) -> None:
        """Scales of the data; the blank canvas is their mean."""
        flat = rows[0].flatten(1)
        self.observations.begin(flat)
        if self.likelihood == "bernoulli":
            with torch.no_grad():
                self.blank.copy_(flat.mean(0).clamp(1e-3, 1 - 1e-3).logit())

    # -- drawing -----------------------------------------------------------------------------------------------

    def read(self, x: Float[Tensor, "b c h w"], missing: Float[Tensor, "b c h w"], h: Tensor) -> Tensor:
        """What the encoder sees of image and missing part, flat."""
        both = torch.cat([x, missing], dim=1)
        if self.patch:
            grid = attention.grid_from(self.look(h), x.shape[-2], x.shape[-1], self.patch)
            both = attention.read(both, grid, self.patch)
        return both.flatten(1)

    def write(self, h: Tensor) -> Float[Tensor, "b d"]:
        """What the decoder adds to the canvas."""
        c, height, width = self.shape_["image"]
        patch = self.patch_of(h)
        if not self.patch:
            return patch
        grid = attention.grid_from(self.place(h), height, width, self.patch)
        square = patch.unflatten(1, (c, self.patch, self.patch))
        return attention.write(square, grid, height, width).flatten(1)

    def _blank(self, rows: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        zeros = self.blank.new_zeros(rows, self.hidden)
        return self.blank.expand(rows, -1), (zeros, zeros)

    def draw_from(
        self, x: Float[Tensor, "b c h w"], samples: int, generator: torch.Generator | None
    ) -> Drawing:
        """Canvases of samples of the latents of images."""
        image = x.repeat(samples, 1, 1, 1)
        rows = len(image)
        canvas, reader = self._blank(rows)
        writer = reader
        prior, proposal, divergence = (canvas.new_zeros(rows) for _ in range(3))
        means = []
        centred = self.observations.read(image.flatten(1)).unflatten(1, x.shape[1:])
        for _ in range(self.steps):
            shown = self.observations.mean(canvas)
            missing = (image.flatten(1) - shown).unflatten(1, x.shape[1:]) / self._spread(x)
            seen = self.read(centred, missing, writer[0])
            reader = self.reader(torch.cat([seen, writer[0]], dim=1), reader)
            mean, raw = self.proposal(reader[0]).chunk(2, dim=-1)
            std = nn.functional.softplus(raw + math.log(math.e - 1)) + 1e-5
            white = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            z = mean + std * white
            means.append(mean)
            constant = 0.5 * math.log(2 * math.pi) * self.latents
            prior = prior - 0.5 * z.square().sum(-1) - constant
            proposal = proposal - 0.5 * white.square().sum(-1) - std.log().sum(-1) - constant
            divergence = divergence + 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1)
            writer = self.writer(z, writer)
            canvas = canvas + self.write(writer[0])
        found = (canvas, prior, proposal, divergence, torch.cat(means, dim=1))
        return Drawing(*(part.unflatten(0, (samples, len(x))) for part in found))

    def _spread(self, x: Tensor) -> Tensor:
        return self.observations.scale.unflatten(0, x.shape[1:])

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        (x,) = rows
        made = self.draw_from(x, self.samples, generator)
        fits = self.observations.log_prob(x.flatten(1), made.canvas)
        bound = bounds.elbo_with_kl(fits, made.divergence)
        return Step(bound.detach(), [(bound.mean(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        return self.step(rows, generator).bound

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, data: Any, seed: int | None = 0) -> Drawing:
        """One drawing of every image."""
        (x,) = self.rows_like_fitted(data)
        return self.draw_from(x, 1, generator_for(seed, self.where))

    def latent_means(self, data: Any, seed: int | None = 0) -> Float[Tensor, "n l"]:
        """Means of the latents of all steps along one drawing of every image [n, steps l]."""
        return self.encode(data, seed).means[0]

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 1, seed: int | None = 0) -> dict[str, Float[Tensor, " n"]]:
        """The bound "elbo" on log p of every image (nats), the mean of so many drawings."""
        (x,) = self.rows_like_fitted(data)
        made = self.draw_from(x, check_count(samples, 1), generator_for(seed, self.where))
        return {
            "elbo": bounds.elbo_with_kl(
                self.observations.log_prob(x.flatten(1), made.canvas), made.divergence
            )
        }

    def reconstruct(self, data: Any, seed: int | None = 0) -> Tensor:
        """Means of the images [n, c, h, w] given one drawing."""
        return (
            self.observations.mean(self.encode(data, seed).canvas[0])
            .detach()
            .unflatten(1, self.shape_["image"])
        )

    @torch.no_grad()
    def canvases(self, n: int = 1, seed: int | None = None) -> Float[Tensor, "steps n c h w"]:
        """Means of n new images after every step: how they are drawn."""
        generator = generator_for(seed, self.where)
        canvas, writer = self._blank(check_count(n, 1))
        found = []
        for _ in range(self.steps):
            z = torch.randn(n, self.latents, generator=generator, device=self.where)
            writer = self.writer(z, writer)
            canvas = canvas + self.write(writer[0])
            found.append(self.observations.mean(canvas).unflatten(1, self.shape_["image"]))
        return torch.stack(found)

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n new images: their means after the last step."""
        return self.canvases(n, seed)[-1]

    def evaluate(self, data: Any, samples: int = 5000, seed: int | None = 0) -> LogLikelihood:
        """log p of every image by importance sampling, with standard error, effective sample size and Pareto's k."""
        (x,) = self.rows_like_fitted(data)
        generator = generator_for(seed, self.where)
        return by_importance(_Seen(self), x, check_count(samples, 1), chunk=2000, generator=generator)

    def log_likelihood(self, data: Any, samples: int = 5000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """log p of every image (nats) by importance sampling: a lower bound in expectation."""
        return self.evaluate(data, samples, seed).log_likelihood


@dataclass
class _Drawn:
    """q(z | x) as importance sampling asks it: a sample is a whole drawing, which knows its densities."""

    model: DRAW
    x: Tensor

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Drawing:
        return self.model.draw_from(self.x, samples, generator)

    def log_prob(self, z: Drawing) -> Tensor:
        return z.proposal

    def stopped(self) -> _Drawn:
        raise OptionError("DRAW's latents of one step depend on those before; use the bound's own gradient.")


@dataclass
class _Seen:
    """DRAW as importance sampling asks it."""

    model: DRAW

    def encode(self, x: Tensor) -> _Drawn:
        return _Drawn(self.model, x)

    def log_joint(self, x: Tensor, z: Drawing) -> Tensor:
        return self.model.observations.log_prob(x.flatten(1), z.canvas) + z.prior
