"""Bayesian optimisation of objects that have no settings, such as images: in the latent space of a VAE.

The surrogate is the deep kernel GP on the VAE's encoder; the acquisition function is climbed in the latent space, in
the box of the pool's latents. What it says of a latent z is what the surrogate says of the object decoded from z,
encoded again: an object that was tried is known wherever it was decoded from. From time to time encoder, decoder and
kernel are trained anew, on rows drawn with weights 1 / (k N + rank), so that the VAE spends itself on good objects.
Sources: Gomez-Bombarelli et al. (2018); Tripp, Daxberger and Hernandez-Lobato (2020), eq. 3 (weights).
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.optim import optimize_acqf
from jaxtyping import Float
from torch import Tensor

from fspace.decisions.acquisitions import RESTARTS, acquisition
from fspace.decisions.journal import Journal
from fspace.decisions.optimisation import GOALS
from fspace.decisions.sources import MOST, check_callable
from fspace.errors import DataError, ModelFileError, OptionError
from fspace.inference.amortized.vae_kernel import VAEKernelGP
from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import seeded
from fspace.kernels.deep import embedded_kernel
from fspace.predictive_base import check_seed, check_whole

CANDIDATES = 512  # latents of the pool, as many near the best, and half as many anywhere in the box


class LatentOptimizer:
    """Proposes objects (`ask`) and learns from what they were worth (`tell`).

    pool: objects like those to look for, rows [n, d] or images [n, c, h, w], whose values are not known. model: a
    `VAEKernelGP`, which is trained here (None: 8 latents; of images with values from 0 to 1 with Bernoulli pixels).
    objective: "maximize" or "minimize". initial: objects of the pool that are asked for first. retrain: train anew
    when this many times as many values are known as at the last training. weighting: k; smaller prefers good rows more,
    infinity none. state: a file to go on from, written at every ask and tell (the model is trained anew). plan:
    keywords of the training (epochs, learning_rate, ...). Raises OptionError, DataError, ModelFileError.
    """

    def __init__(
        self,
        pool: Any,
        model: VAEKernelGP | None = None,
        objective: str = "maximize",
        initial: int = 10,
        retrain: float = 1.5,
        weighting: float = 1e-3,
        seed: int = 0,
        state: str | os.PathLike[str] | None = None,
        **plan: Any,
    ):
        if not isinstance(objective, str) or objective not in GOALS:
            raise OptionError(f"objective={objective!r} is no goal; choose 'minimize' or 'maximize'.")
        numbers = isinstance(retrain, int | float) and isinstance(weighting, int | float)
        if not numbers or not retrain > 1 or not weighting > 0:
            raise OptionError(f"retrain={retrain!r} must be above 1 and weighting={weighting!r} above 0.")
        self.pool = _numbers(pool, "The pool").float()
        shape = list(self.pool.shape)
        if len(shape) not in (2, 4) or 0 in shape or shape[0] < 10 or not bool(self.pool.isfinite().all()):
            raise DataError(
                f"The pool must hold at least 10 objects, [n, d] or [n, c, h, w], without NaN; it is {shape}."
            )
        if model is None:
            shares = self.pool.ndim == 4 and self.pool.min() >= 0 and self.pool.max() <= 1
            model = VAEKernelGP(8, (128,), likelihood="bernoulli" if shares else "gaussian")
        if not isinstance(model, VAEKernelGP):
            raise OptionError(f"model={model!r} is no VAEKernelGP.")
        self.model, self.sign, self.seed = model, GOALS[objective], check_seed(seed)
        self.initial = min(check_whole("initial", initial, 2), len(self.pool))
        self.retrain, self.weighting, self.plan = float(retrain), float(weighting), plan
        self.objects = self.pool[:0]
        self.values: Float[Tensor, " n"] = torch.zeros(0, dtype=torch.float64)
        self.pending = self.pool[:0]
        self._order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(self.seed))
        self._asked = self._trained_on = 0
        self._journal = None if state is None else Journal(state)
        if self._journal is not None:
            self._replay(self._journal)

    def _replay(self, journal: Journal) -> None:
        about = {
            "objective": "maximize" if self.sign > 0 else "minimize",
            "object": list(self.pool.shape[1:]),
        }
        if not journal.entries:
            journal.append(about)
            return
        if journal.entries[0] != about:
            raise OptionError(
                f"{str(journal.path)!r} is of {journal.entries[0]}, this is of {about}; give another file."
            )
        try:
            for entry in journal.entries[1:]:
                if "values" in entry:
                    self._take(*self._checked(entry["objects"], entry["values"]))
                else:
                    asked = self._checked(entry["objects"], [0.0] * len(entry["objects"]))[0]
                    self.pending, self._asked = torch.cat([self.pending, asked]), self._asked + len(asked)
        except (DataError, KeyError, TypeError) as error:
            raise ModelFileError(f"{str(journal.path)!r} is damaged: {error}") from error

    # ---- ask and tell ---------------------------------------------------------------------------

    def ask(self, count: int = 1) -> Float[Tensor, "k *row"]:
        """Objects to try next: first of the pool, then decoded ones, chosen beside what is pending."""
        pending, asked = self.pending, self._asked
        try:
            for _ in range(check_whole("count", count)):
                if self._asked < self.initial or len(self.values) < 2:
                    new = self.pool[self._order[self._asked % len(self.pool)]][None]
                else:
                    new = self._propose()
                self._asked += 1
                self.pending = torch.cat([self.pending, new])
            proposals = self.pending[len(pending) :]
            if self._journal is not None:
                self._journal.append({"objects": proposals.tolist()})
        except BaseException:  # an interrupt too: what nobody was given nobody will try
            self.pending, self._asked = pending, asked
            raise
        return proposals

    def tell(self, objects: Any, values: Any) -> None:
        """What objects [n, *row] were worth [n], asked for or not. Raises DataError for NaN and other shapes,
        ModelFileError where the state cannot be written; then nothing is taken in."""
        x, y = self._checked(objects, values)
        if self._journal is not None:
            self._journal.append({"objects": x.tolist(), "values": y.tolist()})
        self._take(x, y)

    def _checked(self, objects: Any, values: Any) -> tuple[Float[Tensor, "n *row"], Float[Tensor, " n"]]:
        x, y = _numbers(objects, "objects").float(), _numbers(values, "values")
        if y.shape[1:] == (1,):
            y = y[:, 0]
        if x.ndim == 0 or x.shape[1:] != self.pool.shape[1:] or y.shape != x.shape[:1] or len(x) == 0:
            raise DataError(
                f"There are {y.numel()} values for objects {list(x.shape)}; they must be [n, ...] like the pool, "
                f"{list(self.pool.shape)}, with n values, which are {list(y.shape)}."
            )
        if not bool(y.isfinite().all()) or not bool(x.isfinite().all()):
            raise DataError("NaN was told. Of an object that could not be tried tell nothing.")
        if bool((y.abs() > MOST).any()):
            raise DataError(
                f"A value of {y.abs().max():g} was told, whose square overflows; take other units."
            )
        return x, y

    def _take(self, x: Float[Tensor, "n *row"], y: Float[Tensor, " n"]) -> None:
        self.objects, self.values = torch.cat([self.objects, x]), torch.cat([self.values, y])
        for row in x:
            same = (self.pending == row).flatten(1).all(1).nonzero()[:1, 0]
            keep = torch.ones(len(self.pending), dtype=torch.bool)
            keep[same] = False
            self.pending = self.pending[keep]

    @property
    def best(self) -> tuple[Float[Tensor, "*row"], float]:
        """The best object that was told, and its value. Raises DataError where nothing was told."""
        if len(self.values) == 0:
            raise DataError("Nothing was told yet.")
        i = int((self.sign * self.values).argmax())
        return self.objects[i], float(self.values[i])

    # ---- the model ------------------------------------------------------------------------------

    def train(self) -> None:
        """Train encoder, decoder and kernel anew, on rows drawn by what they are worth, or are expected to be. Raises
        DataError where fewer than two values were told."""
        rows, y = self.pool, self.sign * self.values
        if self._trained_on and not math.isinf(self.weighting):
            expected = self.posterior.latent(self.latents(self.pool)).mean.cpu()
            worth = torch.cat([expected, y])
            generator = torch.Generator().manual_seed(self.seed + len(y))
            weights = rank_weights(worth, self.weighting)
            picked = torch.multinomial(weights, len(rows), replacement=True, generator=generator)
            rows = torch.cat([self.pool, self.objects])[picked]
        data = torch.cat([rows, self.objects]).numpy()
        told = np.concatenate([np.full(len(rows), np.nan), y.numpy()])
        self.model.fit(data, told, **{"progress": False, "seed": self.seed, **self.plan})
        self.model.requires_grad_(False).eval()
        self._trained_on = len(y)

    def latents(self, objects: Float[Tensor, "n *row"]) -> Float[Tensor, "n l"]:
        """Where the encoder puts objects, in float64. Raises NotFittedError before the first training."""
        return self.model.encode(objects.numpy()).mean.double()

    def decode(self, z: Float[Tensor, "n l"]) -> Float[Tensor, "n *row"]:
        """Mean objects at latents."""
        return self._decoded(z).unflatten(1, self.pool.shape[1:]).cpu()

    def _decoded(self, z: Float[Tensor, "n l"]) -> Float[Tensor, "n d"]:
        vae = self.model.vae
        return vae.observations.mean(vae.decoder(z.float()))

    def decoded_latents(self, z: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Latents of the objects decoded from z; gradients flow to z."""
        vae = self.model.vae
        rows = vae.observations.read(self._decoded(z.flatten(0, -2)))
        return vae.encoder(rows).chunk(2, dim=-1)[0].double().reshape(z.shape)

    @property
    def posterior(self) -> GPPosterior:
        """The surrogate as a function of latents [n, l], of minus the value where that is minimised. It knows all that
        was told; encoder and kernel are those of the last training. Raises NotFittedError before the first."""
        z = self.latents(self.objects)
        inner = embedded_kernel(self.model.kernel)
        basis = Basis(inner, z[greedy_variance(inner, z, self.model.inducing)], self.model.noise)
        shift, scale = self.model.y_shift, self.model.y_scale
        site = fit_site(basis, z, ((self.sign * self.values).to(z)[:, None] - shift) / scale)
        one = torch.ones_like(z[0])
        return GPPosterior(basis, site, Scaling(one, one, 0 * one, one, shift, scale))

    def box(self) -> Float[Tensor, "2 l"]:
        """Where is searched: the box of the latents of the pool and of what was told. Raises NotFittedError before the
        first training."""
        z = torch.cat([self.latents(self.pool), self.latents(self.objects)])
        return torch.stack([z.amin(0), z.amax(0)])

    def _propose(self) -> Float[Tensor, "1 *row"]:
        if len(self.values) >= max(2.0, self.retrain * self._trained_on):
            self.train()
        seed = (self.seed + 104_729 * self._asked) % 2**31
        told = self.latents(self.objects)
        inner = acquisition(
            "qLogNEI",
            [self.posterior],
            told,
            (self.sign * self.values).to(told)[:, None],
            1,
            pending=self.latents(self.pending) if len(self.pending) else None,
            seed=seed,
        )
        function, box = _OfDecoded(inner, self.decoded_latents), self.box()
        starts = self._starts(box, told, seed)
        with torch.no_grad():
            values = torch.cat([function(part[:, None]) for part in starts.split(256)])
        first = starts[values.topk(RESTARTS).indices][:, None]
        with seeded(seed), warnings.catch_warnings():
            # a line search that ends early is no loss: what it found is compared with where it started
            warnings.filterwarnings("ignore", "Optimization failed", RuntimeWarning)
            found, value = optimize_acqf(
                function,
                box,
                q=1,
                num_restarts=RESTARTS,
                batch_initial_conditions=first,
                options={"batch_limit": RESTARTS, "maxiter": 50},
                retry_on_optimization_warning=False,
            )
        better = value is not None and bool(value > values.max())
        return self.decode(found if better else first[0])

    def _starts(self, box: Float[Tensor, "2 l"], told: Tensor, seed: int) -> Float[Tensor, "m l"]:
        """Latents of the pool, steps from the best five that were told, and points of the box."""
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(self.pool), generator=generator)[:CANDIDATES]
        best = told[(self.sign * self.values).topk(min(5, len(told))).indices]
        steps = 0.1 * torch.randn(CANDIDATES, told.shape[1], generator=generator).to(told)
        near = best[torch.randint(len(best), (CANDIDATES,), generator=generator)] + steps * (box[1] - box[0])
        anywhere = torch.rand(CANDIDATES // 2, told.shape[1], generator=generator).to(told)
        starts = torch.cat([self.latents(self.pool[some]), near, box[0] + (box[1] - box[0]) * anywhere])
        return torch.maximum(torch.minimum(starts, box[1]), box[0])


class _OfDecoded(AcquisitionFunction):  # type: ignore[misc]
    """An acquisition function at the latents of what is decoded from Z [b, q, l]."""

    def __init__(self, inner: AcquisitionFunction, decoded_latents: Callable[[Tensor], Tensor]):
        super().__init__(model=inner.model)
        self.inner, self.decoded_latents = inner, decoded_latents

    def forward(self, X: Tensor) -> Tensor:
        """The value of each batch."""
        return self.inner(self.decoded_latents(X))


def _numbers(given: Any, what: str) -> Tensor:
    """A tensor on the CPU, in float64. Raises DataError for what is not numbers of one shape."""
    try:
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"they are of {array.dtype}")
        return torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be numbers, all objects of one shape: {error}.") from error


