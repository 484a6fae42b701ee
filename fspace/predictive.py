"""What a posterior says at given inputs: Gaussian, mixture of Gaussians, samples, or class probabilities.

Shapes: "y-shaped" means [n] for one output and [n, t] for several. Gaussians may carry leading batch dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fspace.errors import DataError, NumericalError, OptionError

_SQRT2 = math.sqrt(2.0)


def generator_for(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator of its own, so that the global random state is neither read nor moved."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def normalised_weights(weights: Any, count: int) -> Float[Tensor, " k"]:
    """`count` float64 weights that sum to one (None: equal). Raises OptionError for what cannot be weights."""
    w = torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    w = w.double()
    if w.shape != (count,) or not bool((w >= 0).all()) or not 0 < w.sum().item() < math.inf:
        raise OptionError(
            f"weights must be {count} finite non-negative numbers, not all zero; got {w.tolist()}."
        )
    return w / w.sum()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / _SQRT2)


def _as_tensor(y: Any, device: torch.device) -> Tensor:
    """y (tensor, array, list, series) as a tensor. Raises DataError when it holds no numbers."""
    try:
        # a copy, because torch warns of arrays that are not writable, as those of a pandas series are
        return torch.as_tensor(y if isinstance(y, Tensor) else np.array(y), device=device)
    except TypeError as error:
        raise DataError(f"y holds no numbers, but {type(y).__name__} of another kind ({error}).") from error


class Predictive(ABC):
    """Distribution of the values at n inputs. Variances are in squared units of y, log densities in nats."""

    mean: Tensor
    variance: Tensor

    @property
    def stddev(self) -> Tensor:
        """Square root of the variance, y-shaped."""
        return self.variance.sqrt()

    @property
    @abstractmethod
    def epistemic(self) -> Tensor:
        """What more data would remove: variance of the function (classes: mutual information)."""

    @property
    @abstractmethod
    def aleatoric(self) -> Tensor:
        """What stays: variance of the noise (classes: expected entropy)."""

    @abstractmethod
    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n samples, joint over the points: [n, *y shape]."""

    @abstractmethod
    def log_prob(self, y: Any) -> Tensor:
        """Marginal log density of every entry of y, y-shaped. Raises DataError when y has another shape."""

    def _check(self, y: Any) -> Tensor:
        y = _as_tensor(y, self.mean.device).to(self.mean.dtype)
        if y.ndim and y.shape != self.mean.shape:
            raise DataError(
                f"y has shape {tuple(y.shape)}, but the prediction has shape {tuple(self.mean.shape)}."
            )
        return y


class _Continuous(Predictive):
    @abstractmethod
    def cdf(self, y: Any) -> Tensor:
        """P(value <= y) at every entry, y-shaped."""

    @abstractmethod
    def _quantile(self, p: float) -> Tensor: ...

    def quantile(self, p: float | Float[Tensor, " k"] | Sequence[float]) -> Tensor:
        """The p-quantile, y-shaped; for k levels [k, *y shape]. Raises OptionError unless 0 < p < 1."""
        levels = torch.as_tensor(p, dtype=torch.float64)
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise OptionError(f"quantile(p={p!r}): p must lie strictly between 0 and 1.")
        if levels.ndim == 0:
            return self._quantile(levels.item())
        return torch.stack([self._quantile(level) for level in levels.tolist()])

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval that holds `level` of the probability: (lower, upper), each y-shaped."""
        if not 0 < level < 1:
            raise OptionError(f"interval(level={level!r}): the level must lie strictly between 0 and 1.")
        return self._quantile(0.5 - 0.5 * level), self._quantile(0.5 + 0.5 * level)


class Gaussian(_Continuous):
    """Jointly Gaussian values; outputs are independent of each other.

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
        """Joint covariance over the points: [n, n], or [t, n, n] with several outputs."""
        if self._covariance is None:
            raise OptionError(
                "This predictive was made without a joint covariance; only its marginals are known."
            )
        if not isinstance(self._covariance, Tensor):
            self._covariance = self._covariance()
        return self._covariance

    @property
    def epistemic(self) -> Tensor:
        return self.variance - self.aleatoric

    @property
    def aleatoric(self) -> Tensor:
        return torch.zeros_like(self.variance) if self._aleatoric is None else self._aleatoric

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        root = _root(self.covariance)
        generator = generator_for(seed, root.device)
        white = torch.randn(n, *root.shape[:-1], 1, generator=generator, dtype=root.dtype, device=root.device)
        values = (root @ white)[..., 0]
        return self.mean + (values.mT if self.outputs is not None else values)

    def log_prob(self, y: Any) -> Tensor:
        error = self._check(y) - self.mean
        return -0.5 * (2 * math.pi * self.variance).log() - 0.5 * error.square() / self.variance

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
        return _normal_cdf((self._check(y) - self.mean) / self.stddev)

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


class Mixture(_Continuous):
    """Mixture of Gaussians (an ensemble): one component is right, which one is not known.

    Shapes: components y-shaped alike; weights [k], normalised here. log_prob and cdf are the mixture's, quantiles are
    solved from its cdf, and one joint sample comes from one component.
    """

    def __init__(self, components: Sequence[Gaussian], weights: Tensor | Sequence[float] | None = None):
        if not components:
            raise OptionError("A mixture needs at least one component.")
        self.components = list(components)
        shapes = [tuple(c.mean.shape) for c in self.components]
        if len(set(shapes)) > 1:
            raise DataError(f"Components of a mixture must have one shape; these have {shapes}.")
        self.weights = normalised_weights(weights, len(shapes)).to(self.components[0].mean)
        self.outputs = self.components[0].outputs

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

    def joint_log_prob(self, y: Any) -> Tensor:
        """Log density of all points and outputs together (the mixture's): a scalar, or one a batch."""
        return self._log_average([c.joint_log_prob(y) for c in self.components])

    def _log_average(self, values: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(values))
        return torch.logsumexp(stacked + self.weights.log().reshape(-1, *[1] * (stacked.ndim - 1)), dim=0)

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
        return 0.5 * (low + high)

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Mixture:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        return Mixture([c.affine(loc, scale) for c in self.components], self.weights)


