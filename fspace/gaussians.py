"""Predictives that are Gaussian, or a mixture of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fspace.errors import DataError, NumericalError, OptionError
from fspace.predictive_base import Continuous, check_count, generator_for, normalised_weights

_SQRT2 = math.sqrt(2.0)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / _SQRT2)


class Gaussian(Continuous):
    """Jointly Gaussian values; outputs are independent of each other (else: `Coregionalised`).

    Shapes: mean and variance y-shaped; covariance [n, n] or [t, n, n], or a function that computes it when it is
    asked for; aleatoric y-shaped, the part of the variance that is noise (None: none of it). outputs: 0 where y has
    no dimension for outputs, else their number; needed only where there are batch dimensions.
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        covariance: Tensor | Callable[[], Tensor] | None = None,
        aleatoric: Tensor | None = None,
        outputs: int | None = None,
    ):
        self.mean, self.variance = mean, variance
        self._covariance = covariance
        self._aleatoric = aleatoric
        if outputs is None:  # without batch dimensions the shape says it
            outputs = mean.shape[-1] if mean.ndim == 2 else 0
        self.outputs = outputs or None

    @property
    def covariance(self) -> Tensor:
        """Joint covariance over the points: [n, n], or [t, n, n], that of each of several outputs."""
        if self._covariance is None:
            raise OptionError(
                "This predictive was made without a joint covariance; only its marginals are known."
            )
        if not isinstance(self._covariance, Tensor):
            self._covariance = self._covariance()
        return self._covariance

    @property
    def joint_covariance(self) -> Tensor:
        """Covariance over points and outputs together, [n t, n t]: the outputs of one point side by side."""
        if self.outputs is None:
            return self.covariance
        return _side_by_side(torch.diag_embed(self.covariance.movedim(-3, -1), dim1=-3, dim2=-1))

    @property
    def epistemic(self) -> Tensor:
        return self.variance - self.aleatoric

    @property
    def aleatoric(self) -> Tensor:
        return torch.zeros_like(self.variance) if self._aleatoric is None else self._aleatoric

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        n, root = check_count(n), _root(self.covariance)
        generator = generator_for(seed, root.device)
        white = torch.randn(n, *root.shape[:-1], 1, generator=generator, dtype=root.dtype, device=root.device)
        # one product for all n: a product for each would hold n copies of the root
        values = (root @ white[..., 0].movedim(0, -1)).movedim(-1, 0)
        return self.mean + (values.mT if self.outputs is not None else values)

    def log_prob(self, y: Any) -> Tensor:
        error = self._check(y) - self.mean
        known = self.variance == 0  # all probability at one value: infinite density there, none elsewhere
        variance = torch.where(known, 1.0, self.variance)
        density = -0.5 * (2 * math.pi * variance).log() - 0.5 * error.square() / variance
        at_mean = torch.where(error == 0, math.inf, torch.where(error.isnan(), math.nan, -math.inf))
        return torch.where(known, at_mean.to(density), density)

    def row_log_prob(self, y: Any) -> Tensor:
        """Log density of all outputs of one point together, at every point: [n]."""
        value = self.log_prob(y)
        return value if self.outputs is None else value.sum(-1)

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of all points and outputs together: a scalar, or one a batch.

        Raises NumericalError where there is no density (a singular covariance, as latent values have at equal points).
        """
        error = self._check(y) - self.mean
        error = error.mT if self.outputs is not None else error
        root, info = torch.linalg.cholesky_ex(self.covariance)
        if info.any():
            raise NumericalError(
                f"The joint covariance of {error.shape[-1]} points is singular, so they have no joint density. "
                "Use observed() (the noise mends it), or remove repeated points."
            )
        white = torch.linalg.solve_triangular(root, error[..., None], upper=False)[..., 0]
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = -0.5 * white.square().sum(-1) - log_det - 0.5 * error.shape[-1] * math.log(2 * math.pi)
        return value if self.outputs is None else value.sum(-1)

    def cdf(self, y: Any) -> Tensor:
        error = self._check(y) - self.mean
        known = self.variance == 0
        step = torch.where(error >= 0, math.inf, torch.where(error.isnan(), math.nan, -math.inf))
        z = error / torch.where(known, 1.0, self.variance).sqrt()
        return _normal_cdf(torch.where(known, step.to(z), z))

    def _quantile(self, p: float) -> Tensor:
        z = torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
        return self.mean + self.stddev * z.to(self.mean)

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Gaussian:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        square = torch.as_tensor(scale, dtype=self.mean.dtype, device=self.mean.device).square()
        per_output = square[..., None, None] if square.ndim else square

        def covariance() -> Tensor:
            return self.covariance * per_output

        return Gaussian(
            self.mean * scale + loc,
            self.variance * square,
            None if self._covariance is None else covariance,
            None if self._aleatoric is None else self._aleatoric * square,
            self.outputs or 0,
        )


class Coregionalised(Gaussian):
    """Jointly Gaussian values whose outputs depend on each other: shift + mixing h, where the entries of h do not.

    Shapes: rotated is h, [n, t]; mixing [t, t], invertible; shift [t]. What `Gaussian` says of single outputs is that
    of theirs here; samples, `row_log_prob`, `joint_log_prob` and `joint_covariance` are joint over the outputs too.
    """

    def __init__(self, rotated: Gaussian, mixing: Tensor, shift: Tensor):
        self.rotated, self.mixing, self.shift = rotated, mixing, shift
        shares = mixing.square().mT

        def covariance() -> Tensor:
            return torch.einsum("kt,...knm->...tnm", shares, rotated.covariance)

        super().__init__(
            rotated.mean @ mixing.mT + shift,
            rotated.variance @ shares,
            covariance,
            rotated.aleatoric @ shares,
            outputs=len(mixing),
        )

    @property
    def joint_covariance(self) -> Tensor:
        """Covariance over points and outputs together, [n t, n t]: the outputs of one point side by side."""
        blocks = torch.einsum("sk,tk,...knm->...nsmt", self.mixing, self.mixing, self.rotated.covariance)
        return _side_by_side(blocks)

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        return self.rotated.rsample(n, seed) @ self.mixing.mT + self.shift

    def row_log_prob(self, y: Any) -> Tensor:
        """Log density of all outputs of one point together, at every point: [n]."""
        return self.rotated.row_log_prob(self._rotate(y)) - self._log_volume

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of all points and outputs together: a scalar, or one a batch. Raises NumericalError where there
        is none."""
        return self.rotated.joint_log_prob(self._rotate(y)) - self.mean.shape[-2] * self._log_volume

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Coregionalised:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        factor = torch.as_tensor(scale, dtype=self.mean.dtype, device=self.mean.device)
        return Coregionalised(self.rotated, factor[..., None] * self.mixing, self.shift * factor + loc)

    @property
    def _log_volume(self) -> Tensor:
        return torch.linalg.slogdet(self.mixing)[1]

    def _rotate(self, y: Any) -> Tensor:
        error = (self._check(y) - self.shift).expand_as(self.mean)
        return torch.linalg.solve(self.mixing, error.mT).mT


