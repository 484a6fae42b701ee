"""Sites learned from minibatches by natural gradients, and kernel parameters along with them.

Every row says beta_i and s_i about its own function value, and with a_i = L^-1 k_u(x_i) a batch of B of N rows moves
the running site t(v) = exp(b'v - v' Lambda v / 2) by
    Lambda <- (1 - r) Lambda + r N/B sum beta_i a_i a_i',    b <- (1 - r) b + r N/B sum s_i a_i,
    beta_i = -2 g2_i,    s_i = g1_i + beta_i m_i,
with g1, g2 the derivatives of E_q log p(y_i | f_i) in the marginal mean m_i and variance of f_i. Only non-negative
multiples of a a' are ever added, so Lambda is positive semi-definite. For Gaussian noise beta = 1 / s2 and s = y / s2
whatever q is: all rows at rate 1 give the collapsed site in one step.
Sources: Khan and Lin (2017), conjugate-computation variational inference; Adam, Chang, Khan and Solin (2021), dual
parameterization of sparse variational Gaussian processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky, solve_lower
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal

POOL = 2048  # random rows among which inducing inputs are chosen


def expected_log_likelihood(
    likelihood: GaussianLikelihood,
    y: Float[Tensor, "n t"],
    mean: Float[Tensor, "t n"],
    variance: Float[Tensor, "t n"],
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """E log p(y_i | f_i) under f_i ~ N(mean, variance), and its derivatives g1, g2 in mean and variance.

    The one place that knows the likelihood. Shapes: y [n, t], mean and variance [t, n] -> three times [t, n].
    """
    noise = likelihood.noise  # [t, 1]
    error = y.mT - mean
    value = -0.5 * (torch.log(2.0 * math.pi * noise) + (error.square() + variance) / noise)
    return value, error / noise, (-0.5 / noise).expand_as(mean)


def empty_site(basis: Basis, outputs: int) -> Site:
    """The site that says nothing, for natural steps to start from."""
    m = basis.inducing_inputs.shape[0]
    zeros = basis.factor.new_zeros(outputs, m, m)
    return Site(basis.id, zeros, zeros[..., 0], zeros[:, 0, 0], 0)


def natural_step(
    site: Site, basis: Basis, x: Tensor, y: Float[Tensor, "n t"], total: int, rate: float
) -> Site:
    """The running site after one natural-gradient step on a batch x [n, d], y [n, t] of `total` rows.

    With all rows and rate 1 this is `collapsed.fit_site`. Raises OptionError for a site of another basis.
    Source: Adam et al. (2021).
    """
    if site.basis_id != basis.id:
        raise OptionError(
            f"Site {site.site_id!r} belongs to basis {site.basis_id[:8]}, not {basis.id[:8]}; "
            "start from `empty_site` of this basis."
        )
    with torch.no_grad():
        z = basis.embed(x)
        batch = batch_site(site, basis.likelihood, basis.whiten(z), basis.prior_variance(z), y, total)
    return blend(site, batch, rate)


def blend(site: Site, batch: Site, rate: float) -> Site:
    """(1 - rate) site + rate batch."""
    return replace(
        batch,
        precision=(1.0 - rate) * site.precision + rate * batch.precision,
        shift=(1.0 - rate) * site.shift + rate * batch.shift,
        log_scale=(1.0 - rate) * site.log_scale + rate * batch.log_scale,
    )


def batch_site(
    site: Site,
    likelihood: GaussianLikelihood,
    v: Float[Tensor, "m n"],
    prior: Float[Tensor, " n"],
    y: Float[Tensor, "n t"],
    total: int,
) -> Site:
    """What `total` rows like these n would say, where the running `site` gives the posterior.

    Shapes: v [m, n] whitened rows, prior [n] their variances, y [n, t]. log_scale is chosen so that the log evidence
    of the result is the evidence lower bound wherever this is a fixed point.
    """
    mean, variance, known = _marginals(site, v, prior)
    value, g1, g2 = expected_log_likelihood(likelihood, y, mean, variance)
    beta = (-2.0 * g2).clamp(
        min=0.0
    )  # negative where a likelihood is not log-concave: such a row says nothing
    target = g1 + beta * mean
    scale = total / y.shape[0]
    root = v * beta.sqrt()[:, None, :]
    rest = value - target * mean + 0.5 * beta * (mean.square() + known)
    return replace(
        site,
        precision=scale * root @ root.mT,
        shift=scale * target @ v.mT,
        log_scale=scale * rest.sum(-1),
        count=total,
    )


def elbo(
    site: Site,
    likelihood: GaussianLikelihood,
    v: Float[Tensor, "m n"],
    prior: Float[Tensor, " n"],
    y: Float[Tensor, "n t"],
    total: int,
) -> Float[Tensor, ""]:
    """Evidence lower bound (nats, all outputs) of q(v) prop. to N(v; 0, I) t(v), the n rows standing for `total`.

    Shapes as in `batch_site`; differentiable. Unbiased over random batches, and at the collapsed site the collapsed
    bound. Source: Hensman et al. (2013).
    """
    mean, variance, _ = _marginals(site, v, prior)
    value, _, _ = expected_log_likelihood(likelihood, y, mean, variance)
    inner = _inner(site)
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    centre = torch.cholesky_solve(site.shift[..., None], inner)
    divergence = (
        0.5 * (solve_lower(inner, eye).square().sum((-2, -1)) + centre.square().sum((-2, -1)))
        - 0.5 * inner.shape[-1]
        + inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    )
    return total / y.shape[0] * value.sum() - divergence.sum()


def _inner(site: Site) -> Float[Tensor, "t m m"]:
    eye = torch.eye(site.shift.shape[-1], dtype=site.shift.dtype, device=site.shift.device)
    return cholesky(eye + site.precision, "I + site precision")[0]


def _marginals(
    site: Site, v: Float[Tensor, "m n"], prior: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """Mean and variance [t, n] of f, and the part a'Sa of the variance that inducing values account for."""
    inner = _inner(site)
    w = solve_lower(inner, v.expand(len(inner), *v.shape))
    mean = (w.mT @ solve_lower(inner, site.shift[..., None]))[..., 0]
    known = w.square().sum(-2)
    return mean, (prior - v.square().sum(0)).clamp(min=0.0) + known, known


