"""Training of a deep kernel's network: a linear head's error first, then the bound over random batches.

The error (squared, or minus the log likelihood) under a linear head finds good features many times sooner than the
bound does. The bound then shapes them for the kernel, with few inducing inputs: more make a step slower and train no
better. Both stop on held-out rows. The batch objective is no bound on the evidence of all rows; the caller sets noise
and signal by rows not trained on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float, Int
from torch import Tensor, nn

from fspace.errors import NumericalError
from fspace.inference.basis import FIRST_JITTER
from fspace.inference.collapsed import Statistics, bound_from
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import OffsetLikelihood, functions
from fspace.inference.numerics import cholesky, cholesky_unseen, seeded, solve_lower
from fspace.inference.optimise import Record, kernel_penalty
from fspace.inference.site_training import fit_sites
from fspace.inference.source import Inputs, placed
from fspace.kernels.deep import DeepKernel
from fspace.kernels.evaluate import covariance, diagonal

INDUCING = 128  # of the training batches
BATCH = 2048
JUDGED = 4096  # rows behind held-out scores: the same at every look, or chance would stop the training
RENEWED = 50  # steps for which inducing rows are kept
CHECKS = 20  # looks at the held-out rows a phase
SITE_STEPS, SITE_BATCH = 300, 1024  # minibatches of a likelihood that is not Gaussian
PATIENCE = 6  # looks without a better one before a phase ends


def fit_network(
    kernel: DeepKernel,
    likelihood: GaussianLikelihood,
    x: Inputs,
    y: Float[Tensor, "n t"],
    held_out: Int[Tensor, " h"],
    record: Record,
    stage: str,
    generator: torch.Generator,
) -> bool:
    """Train network, kernel and noise in place on the rows not held out; the best state seen stays.

    Returns False after Ctrl-C, which also ends the training with the best state. Raises NumericalError when no
    finite state was reached.
    """
    rest = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    rest[held_out] = False
    rows = rest.nonzero()[:, 0]
    kernel.train()
    try:
        error = _pretrain(kernel, x, y, rows, held_out, record, stage, generator, y.shape[1], _squared_error)
        likelihood.noise = error.clamp(1e-4, 1.0)[:, None].to(likelihood.noise)
        _tune(kernel, likelihood, x, y, rows, held_out, record, stage, generator)
    except KeyboardInterrupt:
        record(stage=stage, interrupted=True)
        return False
    finally:
        kernel.eval()
    return True


def fit_network_sites(
    kernel: DeepKernel,
    likelihood: OffsetLikelihood,
    x: Inputs,
    y: Float[Tensor, "n t"],
    weight: Float[Tensor, " n"] | None,
    rows: Int[Tensor, " r"],
    held_out: Int[Tensor, " h"],
    record: Record,
    stage: str,
    generator: torch.Generator,
) -> bool:
    """The same for a likelihood that is not Gaussian: its log density under a linear head, then sites by minibatches.

    Returns False after Ctrl-C, which also ends the training with the best state.
    """

    def loss(values: Tensor, target: Tensor) -> Tensor:
        return -likelihood.row_log_density(target, values.to(torch.float64))

    kernel.train()
    try:
        _pretrain(kernel, x, y, rows, held_out, record, stage, generator, functions(likelihood), loss, weight)
    except KeyboardInterrupt:
        record(stage=stage, interrupted=True)
        return False
    finally:
        kernel.eval()
    batch = min(SITE_BATCH, len(rows))
    epochs = max(2, min(40, SITE_STEPS * batch // len(rows)))
    fit_sites(
        kernel,
        likelihood,
        x[rows],
        y[rows],
        INDUCING,
        epochs,
        batch,
        generator,
        record,
        None if weight is None else weight[rows],
        (x[held_out], y[held_out]),
        stage,
    )
    return True


def _squared_error(values: Tensor, target: Tensor) -> Tensor:
    return (values - target).square()


class _Best:
    """The best state of some modules by a score, put back at the end."""

    def __init__(self, *modules: nn.Module):
        self.modules, self.score, self.since = modules, -math.inf, 0
        self.states = [copy.deepcopy(m.state_dict()) for m in modules]

    def look(self, score: float) -> bool:
        """Take note of a score; True when it is time to stop."""
        self.since += 1
        if score > self.score:
            self.score, self.since = score, 0
            self.states = [copy.deepcopy(m.state_dict()) for m in self.modules]
        return self.since >= PATIENCE

    def restore(self) -> None:
        for module, state in zip(self.modules, self.states):
            module.load_state_dict(state)


def _pretrain(  # type: ignore[no-untyped-def]
    kernel, x, y, rows, held_out, record, stage, generator, outputs, loss_of, weight=None
) -> Float[Tensor, " t"]:
    """The extractor under a throw-away linear head of so many outputs; returns the mean held-out loss.

    loss_of(values, target) gives the loss of every row (and output).
    """
    batch = min(512, max(32, len(rows) // 16))
    steps = min(4000, max(800, 100 * len(rows) // batch))
    with torch.no_grad():
        width = kernel.raw_features(x[rows[:2]]).shape[-1]
    parameters = [p for p in kernel.extractor.parameters() if p.requires_grad]
    dtype = parameters[0].dtype if parameters else torch.float32
    with seeded(int(torch.randint(2**31, (1,), generator=generator))):
        head = nn.Linear(width, outputs).to(device=y.device, dtype=dtype)
    optimiser = torch.optim.AdamW([*parameters, *head.parameters()], lr=1e-2, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    best = _Best(kernel.extractor, head)
    target = y.to(dtype)
    between = steps // CHECKS

    def errors(part: Tensor) -> Float[Tensor, " t"]:
        blocks = [loss_of(head(kernel.raw_features(x[b])), target[b]) for b in part.split(JUDGED)]
        return torch.cat(blocks).mean(0)

    try:
        for step in range(steps):
            if step % between == 0:
                picks = _picks(rows, min(between, steps - step), batch, generator)
                places = placed(x, picks)
            pick, place = picks[step % between], places[step % between]
            optimiser.zero_grad()
            losses = loss_of(head(kernel.raw_features(x[place])), target[pick])
            loss = losses.mean() if weight is None else (losses.mT * weight[pick]).mean()
            loss.backward()
            optimiser.step()
            schedule.step()
            if (step + 1) % between == 0:
                kernel.extractor.eval()
                with torch.no_grad():
                    score = -errors(held_out).mean().item()
                kernel.extractor.train()
                enough = best.look(score)  # before `record`, which may raise KeyboardInterrupt
                record(
                    stage=f"{stage}: features", loss=loss.item(), held_out=score, done=step + 1, total=steps
                )
                if enough:
                    break
    finally:
        best.restore()
    kernel.fix_statistics(x[rows[:JUDGED]])
    with torch.no_grad():
        return errors(held_out)


def _picks(rows: Int[Tensor, " r"], steps: int, batch: int, generator: torch.Generator) -> Int[Tensor, "s b"]:
    """Random rows for so many steps, which are copied to the device at once."""
    return rows[torch.randint(len(rows), (steps, batch), generator=generator).to(rows.device)]


def _tune(kernel, likelihood, x, y, rows, held_out, record, stage, generator, steps=200) -> None:  # type: ignore[no-untyped-def]
    """Network, kernel and noise by Adam on the batch bound; inducing rows are chosen anew as the features move."""
    network = [p for p in kernel.extractor.parameters() if p.requires_grad]
    ids = {id(p) for p in kernel.extractor.parameters()}
    others = [
        p for p in (*kernel.parameters(), *likelihood.parameters()) if id(p) not in ids and p.requires_grad
    ]
    groups = [
        {"params": network, "lr": 1e-3, "weight_decay": 0.1},
        {"params": others, "lr": 3e-2, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-5)
    best = _Best(kernel, likelihood)
    chosen, between = rows[:INDUCING], steps // CHECKS
    judged = rows[torch.randperm(len(rows), generator=generator)[:JUDGED].to(rows.device)]
    try:
        for step in range(steps):
            if step % RENEWED == 0:
                pool = rows[torch.randperm(len(rows), generator=generator)[:2048].to(rows.device)]
                with torch.no_grad():
                    chosen = pool[greedy_variance(kernel.on_embedding, kernel.embed(x[pool]), INDUCING)]
                some = min(RENEWED, steps - step)
                picks = _picks(rows, some, BATCH, generator) if len(rows) > BATCH else rows.expand(some, -1)
                places, inducing = placed(x, picks), placed(x, chosen)
            pick = picks[step % RENEWED]
            z = kernel.embed(
                torch.cat([x[places[step % RENEWED]], x[inducing]])
            )  # both see the same statistics
            optimiser.zero_grad()
            bound = _batch_bound(kernel, likelihood, z[: len(pick)], z[len(pick) :], y[pick], len(rows))
            loss = -bound / (len(rows) * y.shape[1])
            loss.backward()
            nn.utils.clip_grad_norm_(network, 10.0)
            optimiser.step()
            schedule.step()
            if (step + 1) % between == 0:
                score = _held_out_score(kernel, likelihood, x, y, judged, chosen, held_out, len(rows))
                enough = best.look(score)
                record(stage=stage, loss=loss.item(), held_out=score, done=step + 1, total=steps)
                if enough:
                    break
    except NumericalError:  # the best state so far is a good one, if there is one
        if best.score == -math.inf:
            raise
    finally:
        best.restore()
    if best.score == -math.inf:
        raise NumericalError(
            "The deep kernel never reached a finite held-out score; try kernel='matern', or scale the inputs."
        )


def _batch_bound(kernel, likelihood, z, inducing, y, total) -> Tensor:  # type: ignore[no-untyped-def]
    inner, noise = kernel.on_embedding, likelihood.noise[..., 0]
    _, stats = _whitened(inner, inducing, z, y, cholesky_unseen)
    identity = torch.eye(len(stats.outer), dtype=noise.dtype, device=noise.device)
    bound = bound_from(stats, identity, noise, total / len(y), cholesky_unseen)
    return bound - kernel_penalty(inner)


def _whitened(
    inner: Kernel,
    inducing: Tensor,
    z: Tensor,
    y: Tensor,
    factorise: Callable[..., tuple[Tensor, Any]] = cholesky,
) -> tuple[Tensor, Statistics]:
    """Factor of the inducing inputs' kernel matrix, and whitened statistics: their outer product is positive
    semi-definite by construction, however alike the features of the inducing rows have become."""
    factor, _ = factorise(covariance(inner, inducing), "kernel matrix of the inducing inputs", FIRST_JITTER)
    v = solve_lower(factor, covariance(inner, inducing, z))
    return factor, Statistics(v @ v.mT, v @ y, y.square().sum(0), diagonal(inner, z).sum(), y.shape[0])


@torch.no_grad()
def _held_out_score(kernel, likelihood, x, y, pick, chosen, held_out, total) -> float:  # type: ignore[no-untyped-def]
    """Mean log density of the held-out rows under the posterior of rows `pick`, counted as if they were all."""
    kernel.eval()
    inner, inducing, scale = kernel.on_embedding, kernel.embed(x[chosen]), total / len(pick)
    factor, stats = _whitened(inner, inducing, kernel.embed(x[pick]), y[pick])
    noise = likelihood.noise[..., 0]
    identity = torch.eye(len(factor), dtype=noise.dtype, device=noise.device)
    inside, _ = cholesky(identity + scale * stats.outer / noise[:, None, None], "I + A / noise")
    z = kernel.embed(x[held_out])
    v = solve_lower(factor, covariance(inner, inducing, z))
    w = solve_lower(inside, v.expand(len(noise), *v.shape))
    c = solve_lower(inside, (scale * stats.cross.T / noise[:, None])[..., None])
    variance = (diagonal(inner, z) - v.square().sum(0) + w.square().sum(1)).clamp(min=0.0) + noise[:, None]
    errors = y[held_out].T - (w.mT @ c)[..., 0]
    kernel.train()
    return (-0.5 * (2 * math.pi * variance).log() - 0.5 * errors.square() / variance).mean().item()
