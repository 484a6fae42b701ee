"""The variational autoencoder: a latent for every row, and a network that infers it.

Latents are Gaussian, in one layer or several, or discrete: bits, or groups of categories. What is trained on, the bound
and the estimator of its gradient, is an option; what is reported is always the bound of the model itself, for discrete
latents the hard one beside the relaxed one.
Sources: Kingma and Welling (2014); Burda et al. (2016); Higgins et al. (2017); Maddison et al. (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import bounds, checks, control_variates, gradients, score
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.concrete import BinaryConcrete, Concrete, relaxed_log_weights
from fspace.inference.amortized.evaluate import LogLikelihood
from fspace.inference.amortized.evaluate import log_likelihood as by_importance
from fspace.inference.amortized.latent import Proposal, log_terms
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.networks import ConvDecoder, ConvEncoder
from fspace.inference.amortized.observations import Observations, check_rows
from fspace.inference.amortized.proposals import Bernoulli, Categorical, Chain, DiagonalGaussian
from fspace.inference.amortized.training import Rows, Step
from fspace.kernels.extractors import MLP
from fspace.predictive import check_count, generator_for

CONTINUOUS = ("elbo", "iwae", "stl", "dreg", "wake_wake")
DISCRETE = ("concrete", "reinforce_loo", "vimco", "rebar", "relax", "wake_wake")
LATENTS = ("gaussian", "bits", "categories")
TEMPERATURES = (2 / 3, 1 / 2)  # of proposal and prior. Source: Maddison et al. (2017), appendix C
CHUNK = 2000  # rows encoded at once


class VAE(AmortizedModel):
    """Variational autoencoder of rows [n, d] or images [n, c, h, w].

    latents: how many, or for several stochastic Gaussian layers a list, the one next to the data first; latent:
    "gaussian", "bits" or "categories" (groups of `categories`); widths: hidden layers; network: "dense" or "conv";
    likelihood: "bernoulli", "gaussian" or "categorical".
    objective: for Gaussian latents "elbo" (analytic KL, times beta), "iwae", "stl", "dreg", "wake_wake"; for discrete
    ones "concrete", "reinforce_loo", "vimco", "rebar", "relax", "wake_wake"; samples: of every row.
    """

    def __init__(
        self,
        latents: int | Sequence[int] = 16,
        latent: str = "gaussian",
        widths: Sequence[int] = (200,),
        network: str = "dense",
        likelihood: str = "bernoulli",
        objective: str | None = None,
        samples: int = 1,
        beta: float = 1.0,
        categories: int = 10,
        device: str = "auto",
    ):
        super().__init__()
        if latent not in LATENTS:
            raise OptionError(f"latent={latent!r} does not exist; choose one of {', '.join(LATENTS)}.")
        if network not in ("dense", "conv"):
            raise OptionError(f"network={network!r} does not exist; choose 'dense' or 'conv'.")
        known = CONTINUOUS if latent == "gaussian" else DISCRETE
        objective = known[0] if objective is None else objective
        if objective not in known:
            raise OptionError(f"objective={objective!r} is none for {latent} latents: {', '.join(known)}.")
        layers: list[Any] = list(latents) if isinstance(latents, list | tuple) else [latents]
        for name, value in (*(("latents", layer) for layer in layers), ("samples", samples)):
            checks.count(value, name)
        if not layers or checks.count(categories, "categories") < 2:
            raise OptionError("There must be at least one layer of latents, and 2 categories.")
        if len(layers) > 1 and latent != "gaussian":
            raise OptionError("Several stochastic layers are for Gaussian latents.")
        if beta != 1.0 and objective not in ("elbo",):
            raise OptionError(f"beta={beta!r} goes with objective='elbo'.")
        if objective in ("reinforce_loo", "vimco") and samples < 2:
            raise OptionError(f"objective={objective!r} needs samples of at least 2.")
        self.latents, self.latent, self.widths, self.network = layers, latent, list(widths), network
        self.likelihood, self.objective, self.samples, self.beta = likelihood, objective, samples, beta
        self.categories, self.device = categories, device

    # -- data and layers ---------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Rows:
        """Rows [n, d], images flat, float32."""
        x = numbers(data)
        if x.ndim not in (2, 4) or len(x) == 0:
            raise DataError(
                f"Data must be rows [n, d] or images [n, c, h, w], at least one; they are {list(x.shape)}."
            )
        if self.network == "conv" and x.ndim != 4:
            raise DataError(f"network='conv' takes images [n, c, h, w]; the data are {list(x.shape)}.")
        self._image = list(x.shape[1:])
        flat = x.flatten(1)
        check_rows(flat, self.likelihood)
        return (flat,)

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        classes = int(rows[0].max()) + 1 if self.likelihood == "categorical" else 0
        if hasattr(self, "shape_") and 0 < classes <= self.shape_["classes"]:
            classes = self.shape_["classes"]  # later data may lack some
        return {"row": self._image, "classes": classes}

    def build(self, shape: dict[str, Any]) -> None:
        columns = math.prod(shape["row"])
        self.observations = Observations(self.likelihood, columns, shape["classes"])
        first, each = self.latents[0], self.observations.per_column
        numbers = {"gaussian": 2 * first, "bits": first, "categories": first * self.categories}[self.latent]
        size = first * (self.categories if self.latent == "categories" else 1)
        if self.network == "conv":
            self.encoder: nn.Module = ConvEncoder(shape["row"], self.widths[0], numbers)
            self.decoder: nn.Module = ConvDecoder(size, self.widths[0], shape["row"], each)
        else:
            self.encoder = MLP(columns * each, self.widths, numbers)
            self.decoder = MLP(size, self.widths[::-1], columns * each)
        pairs = list(zip(self.latents, self.latents[1:]))
        self.upwards = nn.ModuleList(GaussianLayer(a, b, self.widths) for a, b in pairs)
        self.downwards = nn.ModuleList(GaussianLayer(b, a, self.widths) for a, b in pairs)
        self.prior_logits = nn.Parameter(
            torch.zeros(numbers if self.latent != "gaussian" else 0), requires_grad=self.latent != "gaussian"
        )
        if self.objective in ("rebar", "relax"):
            self.log_temperature = nn.Parameter(torch.tensor(0.0))
            self.eta = nn.Parameter(torch.tensor(1.0))
        if self.objective == "relax":
            self.control = MLP(size, (50,), 1)

    def begin(self, rows: Rows) -> None:
        """Scales of the data; the decoder starts at their mean."""
        self.observations.begin(rows[0])
        if self.likelihood == "bernoulli" and self.network == "dense":
            with torch.no_grad():
                self.decoder.layers[-1].bias.copy_(rows[0].mean(0).clamp(1e-3, 1 - 1e-3).logit())  # type: ignore

    # -- the model, as the objectives see it ---------------------------------------------------------------------

    def propose(self, x: Float[Tensor, "b d"]) -> Proposal:
        """q(z | x); of discrete latents, of their hard values."""
        out = self.encoder(self.observations.read(x))
        if self.latent == "gaussian":
            first = gaussian_of(out)
            return Chain(first, list(self.upwards)) if len(self.upwards) else first
        return Bernoulli(out) if self.latent == "bits" else Categorical(self._grouped(out))

    def _grouped(self, numbers: Tensor) -> Tensor:
        return numbers.unflatten(-1, (-1, self.categories))

    def prior(self, like: Tensor) -> Bernoulli | Categorical:
        """p(z) of discrete latents, for as many data as there are in z [K, B, ...]."""
        if self.latent == "bits":
            return Bernoulli(self.prior_logits.expand(like.shape[1:]))
        return Categorical(self._grouped(self.prior_logits).expand(like.shape[1:]))

    def log_density(self, x: Float[Tensor, "b d"], z: Tensor) -> Float[Tensor, "k b"]:
        """log p(x | z) of latents next to the data [K, B, ...]."""
        flat = z.flatten(2) if self.latent == "categories" else z
        signed = 2 * flat - 1 if self.latent != "gaussian" else flat
        return self.observations.log_prob(x, self.decoder(signed))

    def log_joint(self, x: Float[Tensor, "b d"], z: Any) -> Float[Tensor, "k b"]:
        """log p(x, z)."""
        if self.latent != "gaussian":
            return self.log_density(x, z) + self.prior(z).log_prob(z)
        layers = z if isinstance(z, tuple) else (z,)
        total = self.log_density(x, layers[0]) + self.log_prior(layers[-1])
        for layer, above, here in zip(self.downwards, layers[1:], layers):
            rows = layer(above.flatten(0, 1)).log_prob(here.flatten(0, 1)[None])
            total = total + rows.reshape(total.shape)
        return total

    def log_prior(self, z: Float[Tensor, "k b l"]) -> Float[Tensor, "k b"]:
        """log p of Gaussian latents of the layer furthest from the data."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def draw_prior(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n l"]:
        """Draws of these."""
        return torch.randn(n, self.latents[-1], generator=generator, device=self.where)

    def _parameters_of_q(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.upwards.parameters()]

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        (x,) = rows
        phi, tuned = self._parameters_of_q(), self._tuned()
        apart = {id(p) for p in [*phi, *tuned]}
        theta = [p for p in self.parameters() if id(p) not in apart]
        if self.objective == "elbo" and not self.upwards:
            bound = self._analytic(x, generator)
            return Step(bound.detach(), [(bound.mean(), theta + phi)])
        if self.objective == "concrete":
            logs = self._relaxed(x, generator)
            bound = bounds.iwae(logs.relaxed)
            return Step(bounds.iwae(logs.hard), [(bound.mean(), theta + phi)])
        if self.objective in ("rebar", "relax"):
            return self._controlled(x, generator, theta, phi, tuned)
        estimate = ESTIMATORS[self.objective](log_terms(_Seen(self), x, self.samples, generator))
        return Step(estimate.bound, [(estimate.decoder.mean(), theta), (estimate.encoder.mean(), phi)])

    def _analytic(self, x: Tensor, generator: torch.Generator) -> Tensor:
        q = self.propose(x)
        assert isinstance(q, DiagonalGaussian)
        z = q.sample(self.samples, generator)
        variance = q.std.square()
        kl = 0.5 * (variance + q.mean.square() - 1.0 - variance.log()).sum(-1)
        return bounds.elbo_with_kl(self.log_density(x, z), kl, self.beta)

    def _relaxed(self, x: Tensor, generator: torch.Generator) -> Any:
        q = self.propose(x)
        hot, cold = TEMPERATURES
        proposal: BinaryConcrete | Concrete
        prior: BinaryConcrete | Concrete
        if isinstance(q, Bernoulli):
            proposal = BinaryConcrete(q.logits, hot)
            prior = BinaryConcrete(self.prior_logits[None], cold)
        else:
            assert isinstance(q, Categorical)
            proposal = Concrete(q.logits, hot)
            prior = Concrete(self._grouped(self.prior_logits)[None], cold)
        fits = lambda z: self.log_density(x, z)  # noqa: E731
        return relaxed_log_weights(proposal, prior, fits, self.samples, generator)

    def _tuned(self) -> list[nn.Parameter]:
        """What lowers the variance of REBAR and RELAX and enters no bound."""
        if self.objective not in ("rebar", "relax"):
            return []
        return [
            self.log_temperature,
            self.eta,
            *(self.control.parameters() if self.objective == "relax" else ()),
        ]

    def _controlled(self, x: Tensor, generator: torch.Generator, theta: Any, phi: Any, tuned: Any) -> Step:
        q = self.propose(x)
        assert isinstance(q, Bernoulli | Categorical)
        shape, kind = (self.samples, *q.logits.shape), {"generator": generator, "device": x.device}
        u, v = torch.rand(shape, **kind), torch.rand(shape, **kind)  # type: ignore[call-overload]
        couple = (
            control_variates.couple_binary
            if isinstance(q, Bernoulli)
            else control_variates.couple_categorical
        )
        coupling = couple(q.logits, u, v)

        def objective(z: Tensor) -> Tensor:
            """The bound at hard or relaxed latents; densities of the discrete model, linear in z between."""
            joint = self.log_density(x, z) + _mass(self.prior(z).logits, z, self.latent)
            return bounds.iwae(joint - _mass(q.logits, z, self.latent))

        if self.objective == "rebar":
            found = control_variates.rebar(objective, coupling, self.log_temperature.exp(), self.eta)
        else:
            warm = self.log_temperature.exp()

            def control(z: Tensor) -> Tensor:
                soft = coupling.squash(z / warm)
                learned = self.control(soft.flatten(2))[..., 0].mean(0)
                return self.eta * objective(soft) + learned

            found = control_variates.relax(objective, control, coupling)
        return Step(
            found.bound,
            [
                (found.decoder.mean(), theta),
                (found.encoder.mean(), phi),
                (-found.second_moment.mean(), tuned),
            ],
        )

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        """The bound of the model itself (of discrete latents, at hard values); of a beta-VAE its own objective."""
        (x,) = rows
        if self.beta != 1.0:
            return self._analytic(x, generator)
        return bounds.iwae(log_terms(_Seen(self), x, self.samples, generator).weights)

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, data: Any) -> Proposal:
        """q(z | x) of every row: DiagonalGaussian (mean, std [n, l]), Bernoulli or Categorical (logits), or a Chain."""
        return self.propose(self.rows_like_fitted(data)[0])

    def latent_means(self, data: Any) -> Float[Tensor, "n l"]:
        """Means of the latents next to the data under q (probabilities of discrete ones)."""
        q = self.encode(data)
        first = q.first if isinstance(q, Chain) else q
        if isinstance(first, DiagonalGaussian):
            return first.mean
        assert isinstance(first, Bernoulli | Categorical)
        return first.logits.sigmoid() if isinstance(first, Bernoulli) else first.logits.softmax(-1).flatten(1)

    def active_units(self, data: Any, threshold: float = 0.01) -> int:
        """Latents whose mean varies over the data, by a variance above the threshold. Source: Burda et al. (2016)."""
        return int((self.latent_means(data).var(0) > threshold).sum())

    @torch.no_grad()
    def reconstruct(self, data: Any) -> Tensor:
        """Mean of every row at the mean of its latents (of discrete ones, the most probable), shaped as the data."""
        q = self.encode(data)
        first = q.first if isinstance(q, Chain) else q
        if isinstance(first, DiagonalGaussian):
            z = first.mean
        elif isinstance(first, Bernoulli):
            z = 2.0 * (first.logits > 0) - 1.0
        else:
            assert isinstance(first, Categorical)
            hard = nn.functional.one_hot(first.logits.argmax(-1), self.categories)
            z = (2.0 * hard - 1.0).flatten(1)
        return self._shaped(self.observations.mean(self.decoder(z)))

    def _shaped(self, mean: Tensor) -> Tensor:
        return mean.unflatten(1, self.shape_["row"]) if len(self.shape_["row"]) > 1 else mean

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, noise: bool = True) -> Tensor:
        """n new rows, shaped as the data; without noise, the mean of each given its latents."""
        generator, n = generator_for(seed, self.where), check_count(n, 1)
        if self.latent != "gaussian":
            shape = self.prior_logits if self.latent == "bits" else self._grouped(self.prior_logits)
            z = self.prior(shape.expand(1, n, *shape.shape)).sample(1, generator)[0]
            z = 2.0 * z.flatten(1) - 1.0
        else:
            z = self.draw_prior(n, generator)
            for layer in reversed(self.downwards):
                z = layer(z).sample(1, generator)[0]
        out = self.decoder(z)
        return self._shaped(
            self.observations.sample(out, generator) if noise else self.observations.mean(out)
        )

    def evaluate(self, data: Any, samples: int = 5000, seed: int | None = 0) -> LogLikelihood:
        """log p of every row by importance sampling, with standard error, effective sample size and Pareto's k."""
        (x,) = self.rows_like_fitted(data)
        return by_importance(
            _Seen(self), x, check_count(samples, 1), generator=generator_for(seed, self.where)
        )

    def log_likelihood(self, data: Any, samples: int = 5000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """log p of every row (nats) by importance sampling: a lower bound in expectation."""
        return self.evaluate(data, samples, seed).log_likelihood

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 1, seed: int | None = 0) -> dict[str, Float[Tensor, " n"]]:
        """Bounds on log p of every row: "iwae" of the model itself with so many samples ("elbo" for one); of discrete
        latents also "relaxed", what objective "concrete" climbs, which is no bound of the discrete model."""
        (x,) = self.rows_like_fitted(data)
        generator, found = generator_for(seed, self.where), {}
        name = "elbo" if samples == 1 else "iwae"
        found[name] = bounds.iwae(log_terms(_Seen(self), x, check_count(samples, 1), generator).weights)
        if self.latent != "gaussian":
            found["relaxed"] = bounds.iwae(self._relaxed(x, generator).relaxed)
        return found