def optimize_latent(
    f: Callable[[Tensor], Any], pool: Any, evaluations: int = 40, batch: int = 1, **options: Any
) -> LatentOptimizer:
    """Evaluate f(objects [k, *row]) -> values [k] until there are `evaluations`; options are of `LatentOptimizer`.

    After Ctrl-C what was told is given back. With state=... a run that was killed goes on, what was pending first."""
    check_callable(f, "f")
    optimizer = LatentOptimizer(pool, **options)
    check_whole("evaluations", evaluations, 2), check_whole("batch", batch)
    try:
        while len(optimizer.values) < evaluations:
            missing = min(batch, evaluations - len(optimizer.values))
            objects = optimizer.pending[:missing] if len(optimizer.pending) else optimizer.ask(missing)
            optimizer.tell(objects, f(objects))
    except KeyboardInterrupt:
        if len(optimizer.values) == 0:
            raise
        print(f"Interrupted after {len(optimizer.values)} of {evaluations}.", file=sys.stderr)
    return optimizer


def rank_weights(worth: Float[Tensor, " n"], k: float) -> Float[Tensor, " n"]:
    """1 / (k n + rank), rank 0 the best; they sum to one. Source: Tripp et al. (2020), eq. 3."""
    rank = worth.argsort(descending=True).argsort().to(torch.float64)
    weights = 1.0 / (k * len(worth) + rank)
    return weights / weights.sum()
