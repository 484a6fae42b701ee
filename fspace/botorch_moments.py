"""Joint Gaussian moments at batches of points, and their conditioning: what is behind a BoTorch model.

Outputs come in g groups that are independent of each other: every output for itself, or all in one group where they
are correlated. A group's k values are those of its s outputs at n points, the outputs of one point side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.gaussians import Coregionalised, Gaussian
from fspace.inference.numerics import cholesky, solve_lower
from fspace.posterior import FunctionPosterior


class Moments(NamedTuple):
    """Joint moments of f at n points: mean, covariance, and the covariance of the noise of y, group by group."""

    mean: Float[Tensor, "*b g k"]
    covariance: Float[Tensor, "*b g k k"]
    noise: Float[Tensor, "*b g k k"]
    outputs: int

    @property
    def together(self) -> int:
        """Outputs in a group."""
        return self.outputs // self.mean.shape[-2]

    def grouped(self, values: Float[Tensor, "*b n t"]) -> Float[Tensor, "*b g k"]:
        """Values of all outputs at points, group by group."""
        return values.mT if self.together == 1 else values.flatten(-2)[..., None, :]

    def picked(self, outputs: Sequence[int]) -> Moments:
        """Moments of some outputs."""
        pick, s = torch.tensor(list(outputs), device=self.mean.device), self.together
        if s == 1:
            return Moments(
                self.mean[..., pick, :],
                self.covariance[..., pick, :, :],
                self.noise[..., pick, :, :],
                len(pick),
            )
        points = torch.arange(self.mean.shape[-1] // s, device=pick.device)
        k = (s * points[:, None] + pick).flatten()
        return Moments(
            self.mean[..., k],
            self.covariance[..., k[:, None], k],
            self.noise[..., k[:, None], k],
            len(pick),
        )


Member = Callable[[Tensor], Moments]  # moments at X [..., n, d]


def moments_of(posterior: FunctionPosterior) -> Member:
    """Moments of a posterior whose predictives are Gaussian; the member raises OptionError for another kind."""

    observed = getattr(posterior, "observed_batches", posterior.observed)

    def member(x: Tensor) -> Moments:
        joint = observed(x)
        if not isinstance(joint, Gaussian):
            raise OptionError(
                f"{type(posterior).__name__} predicts {type(joint).__name__}, and a BoTorch model needs Gaussians: "
                "use a GP posterior, a MixturePosterior of them, or, where latent(x) is Samples, "
                "fspace.botorch_draws.DrawnModel(posterior)."
            )
        if isinstance(joint, Coregionalised):
            mixing, s = joint.mixing, len(joint.mixing)
            each = torch.einsum("sk,tk,...nk->...nst", mixing, mixing, joint.rotated.aleatoric)
            noise = torch.diag_embed(each.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-2).flatten(-3, -2)
            covariance = joint.joint_covariance - noise
            mean = joint.mean.flatten(-2)
            return Moments(mean[..., None, :], covariance[..., None, :, :], noise[..., None, :, :], s)
        mean, covariance, noise = joint.mean, joint.covariance, joint.aleatoric
        if joint.outputs is None:
            mean, covariance, noise = mean[..., None], covariance[..., None, :, :], noise[..., None]
        noise = torch.diag_embed(noise.mT)
        return Moments(mean.mT, covariance - noise, noise, mean.shape[-1])

    return member


def picked(member: Member, outputs: Sequence[int]) -> Member:
    """The member with some of its outputs."""
    return lambda x: member(x).picked(outputs)


class _Seen(NamedTuple):
    """Observations against the prior moments there: whitened error, Cholesky factor, log density."""

    white: Tensor
    factor: Tensor
    log_density: Tensor


def seen(at: Moments, y: Float[Tensor, "*b n t"], noise: Float[Tensor, "*c n t"] | None) -> _Seen:
    """How y compares with the moments at its points; noise (variances) stands in for the member's own."""
    added = at.noise if noise is None else torch.diag_embed(at.grouped(noise))
    factor, _ = cholesky(at.covariance + added, "covariance of the new observations")
    white = solve_lower(factor, (at.grouped(y) - at.mean)[..., None])
    gaussian = white[..., 0].square() + torch.tensor(2 * torch.pi, dtype=y.dtype, device=y.device).log()
    log_det = factor.diagonal(dim1=-2, dim2=-1).log()
    return _Seen(white, factor, (-0.5 * gaussian - log_det).sum((-2, -1)))


def conditioned(prior: Member, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Member:
    """The member after also seeing y [..., n, t] at x [..., n, d], whose batch dimensions broadcast.

    Gaussian conditioning of the joint at [x, X]: gradients flow to x, y and X. noise [..., n, t] (variances) stands
    in for the member's own. Source: Rasmussen and Williams (2006), eq. A.6.
    """

    def member(query: Tensor) -> Moments:
        batch = torch.broadcast_shapes(x.shape[:-2], query.shape[:-2])
        joint = prior(
            torch.cat([x.expand(*batch, *x.shape[-2:]), query.expand(*batch, *query.shape[-2:])], -2)
        )
        n = x.shape[-2] * joint.together
        head = Moments(
            joint.mean[..., :n], joint.covariance[..., :n, :n], joint.noise[..., :n, :n], joint.outputs
        )
        at = seen(head, y, noise)
        cross = solve_lower(at.factor, joint.covariance[..., :n, n:])
        mean = joint.mean[..., n:] + (cross.mT @ at.white)[..., 0]
        covariance = joint.covariance[..., n:, n:] - cross.mT @ cross
        square = (*mean.shape, mean.shape[-1])
        return Moments(
            mean, covariance.expand(square), joint.noise[..., n:, n:].expand(square), joint.outputs
        )

    return member