class GaussianLayer(nn.Module):
    """p or q of the next layer of latents given rows of the one before."""

    def __init__(self, given: int, latents: int, widths: Sequence[int]):
        super().__init__()
        self.network = MLP(given, widths, 2 * latents)

    def forward(self, z: Float[Tensor, "b k"]) -> DiagonalGaussian:
        """Its Gaussian."""
        return gaussian_of(self.network(z))


class _Seen:
    """A VAE as objectives ask it: encode(x) of prepared rows, log_joint(x, z)."""

    def __init__(self, model: VAE):
        self.encode: Callable[[Tensor], Proposal] = model.propose
        self.log_joint: Callable[[Tensor, Any], Tensor] = model.log_joint


def gaussian_of(out: Float[Tensor, "*b k"]) -> DiagonalGaussian:
    """The Gaussian that a network's numbers say; standard deviation 1 where it says 0."""
    mean, raw = out.chunk(2, dim=-1)
    return DiagonalGaussian(mean, nn.functional.softplus(raw + math.log(math.e - 1)) + 1e-5)


def _mass(logits: Tensor, z: Tensor, latent: str) -> Float[Tensor, "k b"]:
    """Log mass of discrete values, and what lies between them for relaxed ones."""
    if latent == "bits":
        each = z * nn.functional.logsigmoid(logits) + (1 - z) * nn.functional.logsigmoid(-logits)
    else:
        each = z * logits.log_softmax(-1)
    return each.flatten(2).sum(-1)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "elbo": lambda terms: gradients.pathwise(terms, bounds.elbo),
    "iwae": gradients.pathwise,
    "stl": lambda terms: gradients.stl(terms, bounds.elbo),
    "dreg": gradients.dreg,
    "wake_wake": score.wake_wake,
    "reinforce_loo": score.reinforce_loo,
    "vimco": score.vimco,
}
