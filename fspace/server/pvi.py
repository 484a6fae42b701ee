"""Partitioned variational inference over weights: sites that maximise the local free energy of a worker's rows.

A worker finds the q that maximises E_q[log p(rows | v)] - KL(q || prior * the other sites), and its site is what q has
beyond the prior and the other sites. Fixed points are those of variational inference with all rows in one place.
Source: Ashman et al. (2022), partitioned variational inference, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.basis import Site
from fspace.inference.collapsed import CHUNK
from fspace.server.weight_gaussians import Natural, apply
from fspace.server.weight_workers import WeightWorker

LEVEL_DRAWS = 4  # of q, for the evidence


@dataclass(frozen=True)
class Pvi:
    """How a worker moves its site in a round.

    steps: of Adam from the posterior as it stands, with step sizes from `rate` down to zero, each on `draws` draws of
    the weights and a mini-batch of `batch` rows. damping: how much of the way to the new site to go; 1 over the number
    of workers is safe where all step at the same time.
    """

    steps: int = 100
    rate: float = 0.05
    draws: int = 1
    batch: int = 100
    damping: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)!r} must be at least 1.")
        if not 0 < self.rate < float("inf") or not 0 < self.damping <= 1:
            raise OptionError(
                f"rate={self.rate!r} must be a positive number and damping={self.damping!r} above 0, at most 1."
            )


class _Shape:
    """The factor B of q in units of the posterior at the start: v = mean + root (a + B noise), B lower triangular or
    diagonal, with a logarithm on its diagonal."""

    def __init__(self, like: Float[Tensor, " p"], diagonal: bool):
        self.log_diagonal = torch.zeros_like(like, requires_grad=True)
        self.lower = None if diagonal else torch.zeros_like(like.outer(like), requires_grad=True)
        self.leaves = [self.log_diagonal] if self.lower is None else [self.log_diagonal, self.lower]

    def factor(self) -> Tensor:
        """B [p, p], or its diagonal [p]."""
        if self.lower is None:
            return self.log_diagonal.exp()
        return self.lower.tril(-1) + self.log_diagonal.exp().diag()


class PviWorker(WeightWorker):
    """A worker that keeps nothing between rounds: a step is a function of its arguments and the seed."""

    how: Pvi

    def step(self, own: Site, cavity: Site) -> Site:
        """`damping` of the way to the site of the best q; it may be indefinite, the server sees to it that what is left
        is a Gaussian. Raises NumericalError for a free energy that is no number."""
        how, diagonal = self.how, self.basis.diagonal
        generator = self.generator(own)
        batches = self.batches(how.batch, generator)
        prior = Natural.of(cavity, self.device).with_prior()
        start, root = _mean_and_root(prior.times(Natural.of(own, self.device)))
        shape, centre = _Shape(start, diagonal), torch.zeros_like(start, requires_grad=True)
        adam = torch.optim.Adam([centre, *shape.leaves], lr=how.rate)
        for step in range(how.steps):
            adam.param_groups[0]["lr"] = how.rate * (1.0 - step / how.steps)
            x, y, times = next(batches)
            b, energy = shape.factor(), start.new_zeros(())
            for _ in range(how.draws):
                noise = _noise(start, generator)
                u = centre + apply(b, noise)
                v = start + apply(root, u)
                energy = energy + times * self.log_likelihood(v, x, y)
                energy = energy + prior.shift @ v - 0.5 * (v @ apply(prior.precision, v))
                # -log q enters by its gradient in v alone: no noise is left where q is right (Roeder et al. 2017)
                energy = energy + _solved(b if diagonal else b.mT, noise).detach() @ u
            adam.zero_grad()
            (-energy / how.draws).backward()
            adam.step()
        if not all(bool(leaf.isfinite().all()) for leaf in (centre, *shape.leaves)):
            raise NumericalError(
                f"The free energy of worker {self.name!r} is no number any more; take a smaller rate than {how.rate:g}."
            )
        with torch.no_grad():
            mean, b = start + apply(root, centre), shape.factor()
            root = root * b if diagonal else root @ b
            precision = root.square().reciprocal() if diagonal else torch.cholesky_inverse(root)
            old = Natural.of(own, self.device)
            new = Natural(precision - prior.precision, apply(precision, mean) - prior.shift)
            site = old.times(new.times(old, -1.0), how.damping)
            level = self._level(site, mean, root, generator)
        return replace(
            own,
            precision=site.precision[None].cpu(),
            shift=site.shift[None].cpu(),
            log_scale=torch.full((1,), level, dtype=torch.float64),
            count=len(self.rows[0]),
            version=own.version + 1,
        )

    def _level(self, site: Natural, mean: Tensor, root: Tensor, generator: torch.Generator) -> float:
        """The scale of the site with which the evidence of all sites estimates the evidence lower bound: what the log
        likelihood of the rows has beyond the site's exponent, on average under q."""
        level = 0.0
        for _ in range(LEVEL_DRAWS):
            v = mean + apply(root, _noise(mean, generator))
            blocks = zip(*(part.split(CHUNK) for part in self.rows))
            value = sum(self.log_likelihood(v, x, y).item() for x, y in blocks)
            level += (value - site.exponent(v)) / LEVEL_DRAWS
        return level


def _noise(like: Float[Tensor, " p"], generator: torch.Generator) -> Float[Tensor, " p"]:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)


def _mean_and_root(posterior: Natural) -> tuple[Float[Tensor, " p"], Tensor]:
    """Mean, and a lower triangular (or diagonal) root of the covariance."""
    if posterior.precision.ndim == 1:
        root = posterior.precision.rsqrt()
        return root.square() * posterior.shift, root
    factor = torch.linalg.cholesky(posterior.precision)
    mean = torch.cholesky_solve(posterior.shift[:, None], factor)[:, 0]
    return mean, torch.linalg.cholesky(torch.cholesky_inverse(factor))


def _solved(upper: Tensor, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    if upper.ndim == 1:
        return v / upper
    return torch.linalg.solve_triangular(upper, v[:, None], upper=True)[:, 0]
