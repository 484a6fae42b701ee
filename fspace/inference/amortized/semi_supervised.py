"""A VAE of rows of which some have labels: the class is a latent where it is not known, and is summed over.

    y ~ Cat(pi),   z ~ N(0, I),   x ~ p(x | y, z);   q(y | x) q(z | x, y)
The bound on log p(x, y) is L(x, y) = E_q[log p(x | y, z)] + log p(y) - KL(q(z | x, y) || p(z)), and that on log p(x) is
sum_y q(y | x) (L(x, y) - log q(y | x)). The classifier q(y | x) also climbs log q(y | x) of known labels.
Source: Kingma, Rezende, Mohamed and Welling (2014), semi-supervised learning with deep generative models, model M2,
eq. 6-9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.evaluate import LogLikelihood
from fspace.inference.amortized.evaluate import log_likelihood as by_importance
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.observations import Observations, check_rows
from fspace.inference.amortized.proposals import DiagonalGaussian
from fspace.inference.amortized.training import Rows, Step, hold_out, plan_of, train
from fspace.inference.amortized.vae import gaussian_of
from fspace.inference.numerics import seeded
from fspace.kernels.extractors import MLP
from fspace.predictive import check_count, generator_for

UNKNOWN = -1


class SemiSupervisedVAE(AmortizedModel):
    """Variational autoencoder of rows [n, d] with a class each, which may be unknown.

    latents: how many, beside the class; widths: hidden layers; likelihood: "bernoulli", "gaussian" or "categorical";
    alpha: weight of the classifier's own objective, alpha N over all known labels (the paper: 0.1; with few labels more
    is better); samples: of every row and class. The data of encode, reconstruct and the others are rows, or a pair of
    rows and labels.
    """

    def __init__(
        self,
        latents: int = 8,
        widths: Sequence[int] = (200,),
        likelihood: str = "bernoulli",
        alpha: float = 1.0,
        samples: int = 1,
        device: str = "auto",
    ):
        super().__init__()
        for name, value in (("latents", latents), ("samples", samples)):
            checks.count(value, name)
        if not 0 <= alpha < math.inf:
            raise OptionError(f"alpha={alpha!r} must be a number of at least 0.")
        self.latents, self.widths, self.likelihood = latents, list(widths), likelihood
        self.alpha, self.samples, self.device = alpha, samples, device
        self._labels: list[Any] = []

    # -- data and layers ---------------------------------------------------------------------------------------

    def fit(self, data: Any, labels: Any = None, **plan: Any) -> Any:
        """Train on rows [n, d] and labels [n], None or NaN where unknown; classes_ are the labels there are.

        Unlabelled rows are held out where there are enough, so that no label is lost to it. Keywords as in
        `training.Plan`. Raises DataError for labels of fewer than two classes, or of another number than rows.
        """
        how = plan_of(plan)
        known = [] if labels is None else [value for value in _cells(labels) if not _missing(value)]
        self._labels = _classes(known)
        x, y = self.prepare((data, labels))
        with seeded(how.seed):
            self._make(self.shape_of((x, y)))
        x, y = x.to(self.where), y.to(self.where)
        kept, held = hold_out(y != UNKNOWN, how)
        self.history_ = train(self, (x[kept], y[kept]), how, (x[held], y[held]))
        return self

    @property
    def classes_(self) -> list[Any]:
        """The labels, sorted: what the columns of `predict_proba` are of."""
        return list(self._labels)

    def prepare(self, data: Any) -> Rows:
        """Rows [n, d], and the position of each label in classes_ [n], -1 where it is unknown."""
        values, labels = data if isinstance(data, tuple) else (data, None)
        x = numbers(values)
        if x.ndim != 2 or len(x) == 0:
            raise DataError(f"Data must be rows [n, d], at least one; they are {list(x.shape)}.")
        check_rows(x, self.likelihood)
        if labels is None:
            return x, torch.full((len(x),), UNKNOWN)
        cells = _cells(labels)
        if len(cells) != len(x):
            raise DataError(f"There are {len(cells)} labels for {len(x)} rows; unknown ones are None or NaN.")
        at = {label: k for k, label in enumerate(self._labels)}
        for row, label in enumerate(cells):
            if not _missing(label) and label not in at:
                raise DataError(
                    f"Row {row} has the label {label!r}, which was not there in fit ({self._labels})."
                )
        return x, torch.tensor([UNKNOWN if _missing(label) else at[label] for label in cells])

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        values = int(rows[0].max()) + 1 if self.likelihood == "categorical" else 0
        if hasattr(self, "shape_") and 0 < values <= self.shape_["values"]:
            values = self.shape_["values"]  # later data may lack some
        return {"columns": rows[0].shape[1], "values": values, "labels": self._labels}

    def build(self, shape: dict[str, Any]) -> None:
        columns, self._labels = shape["columns"], list(shape["labels"])
        c = len(self._labels)
        self.observations = Observations(self.likelihood, columns, shape["values"])
        read = columns * self.observations.per_column
        self.classifier = MLP(read, self.widths, c)
        self.encoder = MLP(read + c, self.widths, 2 * self.latents)
        self.decoder = MLP(self.latents + c, self.widths[::-1], read)
        self.register_buffer("log_prior", torch.zeros(c))
        self.register_buffer("weight", torch.zeros(()))

    def begin(self, rows: Rows) -> None:
        """Scales of the data, shares of the classes (those of the labels; learnt ones would let classes die out), and
        how much one label counts: alpha N over the number of labels."""
        x, y = rows
        counts = torch.bincount(y[y != UNKNOWN], minlength=len(self._labels)) + 1.0
        self.log_prior = (counts / counts.sum()).log()
        self.observations.begin(x)
        self.weight = torch.tensor(self.alpha * len(y), device=x.device) / (y != UNKNOWN).sum().clamp(min=1)
        if self.likelihood == "bernoulli":
            with torch.no_grad():
                self.decoder.layers[-1].bias.copy_(x.mean(0).clamp(1e-3, 1 - 1e-3).logit())  # type: ignore

    # -- the model ---------------------------------------------------------------------------------------------

    def propose(self, x: Float[Tensor, "b d"]) -> DiagonalGaussian:
        """q(z | x, y) for every class: mean and std [b, c, l]."""
        eye = torch.eye(len(self._labels), device=x.device).expand(len(x), -1, -1)
        read = self.observations.read(x)[:, None].expand(-1, len(self._labels), -1)
        return gaussian_of(self.encoder(torch.cat([read, eye], dim=-1)))

    def log_joint(self, x: Float[Tensor, "b d"], z: Float[Tensor, "k b c l"]) -> Float[Tensor, "k b c"]:
        """log p(x | y, z) + log p(y) for every class."""
        eye = torch.eye(z.shape[-2], device=x.device).expand(*z.shape[:-1], -1)
        out = self.decoder(torch.cat([z, eye], dim=-1))
        repeated = x[:, None].expand(-1, z.shape[-2], -1).flatten(0, 1)
        fits = self.observations.log_prob(repeated, out.flatten(1, 2)).unflatten(1, z.shape[1:3])
        return fits + self.log_prior

    def class_bounds(
        self, x: Float[Tensor, "b d"], samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "b c"]:
        """L(x, y): a bound on log p(x, y) for every class (nats)."""
        q = self.propose(x)
        fits = self.log_joint(x, q.sample(samples, generator)).mean(0)
        variance = q.std.square()
        return fits - 0.5 * (variance + q.mean.square() - 1.0 - variance.log()).sum(-1)

    def _bound(self, rows: Rows, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The bound of every row, and log q(y | x) of its label (0 where it has none)."""
        x, y = rows
        each = self.class_bounds(x, self.samples, generator)
        logs = self.classifier(self.observations.read(x)).log_softmax(-1)
        at, known = y.clamp(min=0)[:, None], y != UNKNOWN
        summed = (logs.exp() * (each - logs)).sum(-1)
        bound = torch.where(known, each.gather(1, at)[:, 0], summed)
        return bound, torch.where(known, logs.gather(1, at)[:, 0], 0.0)

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        bound, own = self._bound(rows, generator)
        return Step(bound.detach(), [((bound + self.weight * own).mean(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        bound, own = self._bound(rows, generator)
        return bound + self.weight * own

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_proba(self, data: Any) -> Float[Tensor, "n c"]:
        """q(y | x) of every row, in the order of classes_."""
        x, _ = self.rows_like_fitted(data)
        return self.classifier(self.observations.read(x)).softmax(-1)

    def predict(self, data: Any) -> np.ndarray:
        """The likeliest label of every row [n]."""
        return np.array(self._labels)[self.predict_proba(data).argmax(-1).cpu().numpy()]

    def _chosen(self, data: Any) -> tuple[Tensor, Tensor]:
        """Rows, and the position of the label of each: the likeliest where it is not given."""
        x, y = self.rows_like_fitted(data)
        logits = self.classifier(self.observations.read(x))
        return x, torch.where(y == UNKNOWN, logits.argmax(-1), y)

    @torch.no_grad()
    def encode(self, data: Any) -> DiagonalGaussian:
        """q(z | x, y) of every row (mean, std [n, l]) at its label, or at the likeliest."""
        x, y = self._chosen(data)
        q, rows = self.propose(x), torch.arange(len(x), device=x.device)
        return DiagonalGaussian(q.mean[rows, y], q.std[rows, y])

    def latent_means(self, data: Any) -> Float[Tensor, "n l"]:
        """Means of the latents under q."""
        return self.encode(data).mean

    @torch.no_grad()
    def reconstruct(self, data: Any) -> Tensor:
        """Mean of every row at the mean of its latents and its label, or the likeliest."""
        _, y = self._chosen(data)
        return self.observations.mean(self._decoded(self.encode(data).mean, y))

    def _decoded(self, z: Float[Tensor, "n l"], y: Int[Tensor, " n"]) -> Tensor:
        chosen = nn.functional.one_hot(y, len(self._labels)).to(z)
        return self.decoder(torch.cat([z, chosen], dim=-1))

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, label: Any = None, noise: bool = True) -> Tensor:
        """n new rows, of one label or of any; without noise, the mean of each given its latents."""
        generator, n = generator_for(seed, self.where), check_count(n, 1)
        if label is not None and label not in self._labels:
            raise OptionError(f"label={label!r} was not there in fit; there are {self._labels}.")
        shares = self.log_prior.exp()
        if label is not None:
            shares = torch.eye(len(shares), device=self.where)[self._labels.index(label)]
        y = torch.multinomial(shares, n, replacement=True, generator=generator)
        z = torch.randn(n, self.latents, generator=generator, device=self.where)
        out = self._decoded(z, y)
        return self.observations.sample(out, generator) if noise else self.observations.mean(out)

    def evaluate(self, data: Any, samples: int = 1000, seed: int | None = 0) -> LogLikelihood:
        """log p(x) of every row, or log p(x, y) where its label is given, by importance sampling of z, y summed over;
        with standard error, effective sample size and Pareto's k."""
        x, y = self.rows_like_fitted(data)
        both = torch.cat([x, y[:, None].to(x)], dim=1)
        generator = generator_for(seed, self.where)
        return by_importance(_Summed(self), both, check_count(samples, 1), 2000, generator)

    def log_likelihood(self, data: Any, samples: int = 1000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """log p(x) of every row, or log p(x, y) where its label is given (nats): a lower bound in expectation."""
        return self.evaluate(data, samples, seed).log_likelihood

    @torch.no_grad()
    def bounds(self, data: Any, samples: int = 1, seed: int | None = 0) -> dict[str, Float[Tensor, " n"]]:
        """The bound "elbo" on log p(x) of every row, or on log p(x, y) where its label is given."""
        x, y = self.rows_like_fitted(data)
        each = self.class_bounds(x, check_count(samples, 1), generator_for(seed, self.where))
        logs = self.classifier(self.observations.read(x)).log_softmax(-1)
        summed = (logs.exp() * (each - logs)).sum(-1)
        return {"elbo": torch.where(y == UNKNOWN, summed, each.gather(1, y.clamp(min=0)[:, None])[:, 0])}


@dataclass
class _Summed:
    """The model as importance sampling asks it: a sample is one z for every class, and its weight is the sum over
    classes of p(x, y, z_y) / q(z_y | x, y), so that q's own density is already in it. x: rows, then the label's
    position."""

    model: SemiSupervisedVAE

    def encode(self, x: Tensor) -> _PerClass:
        return _PerClass(self.model.propose(x[:, :-1]))

    def log_joint(self, x: Tensor, z: Float[Tensor, "k b c l"]) -> Float[Tensor, "k b"]:
        rows, y = x[:, :-1], x[:, -1].long()
        q = self.model.propose(rows)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        error = (z - q.mean) / q.std
        proposal = -0.5 * (error.square() + math.log(2 * math.pi)).sum(-1) - q.std.log().sum(-1)
        each = self.model.log_joint(rows, z) + prior - proposal
        other = torch.arange(each.shape[-1], device=y.device) != y[:, None]
        return each.masked_fill(other & (y != UNKNOWN)[:, None], -torch.inf).logsumexp(-1)


@dataclass
class _PerClass:
    q: DiagonalGaussian

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "k b c l"]:
        return self.q.sample(samples, generator)

    def log_prob(self, z: Float[Tensor, "k b c l"]) -> Float[Tensor, "k b"]:
        return z.new_zeros(z.shape[:2])

    def stopped(self) -> _PerClass:
        return _PerClass(self.q.stopped())


def _cells(labels: Any) -> list[Any]:
    """Labels as plain values."""
    if hasattr(labels, "detach"):
        labels = labels.detach().cpu().numpy()
    return np.asarray(labels, dtype=object).tolist()


def _missing(label: Any) -> bool:
    return bool(pd.isna(label))


def _classes(known: list[Any]) -> list[Any]:
    plain = [label.item() if isinstance(label, np.generic) else label for label in known]
    for label in plain:
        if not isinstance(label, str | int | float | bool):
            raise DataError(f"A label is text, a number or a boolean; {label!r} is a {type(label).__name__}.")
    kinds = set(plain)
    if len(kinds) < 2:
        raise DataError(f"There must be labels of at least two classes; there are {sorted(kinds, key=str)}.")
    return sorted(kinds, key=None if len({isinstance(k, str) for k in kinds}) == 1 else str)
