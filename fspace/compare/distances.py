"""How far two posteriors are from each other as functions, at probe inputs.

A posterior over weights cannot be compared with one over functions, but what both say of f at the same inputs can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from fspace.canvas import array
from fspace.errors import DataError, NumericalError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import Gaussian, Mixture


def gaussian_wasserstein(
    mean: NDArray, covariance: NDArray, other_mean: NDArray, other_covariance: NDArray
) -> float:
    """Wasserstein-2 distance of two Gaussians (Bures), in the units of their values; covariances may be singular.

    Shapes: means [n], covariances [n, n]. Raises DataError for others, and for what is no covariance.
    Source: Givens and Shortt (1984), prop. 7.
    """
    _check_moments(mean, covariance, other_mean, other_covariance)
    root = _square_root(covariance)
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    square = ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance)
    return float(math.sqrt(max(square - 2 * np.sqrt(cross.clip(min=0.0)).sum(), 0.0)))


def gaussian_kl(mean: NDArray, covariance: NDArray, other_mean: NDArray, other_covariance: NDArray) -> float:
    """KL divergence (nats) of the first Gaussian from the second, E_first[log first - log second].

    Shapes: means [n], covariances [n, n]. Raises NumericalError where a covariance is singular: there it is infinite,
    or not defined.
    """
    _check_moments(mean, covariance, other_mean, other_covariance)
    try:
        first, second = np.linalg.cholesky(covariance), np.linalg.cholesky(other_covariance)
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f"A covariance of {len(mean)} values is singular, so there is no divergence. Take fewer probe inputs, "
            "further apart, or compare observed() rather than latent()."
        ) from error
    ratio = np.linalg.solve(second, first)
    shift = np.linalg.solve(second, other_mean - mean)
    logdet = 2 * (np.log(np.diag(second)).sum() - np.log(np.diag(first)).sum())
    return float(0.5 * ((ratio**2).sum() + shift @ shift - len(mean) + logdet))


def sliced_wasserstein(values: NDArray, other: NDArray, directions: int = 200, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of draws [s, n] and [t, n], in the units of their values.

    The root mean square, over random directions, of the one-dimensional distance. It sees all of the distributions, not
    two moments, but is not 0 for two finite sets from one distribution: compare with that of two such sets.
    Raises DataError for shapes that differ. Source: Bonneel et al. (2015).
    """
    if (
        values.ndim != 2
        or other.ndim != 2
        or values.shape[1] != other.shape[1]
        or not len(values) * len(other)
    ):
        raise DataError(f"Draws must be [s, n] and [t, n]; got {list(values.shape)} and {list(other.shape)}.")
    if not (np.isfinite(values).all() and np.isfinite(other).all()):
        raise DataError("Draws hold NaN or infinite values.")
    if directions < 1:
        raise OptionError(f"directions={directions}: one at least.")
    ways = np.random.default_rng(seed).standard_normal((values.shape[1], directions))
    ways /= np.linalg.norm(ways, axis=0)
    levels = (np.arange(max(len(values), len(other))) + 0.5) / max(len(values), len(other))
    ours, theirs = (
        np.quantile(draws @ ways, levels, axis=0, method="inverted_cdf") for draws in (values, other)
    )
    return float(np.sqrt(((ours - theirs) ** 2).mean()))


def moments(
    posterior: FunctionPosterior, x: Any, draws: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
    """Mean and covariance of f at x [n, d]: exact of Gaussians, else of so many functions drawn."""
    with torch.no_grad():
        latent = posterior.latent(x)
        if isinstance(latent, Gaussian) or (
            isinstance(latent, Mixture) and all(isinstance(part, Gaussian) for part in latent.components)
        ):
            return array(latent.mean).astype(np.float64), array(latent.covariance).astype(np.float64)
        values = function_values(posterior, x, draws, seed)
    return values.mean(axis=0), np.atleast_2d(np.cov(values.T, bias=True))


def function_values(
    posterior: FunctionPosterior, x: Any, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "s n"]:
    """Values at x [n, d] of functions drawn from the posterior. Raises DataError for several outputs."""
    with torch.no_grad():
        values = array(posterior.draw(draws, seed=seed)(x)).astype(np.float64)
    if values.ndim != 2:
        raise DataError(
            f"Functions of one output are compared; these have values of shape {list(values.shape)}."
        )
    return values


@dataclass(frozen=True)
class Functions:
    """What is known of a posterior at n probe inputs: moments mean [n] and covariance [n, n], and draws [s, n]."""

    mean: NDArray
    covariance: NDArray
    draws: NDArray

    @classmethod
    def of(cls, posterior: FunctionPosterior, x: Any, draws: int = 1000, seed: int = 0) -> Functions:
        """Of a posterior at x [n, d]; moments are exact where its values are Gaussian."""
        return cls(*moments(posterior, x, draws, seed), function_values(posterior, x, draws, seed))

    @property
    def std(self) -> NDArray:
        """Standard deviations [n]."""
        return np.sqrt(np.diag(self.covariance).clip(min=0.0))


def function_distances(ours: Functions, reference: Functions, noise_variance: float) -> dict[str, float]:
    """How far a posterior over functions is from a reference, at the same n probe inputs.

    In the units of y: "mean", the root mean square difference of the means; "std", that of the standard deviations;
    "wasserstein", Wasserstein-2 of the Gaussians with these moments, divided by sqrt(n); "sliced", that of the draws
    along random directions. "kl": nats a probe, of the reference from ours, both with independent noise of the given
    variance added, for without it two smooth functions are infinitely far apart. "width": mean ratio of our standard
    deviations to the reference's, below 1 where we are too sure. Raises OptionError unless the noise is positive.
    """
    if not noise_variance > 0:
        raise OptionError(
            f"noise_variance={noise_variance!r} must be positive: without noise there is no divergence."
        )
    n = len(ours.mean)
    if len(reference.mean) != n:
        raise DataError(f"Functions at {n} and at {len(reference.mean)} probes cannot be compared.")
    noise = noise_variance * np.eye(n)
    moments_of_both = (ours.mean, ours.covariance, reference.mean, reference.covariance)
    return {
        "mean": float(np.sqrt(((ours.mean - reference.mean) ** 2).mean())),
        "std": float(np.sqrt(((ours.std - reference.std) ** 2).mean())),
        "wasserstein": gaussian_wasserstein(*moments_of_both) / math.sqrt(n),
        "sliced": sliced_wasserstein(ours.draws, reference.draws),
        "kl": gaussian_kl(reference.mean, reference.covariance + noise, ours.mean, ours.covariance + noise)
        / n,
        "width": _mean_ratio(ours.std, reference.std),
    }


def _mean_ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Infinite where only the reference is certain somewhere, NaN where both are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((ours / theirs).mean())


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root."""
    values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def _check_moments(*parts: np.ndarray) -> None:
    n = len(parts[0])
    if n == 0:
        raise DataError("Moments of no points cannot be compared; give one probe input at least.")
    for mean, covariance in (parts[:2], parts[2:]):
        if mean.shape != (n,) or covariance.shape != (n, n):
            raise DataError(
                f"Means must be [n] and covariances [n, n], of the same points; got {[list(p.shape) for p in parts]}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError("A mean or covariance holds NaN or infinite values.")
        if not np.allclose(covariance, covariance.T, atol=1e-6 * max(1.0, float(np.abs(covariance).max()))):
            raise DataError("A covariance is not symmetric.")
        values = np.linalg.eigvalsh(covariance)
        if values[0] < -1e-6 * max(1.0, float(values[-1])):
            raise DataError(f"A covariance has the negative eigenvalue {values[0]:.3g}; it is none.")