def _side_by_side(blocks: Tensor) -> Tensor:
    """[..., n, t, n, t] as a matrix [..., n t, n t]."""
    return blocks.flatten(-2, -1).flatten(-3, -2)


def _root(covariance: Tensor) -> Tensor:
    """A square root of a covariance that may be singular (repeated points): Cholesky, else by eigenvalues."""
    root, info = torch.linalg.cholesky_ex(covariance)
    if not info.any():
        return root
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].detach()
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    root, info = torch.linalg.cholesky_ex(covariance + 1e-10 * level * identity)
    if not info.any():
        return root
    values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
    return vectors * values.clamp(min=0.0).sqrt()[..., None, :]


class Mixture(Continuous):
    """Mixture of Gaussians, or of other predictives of numbers (an ensemble): one component is right, which one is not
    known.

    Shapes: components y-shaped alike; weights [k], normalised here. log_prob and cdf are the mixture's, quantiles are
    solved from its cdf, and one joint sample comes from one component.
    """

    def __init__(self, components: Sequence[Any], weights: Tensor | Sequence[float] | None = None):
        if not components:
            raise OptionError("A mixture needs at least one component.")
        self.components = list(components)
        shapes = [tuple(c.mean.shape) for c in self.components]
        if len(set(shapes)) > 1:
            raise DataError(f"Components of a mixture must have one shape; these have {shapes}.")
        self.weights = normalised_weights(weights, len(shapes)).to(self.components[0].mean)
        self.outputs = self.components[0].outputs
        self.counts = self.components[0].counts

    def _average(self, values: Sequence[Tensor]) -> Tensor:
        return torch.tensordot(self.weights, torch.stack(list(values)), dims=1)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self._average([c.mean for c in self.components])

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        mean = self.mean
        return self._average([c.epistemic + (c.mean - mean).square() for c in self.components])

    @property
    def aleatoric(self) -> Tensor:
        return self._average([c.aleatoric for c in self.components])

    @property
    def joint_covariance(self) -> Tensor:
        """Covariance over points and outputs together, [n t, n t]: the outputs of one point side by side, spread of the
        components' means included."""
        if self.outputs is None:
            return self.covariance
        shifts = [(c.mean - self.mean).flatten(-2) for c in self.components]
        return self._average(
            [c.joint_covariance + s[..., :, None] * s[..., None, :] for c, s in zip(self.components, shifts)]
        )

    @property
    def covariance(self) -> Tensor:
        """Joint covariance over the points, spread of the components' means included."""
        mean = self.mean
        parts = []
        for c in self.components:
            shift = (c.mean - mean).mT if self.outputs is not None else c.mean - mean
            parts.append(c.covariance + shift[..., :, None] * shift[..., None, :])
        return self._average(parts)

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        generator = generator_for(seed, torch.device("cpu"))
        if check_count(n) == 0:  # torch draws none of nothing
            return self.mean.new_empty((0, *self.mean.shape))
        picks = torch.multinomial(self.weights.detach().cpu(), n, replacement=True, generator=generator)
        inner = int(torch.randint(2**31, (1,), generator=generator))
        values: list[Tensor] = [self.mean] * n
        for k, component in enumerate(self.components):
            mine = (picks == k).nonzero()[:, 0].tolist()
            if mine:
                for i, sample in zip(mine, component.rsample(len(mine), inner + k)):
                    values[i] = sample
        return torch.stack(values)

    def log_prob(self, y: Any) -> Tensor:
        y = self._check(y)
        return self._log_average([c.log_prob(y) for c in self.components])

    def row_log_prob(self, y: Any) -> Tensor:
        """Log density of all outputs of one point together (the mixture's), at every point: [n]."""
        return self._log_average([c.row_log_prob(y) for c in self.components])

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of all points and outputs together (the mixture's): a scalar, or one a batch."""
        return self._log_average([c.joint_log_prob(y) for c in self.components])

    def _log_average(self, values: Sequence[Tensor]) -> Tensor:
        used = [k for k, w in enumerate(self.weights.tolist()) if w > 0]  # 0 times an infinite density is NaN
        stacked = torch.stack([values[k] for k in used])
        return torch.logsumexp(
            stacked + self.weights[used].log().reshape(-1, *[1] * (stacked.ndim - 1)), dim=0
        )

    def cdf(self, y: Any) -> Tensor:
        y = self._check(y)
        return self._average([c.cdf(y) for c in self.components])

    @torch.no_grad()
    def _quantile(self, p: float) -> Tensor:
        ends = torch.stack([c._quantile(p) for c in self.components])
        low, high = ends.amin(0), ends.amax(0)  # the mixture's quantile lies between its components'
        for _ in range(100):
            middle = 0.5 * (low + high)
            below = self.cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            if bool((high - low <= 1e-15 * high.abs()).all()):
                break
        return high  # of counts the smallest whose probability reaches p

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Mixture:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        return Mixture([c.affine(loc, scale) for c in self.components], self.weights)
