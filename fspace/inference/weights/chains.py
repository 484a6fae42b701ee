"""Whether chains agree: split R-hat and effective sample size, of function values rather than of weights.

Weights of a network can change places without the function changing: chains whose functions agree may have weights
that do not, so R-hat of weights says something of linear models alone.
Sources: Gelman et al. (2013, section 11.4); Geyer (1992); Stan reference manual, effective sample size.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.weights.problem import Problem

WATCHED = 64  # rows, and points halfway between rows, at which function values are watched


def split(values: Float[Tensor, "c n *k"]) -> Float[Tensor, "d m *k"]:
    """Each chain as two halves."""
    half = values.shape[1] // 2
    return torch.cat([values[:, :half], values[:, values.shape[1] - half :]])


def r_hat(values: Float[Tensor, "c n *k"]) -> Float[Tensor, "*k"]:
    """Split R-hat over chains [c] of n draws; 1 where they agree, NaN where nothing moves."""
    halves = split(values)
    n = halves.shape[1]
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return ((within * (n - 1) / n + between) / within).sqrt()


def effective_size(values: Float[Tensor, "c n *k"]) -> Float[Tensor, "*k"]:
    """Draws that would say as much if they were independent, over all chains (halves of them)."""
    halves = split(values)
    m, n = halves.shape[:2]
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=1).abs().square()
    covariance = torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n] / n
    within = halves.var(1).mean(0)
    total = within * (n - 1) / n + halves.mean(1).var(0)
    rho = 1.0 - (within - covariance.mean(0)) / total
    rho[0] = 1.0
    pairs = rho[: 2 * (n // 2)].unflatten(0, (n // 2, 2)).sum(1)
    pairs = pairs.cummin(0).values  # Geyer's initial monotone sequence
    positive = (pairs > 0).to(pairs).cumprod(0)
    tau = -1.0 + 2.0 * (pairs * positive).sum(0)
    return (
        m * n / tau.clamp(min=1.0 / math.log10(m * n))
    )  # chains that swing may do better than independent draws


@torch.no_grad()
def watch(problem: Problem, states: Float[Tensor, "c n q"]) -> None:
    """R-hat and effective size (the worst) of function values and log noises into the figures, and R-hat of weights.

    Functions are watched at up to 64 rows and halfway between as many pairs of them, for chains may agree at the data
    and not between. Sequences, which may differ in length, are watched at the rows alone.
    """
    c, n = states.shape[:2]
    if n < 4:
        return
    at = torch.randperm(problem.n, generator=problem.generator_cpu(9))[:WATCHED].to(states.device)
    x = problem.x[at]
    if x.ndim != 3:
        x = torch.cat([x, 0.5 * (x + x.roll(1, 0))])
    w, tail = problem.split(states.flatten(0, 1))
    f = torch.cat([problem.likelihood.functions(problem.network.many(part, x)) for part in w.split(256)])
    values = torch.cat([f.flatten(1), tail], dim=1).double().reshape(c, n, -1)
    problem.report.figures["rhat"] = r_hat(values).max().item()
    problem.report.figures["ess"] = effective_size(values).min().item()
    problem.report.figures["rhat_weights"] = r_hat(states.double()).max().item()