def moved(site: Site, across: Float[Tensor, "m k"]) -> Site:
    """The same factor of u in other whitened coordinates, v = across v'. Shapes: across [m, k] -> site of size k.

    With across = L_old^-1 L_new it stays put as a function of u while the kernel moves under it; with
    L_old^-1 K_old,new L_new^-T it is read off other inducing values.
    """
    return replace(
        site,
        precision=across.mT @ site.precision @ across,
        shift=(across.mT @ site.shift[..., None])[..., 0],
    )


def fit_sites(
    kernel: Kernel,
    likelihood: GaussianLikelihood,
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    inducing: int,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    record: Callable[..., None],
) -> None:
    """Kernel, network and noise, in place, from batches of rows that need not fit memory (x, y may be memory-mapped).

    Each batch gives an Adam step (AdamW on a network) on the bound whose site, as a function of u, stays put while the
    kernel moves, and a natural step of rate r_k = max(1 / (k + 1), B / N, B / (50 M)): the first averages, the second
    remembers about one epoch, the third forgets old kernels where an epoch is long (the noise in q then costs about
    r M / (4 B) = .005 nats a row). Inducing inputs are rows, chosen again as the kernel moves. No site is returned:
    the caller makes it exact in one pass over all rows (`collapsed.fit_site`).

    Shapes: x [n, d] (or images, sequences), y [n, t]. In the first 10 M rows only the site learns. Raises
    NumericalError if that happens in the first epoch; later, like Ctrl-C, it ends the fit at the last whole epoch.
    Source: Adam et al. (2021), the "tighter bound".
    """
    n = len(y)
    per_epoch = math.ceil(n / batch)
    floor = min(1.0, batch * max(1.0 / n, 0.02 / inducing))
    warm = min(per_epoch, math.ceil(10 * inducing / batch))
    optimiser = _optimiser(kernel, likelihood)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch, eta_min=1e-4)
    running: _Running | None = None
    device = next(likelihood.parameters()).device
    kept = None
    kernel.train()
    try:
        for epoch in range(epochs):
            losses = []
            for k, index in enumerate(torch.randperm(n, generator=generator).tensor_split(per_epoch)):
                step = epoch * per_epoch + k
                if running is None or step in (5, 25) or step % 100 == 0:
                    pool = _read(x, torch.randperm(n, generator=generator)[: max(POOL, inducing)], device)
                    if running is None:
                        running = _Running(kernel, likelihood, n, pool, inducing)
                    else:
                        running.choose(pool, inducing)
                optimiser.zero_grad()
                rows = _read(x, index, device), _read(y, index, device).to(torch.float64)
                loss = running.step(*rows, max(1.0 / (step + 1), floor))
                if step < warm:  # under an empty site the bound pulls the kernel towards nothing
                    continue
                losses.append(loss)
                for group in optimiser.param_groups[1:]:
                    torch.nn.utils.clip_grad_norm_(group["params"], 10.0)
                optimiser.step()
                schedule.step()
            kept = copy.deepcopy((kernel.state_dict(), likelihood.state_dict()))
            if losses:
                record(stage="sites", loss=torch.stack(losses).mean().item())
    except (NumericalError, KeyboardInterrupt) as error:
        if kept is None:
            raise
        kernel.load_state_dict(kept[0])
        likelihood.load_state_dict(kept[1])
        interrupted = isinstance(error, KeyboardInterrupt)
        record(stage="sites", **({"interrupted": True} if interrupted else {"failed": str(error)}))
    finally:
        kernel.eval()


