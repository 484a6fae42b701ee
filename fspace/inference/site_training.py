"""Kernel, network and noise learned from minibatches, with a running site that natural gradients move along."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.basis import FIRST_JITTER, Site
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import (
    AnyLikelihood,
    OffsetLikelihood,
    functions,
    predictive_log_density,
)
from fspace.inference.numerics import cholesky_unseen, solve_lower
from fspace.inference.optimise import log_prior
from fspace.inference.sites import Rows, blend, bound_and_site, elbo, marginals, moved
from fspace.inference.source import Inputs
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal

PATIENCE = 6  # epochs without a better held-out score before training ends
SETTLED, LITTLE = (
    15,
    5e-4,
)  # steps that gain less than so many nats a value together end the training on all rows
POOL = 2048  # random rows among which inducing inputs are chosen
HALVINGS = 8  # of a natural step that would lower the bound of its batch


def fit_sites(
    kernel: Kernel,
    likelihood: AnyLikelihood,
    x: Inputs | np.ndarray,
    y: Tensor | np.ndarray,
    inducing: int,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    record: Callable[..., None],
    weight: Tensor | np.ndarray | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    stage: str = "sites",
) -> None:
    """Kernel, network and noise, in place, from batches of rows that need not fit memory (x, y may be memory-mapped).

    Each batch gives an Adam step (AdamW on a network) on the bound whose site, as a function of u, stays put while the
    kernel moves, and a natural step of rate r_k = max(1 / (k + 1), B / N, B / (50 M)): the first averages, the second
    remembers about one epoch, the third forgets old kernels where an epoch is long (the noise in q then costs about
    r M / (4 B) = .005 nats a row). Where the likelihood is not Gaussian, a natural step that lowers the bound of its
    batch is halved until it does not. Inducing inputs are rows, chosen again as the kernel moves. No site is returned:
    the caller makes it from all rows (`collapsed.fit_site`, `sites.converge`).

    held_out: x and y of rows that are not trained on: the state of the epoch that predicts them best is kept, and
    training ends after PATIENCE epochs without a better one; without them the last epoch's is.
    Shapes: x [n, d] (or images, sequences), y [n, t], weight [n] (how often a row counts). In the first 10 M rows only
    the site learns. Raises NumericalError if that happens in the first epoch; later, like Ctrl-C, it ends the fit at
    the last epoch that was kept. Source: Adam et al. (2021), the "tighter bound".
    """
    n = len(y)
    mass = float(n if weight is None else weight.sum())
    per_epoch = math.ceil(n / batch)
    floor = min(1.0, batch * max(1.0 / n, 0.02 / inducing))
    warm = min(per_epoch, math.ceil(10 * inducing / batch))
    optimiser = _optimiser(kernel, likelihood)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch, eta_min=1e-4)
    running: _Running | None = None
    device = next(likelihood.parameters()).device
    kept, best, best_epoch = None, -math.inf, 0
    means: list[float] = []
    kernel.train()
    try:
        for epoch in range(epochs):
            losses = []
            for k, batch_rows in enumerate(_batches(n, per_epoch, generator, device)):
                step = epoch * per_epoch + k
                if running is None or step in (5, 25) or step % 100 == 0:
                    some = torch.randperm(n, generator=generator)[: max(POOL, inducing)].sort().values
                    pool = _read(x, (some, some.to(device)), device)
                    if running is None:
                        running = _Running(kernel, likelihood, n, mass, pool, inducing)
                    else:
                        running.choose(pool, inducing)
                optimiser.zero_grad()
                rows = _read(x, batch_rows, device), _read(y, batch_rows, device).to(torch.float64)
                counts = None if weight is None else _read(weight, batch_rows, device).to(torch.float64)
                loss = running.step(*rows, counts, max(1.0 / (step + 1), floor))
                if step < warm:  # under an empty site the bound pulls the kernel towards nothing
                    continue
                losses.append(loss)
                for group in optimiser.param_groups[1:]:
                    torch.nn.utils.clip_grad_norm_(group["params"], 10.0)
                optimiser.step()
                schedule.step()
            loss_now = torch.stack(losses).mean().item() if losses else 0.0
            if not math.isfinite(loss_now):
                raise NumericalError(
                    f"The loss became {loss_now} in epoch {epoch + 1}: a covariance of the inducing inputs could not "
                    "be factorised, or a parameter has overflowed. Scale the inputs, or use another kernel."
                )
            score = 0.0 if held_out is None or running is None else running.score(*held_out)
            if held_out is None or score > best or kept is None:
                kept, best, best_epoch = (
                    copy.deepcopy((kernel.state_dict(), likelihood.state_dict())),
                    score,
                    epoch,
                )
            if losses:
                means.append(loss_now)
                entry = {} if held_out is None else {"held_out": score, "done": epoch + 1, "total": epochs}
                record(stage=stage, loss=means[-1], **entry)
            if held_out is not None and epoch - best_epoch >= PATIENCE:
                break
            if per_epoch == 1 and len(means) > SETTLED and means[-1] > means[-1 - SETTLED] - LITTLE:
                break  # every step sees all rows: the loss is exact
        if held_out is not None and kept is not None:
            _restore(kernel, likelihood, kept)
    except (NumericalError, KeyboardInterrupt) as error:
        if kept is None:
            raise
        _restore(kernel, likelihood, kept)
        interrupted = isinstance(error, KeyboardInterrupt)
        record(stage=stage, **({"interrupted": True} if interrupted else {"failed": str(error)}))
    finally:
        kernel.eval()


def _restore(kernel: Kernel, likelihood: AnyLikelihood, kept: tuple[dict, dict]) -> None:
    kernel.load_state_dict(kept[0])
    likelihood.load_state_dict(kept[1])


def _optimiser(kernel: Kernel, likelihood: AnyLikelihood) -> torch.optim.AdamW:
    """Kernel and noise in the first group of parameters; a network, with weight decay, in the second."""
    network = list(kernel.extractor.parameters()) if isinstance(kernel, DeepKernel) else []
    ids = {id(p) for p in network}
    others = [p for p in (*kernel.parameters(), *likelihood.parameters()) if id(p) not in ids]
    groups = [{"params": [p for p in others if p.requires_grad], "lr": 5e-2, "weight_decay": 0.0}]
    if network:
        groups.append({"params": [p for p in network if p.requires_grad], "lr": 3e-3, "weight_decay": 1e-2})
    # fused: the count of steps is kept on the device
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _batches(
    n: int, count: int, generator: torch.Generator, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """All rows in random batches: the numbers of each, on the host and on the device, copied there at once.

    They increase within a batch: a memory-mapped file is then read forwards.
    """
    parts = [part.sort().values for part in torch.randperm(n, generator=generator).tensor_split(count)]
    return list(zip(parts, torch.cat(parts).to(device).tensor_split(count)))


def _read(rows: Inputs | np.ndarray, index: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """These rows on the device, copied there from the host if they are not there; index as `_batches` has it."""
    if isinstance(rows, Tensor) and rows.device == device:
        return rows[index[1]]
    return torch.as_tensor(
        rows[index[0].numpy() if isinstance(rows, np.ndarray) else index[0]], device=device
    )


class _Running:
    """The running site, the raw inducing rows it is about, and the factor of K_uu in whose coordinates it is given."""

    def __init__(
        self,
        kernel: Kernel,
        likelihood: AnyLikelihood,
        total: int,
        mass: float,
        pool: Tensor,
        most: int,
    ):
        self.kernel, self.likelihood, self.total, self.mass = kernel, likelihood, total, mass
        with torch.no_grad():
            chosen, self.factor = self._pick(embed(kernel, pool), most)
        self.rows = pool[chosen]
        zeros = self.factor.new_zeros(functions(likelihood), len(chosen), len(chosen))
        self.site = Site("moving", zeros, zeros[..., 0], zeros[:, 0, 0], 0)

    def _pick(self, z: Float[Tensor, "n p"], most: int) -> tuple[Tensor, Float[Tensor, "m m"]]:
        inner = embedded_kernel(self.kernel)
        chosen = greedy_variance(inner, z, most)
        return chosen, self._factor(z[chosen])

    def _factor(self, z: Float[Tensor, "m p"]) -> Float[Tensor, "m m"]:
        k = covariance(embedded_kernel(self.kernel), z)
        return cholesky_unseen(k, "kernel matrix of the inducing inputs", FIRST_JITTER)[0]

    @torch.no_grad()
    def choose(self, pool: Tensor, most: int) -> None:
        """Other inducing rows, out of the pool; the site is carried over by the conditional prior mean."""
        z = embed(self.kernel, torch.cat([pool, self.rows]))
        new, old = z[: len(pool)], z[len(pool) :]
        chosen, factor = self._pick(new, most)
        cross = covariance(embedded_kernel(self.kernel), new[chosen], old)
        self.site = moved(self.site, solve_lower(self.factor, solve_lower(factor, cross).mT))
        self.rows, self.factor = pool[chosen], factor

    def step(
        self, x: Tensor, y: Float[Tensor, "n t"], weight: Tensor | None, rate: float
    ) -> Float[Tensor, ""]:
        """Gradients of the loss (nats a value) on one batch, added to `.grad`; then the batch's natural step.

        The gradient comes first: with a site that has seen the batch it would not be that of all rows on average.
        """
        rows, factor = self._seen(x, y, weight)
        site = moved(self.site, solve_lower(self.factor, factor))
        bound, batch = bound_and_site(site, self.likelihood, rows, self.total)
        loss = -(bound + log_prior(embedded_kernel(self.kernel))) / (self.mass * y.shape[1])
        loss.backward()
        with torch.no_grad():
            still = moved(self.site, solve_lower(self.factor, factor))
            self.site = self._stepped(still, batch, rows, rate, bound.detach())
            self.factor = factor.detach()
        return loss.detach()

    def _seen(self, x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Rows, Float[Tensor, "m m"]]:
        z = embed(self.kernel, torch.cat([x, self.rows]))  # one pass, so both see the same feature statistics
        inner = embedded_kernel(self.kernel)
        rows, inducing = z[: len(x)], z[len(x) :]
        factor = self._factor(inducing)
        v = solve_lower(factor, covariance(inner, inducing, rows))
        return Rows(v, diagonal(inner, rows), y, weight), factor

    def _stepped(self, site: Site, batch: Site, rows: Rows, rate: float, before: Tensor) -> Site:
        """A natural step; where the likelihood is not Gaussian, halved until the batch's bound is not lower, which
        the host asks the device for once a try, nearly always once."""
        step = blend(site, batch, rate)
        if not isinstance(self.likelihood, OffsetLikelihood):
            return step
        for _ in range(HALVINGS):
            after = elbo(step, self.likelihood, rows, self.total)
            if torch.isfinite(after) & (after >= before):
                return step
            rate *= 0.5
            step = blend(site, batch, rate)
        return site

    @torch.no_grad()
    def score(self, x: Tensor, y: Float[Tensor, "h t"]) -> float:
        """Mean log density of rows that were not trained on."""
        self.kernel.eval()
        rows, factor = self._seen(x, y, None)
        site = moved(self.site, solve_lower(self.factor, factor))
        self.kernel.train()
        return predictive_log_density(self.likelihood, y, *marginals(site, rows)).mean().item()
