"""Fitting: L-BFGS where the loss is deterministic, Adam for networks, a held-out part to stop on, site on all rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.collapsed import Statistics, bound_from, gather_whitened, log_evidence, site_from
from fspace.inference.exact import leave_one_out, log_marginal_likelihood
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky, solve_lower
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal

MIN_NOISE = 1e-6  # of the variance of y: below it the noise cannot be told from rounding in the data
Record = Callable[..., None]


def gaussian_likelihood(outputs: int, noise: float, device: torch.device) -> GaussianLikelihood:
    """Gaussian noise with one variance an output, in units of standardised y."""
    likelihood = GaussianLikelihood(
        noise_constraint=GreaterThan(MIN_NOISE), batch_shape=torch.Size([outputs])
    )
    likelihood = likelihood.to(device=device, dtype=torch.float64)
    likelihood.noise = torch.full((outputs, 1), noise, dtype=torch.float64, device=device)
    return likelihood


def lbfgs(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int, record: Callable[[float], None]
) -> None:
    """Minimise a deterministic loss in place; the best parameters stay, also after Ctrl-C.

    A point at which the factorisation fails counts as infinitely bad, so the line search turns back.
    """
    best = (math.inf, [p.detach().clone() for p in parameters])

    def assign(vector: np.ndarray) -> None:
        values = torch.from_numpy(vector)
        for p in parameters:
            head, values = values[: p.numel()], values[p.numel() :]
            with torch.no_grad():
                p.copy_(head.reshape(p.shape))

    def evaluate(vector: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        assign(vector)
        for p in parameters:
            p.grad = None
        try:
            value = loss()
            value.backward()
        except NumericalError:
            return 1e12, np.zeros_like(vector)
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        )
        number = value.item()
        if not (math.isfinite(number) and bool(torch.isfinite(gradient).all())):
            return 1e12, np.zeros_like(vector)
        if number < best[0]:
            best = (number, [p.detach().clone() for p in parameters])
        record(number)
        return number, gradient.double().cpu().numpy()

    start = torch.cat([p.detach().reshape(-1) for p in parameters]).double().cpu().numpy()
    try:
        minimize(
            evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxfun": 2 * steps}
        )
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, best[1]):
                p.copy_(value)


def _penalty(kernel: Kernel) -> Tensor:
    """Weak log-normal pull on every lengthscale: an input that does nothing would otherwise drift without end."""
    total = torch.zeros((), dtype=torch.float64)
    for part in kernel.modules():
        lengthscale = getattr(part, "lengthscale", None) if isinstance(part, Kernel) else None
        if lengthscale is not None:
            centre = 0.5 * math.log(lengthscale.shape[-1])
            total = total + 0.125 * (lengthscale.log() - centre).square().sum().to(total)
    return total


def fit_exact(
    kernel: Kernel,
    likelihood: GaussianLikelihood,
    z: Float[Tensor, "n p"],
    y: Float[Tensor, "n t"],
    steps: int,
    record: Record,
    stage: str,
) -> None:
    """Kernel and noise by L-BFGS on the exact log evidence of embedded rows z (maximum a posteriori)."""
    inner = embedded_kernel(kernel)
    parameters = [p for p in (*inner.parameters(), *likelihood.parameters()) if p.requires_grad]

    def loss() -> Tensor:
        evidence = log_marginal_likelihood(covariance(inner, z), y, likelihood.noise[..., 0])
        return (_penalty(inner).to(evidence.device) - evidence) / y.numel()

    lbfgs(loss, parameters, steps, lambda value: record(stage=stage, loss=value))


def refit_noise(basis: Basis, whitened: Statistics) -> Statistics:
    """Noise and signal variance on all rows, set in place; returns the statistics of the basis as it is then.

    Whitened statistics scale with the signal, so no further pass over the rows is needed.
    """
    variances = _outputscales(embedded_kernel(basis.kernel))
    identity = torch.eye(len(whitened.outer), dtype=torch.float64, device=whitened.outer.device)
    log_scale = torch.zeros(1, dtype=torch.float64, device=identity.device, requires_grad=True)

    def scaled() -> Statistics:
        s = log_scale.exp()
        cross = s.sqrt() * whitened.cross
        return Statistics(
            s * whitened.outer, cross, whitened.squares, (s * whitened.trace)[0], whitened.count
        )

    def loss() -> Tensor:
        return -bound_from(scaled(), identity, basis.likelihood.noise[..., 0]) / (
            whitened.count * whitened.squares.numel()
        )

    lbfgs(loss, [*basis.likelihood.parameters(), *([log_scale] if variances else [])], 25, lambda value: None)
    with torch.no_grad():
        for scale in variances:
            scale.outputscale = scale.outputscale * log_scale.exp()[0].to(scale.outputscale.dtype)
        return scaled()


def _outputscales(kernel: Kernel) -> list[Any]:
    """The Scale kernels that together multiply the whole kernel; none if a part has no variance of its own."""
    from gpytorch.kernels import AdditiveKernel, ScaleKernel

    from fspace.kernels.deep import SplitKernel

    if isinstance(kernel, ScaleKernel):
        return [kernel]
    parts = (
        list(kernel.kernels)
        if isinstance(kernel, AdditiveKernel)
        else [kernel.base, kernel.plain]
        if isinstance(kernel, SplitKernel)
        else []
    )
    found = [_outputscales(part) for part in parts]
    return [s for part in found for s in part] if found and all(found) else []


def fit_network(
    kernel: DeepKernel,
    likelihood: GaussianLikelihood,
    x: Tensor,
    y: Float[Tensor, "n t"],
    held_out: Tensor,
    steps: int,
    record: Record,
    stage: str,
    generator: torch.Generator,
    inducing: int = 128,
    batch: int = 4096,
) -> float:
    """Network, kernel and noise by Adam on the collapsed bound over random batches; stops on the held-out rows.

    A few inducing rows move with the features and are chosen anew as these move. Returns the held-out mean log
    density of the state kept (the best seen). The batch objective is not a bound on the evidence of all rows; the
    caller refits noise and signal on all of them.
    """
    rest = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    rest[held_out] = False
    rows = rest.nonzero()[:, 0]
    network = list(kernel.extractor.parameters())
    ids = {id(p) for p in network}
    others = [p for p in (*kernel.parameters(), *likelihood.parameters()) if id(p) not in ids]
    optimiser = torch.optim.AdamW(
        [
            {"params": network, "lr": 3e-3, "weight_decay": 1e-2},
            {"params": others, "lr": 2e-2, "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    best, best_state, since = -math.inf, None, 0
    every = max(10, steps // 40)
    chosen = rows[:inducing]
    kernel.train()
    try:
        for step in range(steps):
            if step in (5, 25) or step % 100 == 0:
                pool = rows[
                    torch.randperm(len(rows), generator=generator)[: max(2048, inducing)].to(rows.device)
                ]
                with torch.no_grad():
                    chosen = pool[greedy_variance(kernel.on_embedding, kernel.embed(x[pool]), inducing)]
            pick = rows
            if len(rows) > batch:
                pick = rows[torch.randint(len(rows), (batch,), generator=generator).to(rows.device)]
            optimiser.zero_grad()
            try:
                loss = -_batch_bound(kernel, likelihood, x, y, pick, chosen, len(rows)) / (
                    len(rows) * y.shape[1]
                )
                loss.backward()
            except NumericalError:
                if best_state is None:
                    raise
                break
            torch.nn.utils.clip_grad_norm_(network, 10.0)
            optimiser.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                score = _held_out_score(kernel, likelihood, x, y, pick, chosen, held_out, len(rows))
                record(stage=stage, loss=loss.item(), held_out=score)
                since += 1
                if score > best:
                    best, since = score, 0
                    best_state = copy.deepcopy((kernel.state_dict(), likelihood.state_dict()))
                if since >= 12:
                    break
    finally:
        if best_state is not None:
            kernel.load_state_dict(best_state[0])
            likelihood.load_state_dict(best_state[1])
        kernel.eval()
    if best_state is None:
        raise NumericalError(
            "The deep kernel never reached a finite held-out score; try kernel='matern', or scale the inputs."
        )
    return best


def _batch_bound(kernel, likelihood, x, y, pick, chosen, total) -> Tensor:  # type: ignore[no-untyped-def]
    z = kernel.embed(torch.cat([x[pick], x[chosen]]))  # one pass, so both see the same feature statistics
    inner, batch, inducing = kernel.on_embedding, z[: len(pick)], z[len(pick) :]
    stats = _embedded_statistics(inner, inducing, batch, y[pick])
    return bound_from(
        stats, covariance(inner, inducing), likelihood.noise[..., 0], total / len(pick)
    ) - _penalty(inner)


def _embedded_statistics(inner: Kernel, inducing: Tensor, z: Tensor, y: Tensor) -> Statistics:
    cross = covariance(inner, inducing, z)
    return Statistics(cross @ cross.mT, cross @ y, y.square().sum(0), diagonal(inner, z).sum(), y.shape[0])


@torch.no_grad()
def _held_out_score(kernel, likelihood, x, y, pick, chosen, held_out, total) -> float:  # type: ignore[no-untyped-def]
    kernel.eval()
    inner, inducing = kernel.on_embedding, kernel.embed(x[chosen])
    stats = _embedded_statistics(inner, inducing, kernel.embed(x[pick]), y[pick])
    scale = total / len(pick)
    stats = Statistics(
        scale * stats.outer, scale * stats.cross, scale * stats.squares, scale * stats.trace, total
    )
    factor, _ = cholesky(covariance(inner, inducing), "kernel matrix of the inducing inputs", FIRST_JITTER)
    a = solve_lower(factor, solve_lower(factor, stats.outer).mT)
    noise = likelihood.noise[..., 0]
    shift = solve_lower(factor, stats.cross).T / noise[:, None]
    mean, variance = latent_moments(
        a / noise[:, None, None], shift, factor, inner, inducing, kernel.embed(x[held_out])
    )
    variance = variance + noise[:, None]
    kernel.train()
    errors = y[held_out].T - mean
    return (-0.5 * (2 * math.pi * variance).log() - 0.5 * errors.square() / variance).mean().item()


def latent_moments(precision, shift, factor, inner, inducing, z):  # type: ignore[no-untyped-def]
    """Mean and variance [t, n] of f at embedded rows z, from natural parameters in whitened coordinates."""
    v = solve_lower(factor, covariance(inner, inducing, z))
    identity = torch.eye(v.shape[0], dtype=v.dtype, device=v.device)
    inside, _ = cholesky(identity + precision, "I + site precision")
    w = solve_lower(inside, v.expand(precision.shape[0], *v.shape))
    c = solve_lower(inside, shift[..., None])
    variance = diagonal(inner, z) - v.square().sum(0) + w.square().sum(1)
    return (w.mT @ c)[..., 0], variance.clamp(min=0.0)


def loo_scores(
    kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, y: Float[Tensor, "n t"]
) -> Float[Tensor, " n"]:
    """Closed-form leave-one-out log density of every row (nats, standardised y), summed over outputs."""
    with torch.no_grad():
        mean, variance = leave_one_out(
            covariance(embedded_kernel(kernel), embed(kernel, x)), y, likelihood.noise[..., 0]
        )
        return (-0.5 * (2 * math.pi * variance).log() - 0.5 * (y - mean).square() / variance).sum(-1)


def finish(
    kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, y: Float[Tensor, "n t"], most: int, exact: bool
) -> tuple[Basis, Site, float]:
    """Basis and site on all rows, and the log evidence. exact: induce on every row, with the parameters as they are."""
    kernel.eval()
    likelihood.eval()
    for p in (*kernel.parameters(), *likelihood.parameters()):
        p.grad = None
    with torch.no_grad():
        if exact:
            z = embed(kernel, x)
        else:
            pool = torch.arange(y.shape[0], device=y.device)
            if len(pool) > 10 * most:  # greedy choice is O(n m^2): a stride of rows is as good a pool
                pool = pool[:: max(1, len(pool) // (10 * most))]
            candidates = embed(kernel, x[pool])
            z = candidates[greedy_variance(embedded_kernel(kernel), candidates, most)]
    basis = Basis(kernel, z, likelihood)
    whitened = gather_whitened(basis, x, y)
    if not exact:
        whitened = refit_noise(basis, whitened)
    for p in (*kernel.parameters(), *likelihood.parameters()):
        p.requires_grad_(False)
    basis = Basis(kernel, z, likelihood)  # a new one: the parameters may have moved
    site = site_from(basis, whitened)
    return basis, site, log_evidence([site])