def _optimiser(kernel: Kernel, likelihood: GaussianLikelihood) -> torch.optim.AdamW:
    """Kernel and noise in the first group of parameters; a network, with weight decay, in the second."""
    network = list(kernel.extractor.parameters()) if isinstance(kernel, DeepKernel) else []
    ids = {id(p) for p in network}
    others = [p for p in (*kernel.parameters(), *likelihood.parameters()) if id(p) not in ids]
    groups = [{"params": others, "lr": 5e-2, "weight_decay": 0.0}]
    if network:
        groups.append({"params": network, "lr": 3e-3, "weight_decay": 1e-2})
    return torch.optim.AdamW(groups)


def _read(rows: Tensor | np.ndarray, index: Tensor, device: torch.device) -> Tensor:
    """These rows, in increasing order (a memory-mapped file is then read forwards), on the device."""
    index = index.sort().values
    picked = (
        torch.from_numpy(rows[index.numpy()]) if isinstance(rows, np.ndarray) else rows[index.to(rows.device)]
    )
    return picked.to(device)


class _Running:
    """The running site, the raw inducing rows it is about, and the factor of K_uu in whose coordinates it is given."""

    def __init__(self, kernel: Kernel, likelihood: GaussianLikelihood, total: int, pool: Tensor, most: int):
        self.kernel, self.likelihood, self.total = kernel, likelihood, total
        with torch.no_grad():
            chosen, self.factor = self._pick(embed(kernel, pool), most)
        self.rows = pool[chosen]
        zeros = self.factor.new_zeros(likelihood.noise.shape[0], len(chosen), len(chosen))
        self.site = Site("moving", zeros, zeros[..., 0], zeros[:, 0, 0], 0)

    def _pick(self, z: Float[Tensor, "n p"], most: int) -> tuple[Tensor, Float[Tensor, "m m"]]:
        inner = embedded_kernel(self.kernel)
        chosen = greedy_variance(inner, z, most)
        return chosen, self._factor(z[chosen])

    def _factor(self, z: Float[Tensor, "m p"]) -> Float[Tensor, "m m"]:
        k = covariance(embedded_kernel(self.kernel), z)
        return cholesky(k, "kernel matrix of the inducing inputs", FIRST_JITTER)[0]

    @torch.no_grad()
    def choose(self, pool: Tensor, most: int) -> None:
        """Other inducing rows, out of the pool; the site is carried over by the conditional prior mean."""
        z = embed(self.kernel, torch.cat([pool, self.rows]))
        new, old = z[: len(pool)], z[len(pool) :]
        chosen, factor = self._pick(new, most)
        cross = covariance(embedded_kernel(self.kernel), new[chosen], old)
        self.site = moved(self.site, solve_lower(self.factor, solve_lower(factor, cross).mT))
        self.rows, self.factor = pool[chosen], factor

    def step(self, x: Tensor, y: Float[Tensor, "n t"], rate: float) -> Float[Tensor, ""]:
        """Gradients of the loss (nats a value) on one batch, added to `.grad`; then the batch's natural step.

        The gradient comes first: with a site that has seen the batch it would not be that of all rows on average.
        """
        z = embed(self.kernel, torch.cat([x, self.rows]))  # one pass, so both see the same feature statistics
        inner = embedded_kernel(self.kernel)
        rows, inducing = z[: len(x)], z[len(x) :]
        factor = self._factor(inducing)
        v, prior = solve_lower(factor, covariance(inner, inducing, rows)), diagonal(inner, rows)
        site = moved(self.site, solve_lower(self.factor, factor))
        loss = -elbo(site, self.likelihood, v, prior, y, self.total) / (self.total * y.shape[1])
        loss.backward()
        with torch.no_grad():
            site = moved(self.site, solve_lower(self.factor, factor))
            self.site = blend(site, batch_site(site, self.likelihood, v, prior, y, self.total), rate)
            self.factor = factor.detach()
        return loss.detach()