class Samples(_Continuous):
    """Equally likely function values, as from an ensemble of networks, with or without Gaussian noise around them.

    Shapes: values [s, *y shape], noise_variance y-shaped or [s, *y shape]. Without noise there is no density:
    log_prob raises OptionError, cdf is the sample's and quantile its inverse (a value of the sample).
    """

    def __init__(self, values: Tensor, noise_variance: Tensor | float | None = None):
        self.values = values
        self.noise = None
        if noise_variance is not None:
            self.noise = torch.as_tensor(noise_variance, dtype=values.dtype, device=values.device).expand_as(
                values
            )
        self.mean = values.mean(0)
        self.outputs = values.shape[-1] if values.ndim == 3 else None

    def _mixture(self) -> Mixture:
        assert self.noise is not None
        return Mixture([Gaussian(v, s) for v, s in zip(self.values, self.noise)])

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        return self.values.var(0, correction=0)

    @property
    def aleatoric(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.noise is None else self.noise.mean(0)

    def rsample(self, n: int = 1, seed: int | None = None) -> Tensor:
        generator = generator_for(seed, self.values.device)
        picks = torch.randint(len(self.values), (n,), generator=generator, device=self.values.device)
        chosen = self.values[picks]
        if self.noise is None:
            return chosen
        white = torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype, device=chosen.device)
        return chosen + self.noise[picks].sqrt() * white

    def log_prob(self, y: Any) -> Tensor:
        if self.noise is None:
            raise OptionError(
                "A finite sample without noise has no density; give noise_variance, or use observed()."
            )
        return self._mixture().log_prob(y)

    def cdf(self, y: Any) -> Tensor:
        if self.noise is not None:
            return self._mixture().cdf(y)
        return (self.values <= self._check(y)).to(self.values).mean(0)

    def _quantile(self, p: float) -> Tensor:
        if self.noise is not None:
            return self._mixture()._quantile(p)
        # the smallest value with cdf >= p; a little less than p * s, so that rounding does not skip one
        rank = math.ceil(p * len(self.values) * (1 - 1e-12))
        return self.values.kthvalue(rank, dim=0).values

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Samples:
        """The same distribution for scale * y + loc (scalars, or one an output)."""
        square = torch.as_tensor(scale, dtype=self.values.dtype, device=self.values.device).square()
        return Samples(self.values * scale + loc, None if self.noise is None else self.noise * square)


class Categorical(Predictive):
    """Class probabilities [n, c], or samples of them [s, n, c] whose spread is what is not known.

    Entropies are in nats. Source: Houlsby et al. (2011), eq. 1 (mutual information).
    """

    def __init__(self, probs: Tensor):
        if probs.ndim not in (2, 3):
            raise DataError(f"Class probabilities must be [n, c] or [s, n, c], not {tuple(probs.shape)}.")
        if bool((probs < 0).any()) or not torch.allclose(
            probs.sum(-1), torch.ones_like(probs[..., 0]), atol=1e-5
        ):
            raise DataError(
                "Class probabilities must be non-negative and sum to one over the last dimension."
            )
        self.samples = probs if probs.ndim == 3 else probs[None]
        self.probs: Float[Tensor, "n c"] = self.samples.mean(0)
        self.mean = self.probs
        self.variance = self.probs * (1 - self.probs)

    @property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of the averaged probabilities."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def mutual_information(self) -> Float[Tensor, " n"]:
        """Entropy minus expected entropy: what knowing the function would tell about the class."""
        return (self.entropy - self.aleatoric).clamp(min=0.0)

    @property
    def epistemic(self) -> Float[Tensor, " n"]:
        return self.mutual_information

    @property
    def aleatoric(self) -> Float[Tensor, " n"]:
        return torch.special.entr(self.samples).sum(-1).mean(0)

    @property
    def mode(self) -> Int[Tensor, " n"]:
        """The most probable class."""
        return self.probs.argmax(-1)

    def log_prob(self, y: Any) -> Float[Tensor, " n"]:
        """Log probability of integer labels [n]. Raises DataError for labels that are no class."""
        y = _as_tensor(y, self.probs.device)
        labels = y.long()
        known = (labels == y) & (labels >= 0) & (labels < self.probs.shape[1])
        if labels.shape != self.probs.shape[:1] or not bool(known.all()):
            raise DataError(
                f"Labels must be {self.probs.shape[0]} integers from 0 to {self.probs.shape[1] - 1}."
            )
        return self.probs.gather(-1, labels[:, None])[:, 0].log()

    def rsample(self, n: int = 1, seed: int | None = None) -> Int[Tensor, "k n"]:
        """n draws of labels; one function sample for each, so joint over the points (not differentiable)."""
        generator = generator_for(seed, self.probs.device)
        picks = torch.randint(len(self.samples), (n,), generator=generator, device=self.probs.device)
        return torch.stack(
            [torch.multinomial(self.samples[i], 1, generator=generator)[:, 0] for i in picks.tolist()]
        )
