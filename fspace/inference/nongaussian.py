"""The posterior over functions under a likelihood that is not Gaussian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gpytorch.likelihoods import BernoulliLikelihood
from torch import Tensor, distributions

from fspace.compound import Compound
from fspace.gaussians import Gaussian
from fspace.inference.basis import Basis, Site
from fspace.inference.dirichlet import DirichletLikelihood
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.likelihoods import REAL, OffsetLikelihood, normal_points
from fspace.inference.sites import converge, empty_site, said_by_rows
from fspace.predictive import Categorical
from fspace.predictive_base import Predictive
from fspace.targets import check_positions, check_support

POINTS = 128  # function values behind class probabilities


class LikelihoodPosterior(GPPosterior):
    """Gaussian process posterior whose observations have any likelihood; latent(x) is of the function before the link.

    observed(x) is `Compound` for numbers and `Categorical` for classes (integers from 0).
    """

    @property
    def likelihood(self) -> OffsetLikelihood:
        """How observations depend on the function."""
        assert isinstance(self.basis.likelihood, OffsetLikelihood)
        return self.basis.likelihood

    @property
    def _of_classes(self) -> bool:
        return self.likelihood.classes > 0 or isinstance(self.likelihood.inner, BernoulliLikelihood)

    def observed(self, x: Any) -> Predictive:  # type: ignore[override]
        """Predictive of y at x [n, d]."""
        return self.given(self.latent(x))

    def given(self, latent: Gaussian) -> Predictive:
        """Predictive of y where f has this one."""
        inner = self.likelihood.inner
        if self._of_classes:
            return self._classes(latent)
        shift, scale = self._units()

        def conditional(f: Tensor) -> distributions.Distribution:
            return inner((f - shift) / scale)

        return Compound(latent, conditional, shift, scale)

    def _units(self) -> tuple[Tensor, Tensor]:
        """Shift and scale from what the likelihood is of to y."""
        shift = self.scaling.y_shift - self.scaling.y_scale * self.likelihood.offset.detach()
        return (shift[0], self.scaling.y_scale[0]) if self.vector else (shift, self.scaling.y_scale)

    def response(self, f: Tensor) -> Tensor:
        """E[y | f]; of classes the probabilities, in a last dimension."""
        if self._of_classes:
            return self._probabilities(f)
        shift, scale = self._units()
        return shift + scale * self.likelihood.inner((f - shift) / scale).mean

    def site_of(self, x: Tensor, y: Any, site_id: str) -> Site:
        """What y at x [n, d] says beside what the sites here say, by natural-gradient steps (of a Dirichlet
        likelihood: exactly). Raises DataError for
        other shapes, and for values that the likelihood cannot have made."""
        y = self._observations(x, y, 1 if self.likelihood.classes else self.num_outputs)
        if self._of_classes:
            check_positions(y.cpu().numpy(), self.likelihood.classes or 2)
        elif not isinstance(self.likelihood.inner, REAL):
            check_support(y.cpu().numpy(), self.likelihood.inner, self.vector)
        if not self.likelihood.classes:
            y = (y - self.scaling.y_shift) / self.scaling.y_scale + self.likelihood.offset.detach()
        start = empty_site(self.basis, self.num_outputs, site_id)
        if isinstance(self.likelihood.inner, DirichletLikelihood):  # exact at once, whatever the posterior is
            return said_by_rows(self.basis, start, self.site, self.scaling.inputs(x), y)
        return converge(self.basis, self.scaling.inputs(x), y, start=start, cavity=self.site)[0]

    def _classes(self, latent: Gaussian) -> Categorical:
        dimensions = latent.mean.shape[-1] if self.likelihood.classes else 1
        points = normal_points(POINTS, dimensions).to(latent.mean)[:, None]
        values = latent.mean + latent.stddev * (points if self.likelihood.classes else points[..., 0])

        def joint(n: int, seed: int | None) -> Tensor:
            return self._probabilities(latent.rsample(n, seed))

        return Categorical(self._probabilities(values), joint=joint)

    def _probabilities(self, f: Tensor) -> Tensor:
        """Class probabilities [s, n, c] of function values [s, n] or [s, n, c]."""
        if self.likelihood.classes:
            return torch.softmax(f, dim=-1)
        second = torch.special.ndtr(f)
        return torch.stack([1.0 - second, second], dim=-1)


def posterior_of(
    basis: Basis, sites: Site | Mapping[str, Site], scaling: Scaling, vector: bool = True
) -> GPPosterior:
    """The posterior of a basis and its sites, whatever its likelihood."""
    kind = LikelihoodPosterior if isinstance(basis.likelihood, OffsetLikelihood) else GPPosterior
    return kind(basis, sites, scaling, vector)
