"""How good predictions are, one function a question: numbers, their intervals, classes, and batches of points together.

Every function takes what was observed first and what was predicted second, and returns a float or arrays of numpy.
Numbers: y [n] and an observed predictive at the same points, in the units of y. Classes: labels [n] are positions of
classes, probs [n, c]. A Predictive goes in as it is, whichever model it came from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor

from fspace.canvas import array, like
from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical, Gaussian, Mixture, Samples
from fspace.predictive_base import check_whole

BINS = 15  # of the calibration error of classes
PAIRS = 2_000_000  # of components that the mixture's CRPS has in memory at a time
DRAWS = 1000  # from a predictive whose CRPS has no closed form here


# ---- numbers -------------------------------------------------------------------------------------


def log_likelihood(y: Any, predictive: Any) -> float:
    """Mean log density a point (nats, in the units of y); of classes, mean log probability.

    Of a mixture it is the mixture's, log of the mean density, and not that of the Gaussian with its mean and variance:
    the two differ wherever members disagree. Infinite where what happened was given no probability.
    """
    y = _labels(y) if isinstance(predictive, Categorical) else numbers(y, predictive)
    return float(array(predictive.log_prob(_as_predicted(y, predictive))).astype(np.float64).mean())


def rmse(y: Any, predictive: Any) -> float:
    """Root mean squared error of the predicted means, in the units of y."""
    y = numbers(y, predictive)
    return float(np.sqrt(np.mean((y - array(predictive.mean)) ** 2)))


def crps(y: Any, predictive: Any) -> float:
    """Mean continuous ranked probability score, in the units of y; smaller is better.

    Closed form for Gaussians, mixtures of Gaussians and samples with Gaussian noise. Samples without noise are taken
    for draws from the predictive (the fair estimator), and other predictives are drawn from 1,000 times (seed 0).
    """
    y = numbers(y, predictive)
    if isinstance(predictive, Samples) and predictive.noise is None:
        return float(crps_samples(y, array(predictive.values).astype(np.float64)).mean())
    parts = gaussian_parts(predictive)
    if parts is None:
        return float(crps_samples(y, array(predictive.rsample(DRAWS, 0)).astype(np.float64)).mean())
    mean, std, weights = parts
    if len(weights) == 1:
        return float(crps_gaussian(y, mean[0], std[0]).mean())
    return float(crps_mixture(y, mean, std, weights).mean())


def crps_gaussian(
    y: Float[np.ndarray, " n"], mean: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """CRPS of N(mean, std^2) at every point. Source: Gneiting and Raftery (2007), eq. 21."""
    return _absolute(y - mean, std) - std / math.sqrt(math.pi)


def crps_mixture(
    y: Float[np.ndarray, " n"],
    mean: Float[np.ndarray, "k n"],
    std: Float[np.ndarray, "k n"],
    weights: Float[np.ndarray, " k"],
) -> Float[np.ndarray, " n"]:
    """CRPS of a mixture of k Gaussians at every point; work grows with k^2. Source: Grimit et al. (2006), eq. 5."""
    near = weights @ _absolute(y - mean, std)
    return near - mixture_spread(mean, std, weights)


def mixture_spread(
    mean: Float[np.ndarray, "k n"], std: Float[np.ndarray, "k n"], weights: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " n"]:
    """Half the mean distance of two independent draws from a mixture of Gaussians, the entropy that belongs to CRPS."""
    k, n = mean.shape
    spread, rows = np.empty(n), max(1, PAIRS // (k * k))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        between = _absolute(
            mean[:, None, part] - mean[None, :, part], np.hypot(std[:, None, part], std[None, :, part])
        )
        spread[part] = 0.5 * np.einsum("i,j,ijn->n", weights, weights, between)
    return spread


def crps_samples(
    y: Float[np.ndarray, " n"], samples: Float[np.ndarray, "s n"], fair: bool = True
) -> Float[np.ndarray, " n"]:
    """CRPS at every point from s draws of the predictive.

    fair: unbiased for the distribution that the draws come from (distances between different draws only; two draws at
    least); else that of the draws themselves, which favours few. Raises DataError for too few. Source: Ferro (2014).
    """
    s = len(samples)
    if s < 1 + fair:
        raise DataError(f"CRPS from samples needs at least {1 + fair} draws of every point; there are {s}.")
    if samples.shape[1:] != y.shape:
        raise DataError(f"Samples are [s, n] for y [n]; got {list(samples.shape)} and {list(y.shape)}.")
    ordered = np.sort(samples, axis=0)
    # the sum of |a - b| over all ordered pairs, from the ranks alone
    spread = 2 * ((2 * np.arange(1, s + 1) - s - 1) @ ordered)
    return np.abs(samples - y).mean(axis=0) - 0.5 * spread / (s * (s - 1 if fair else s))


def _absolute(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """E|Z| of Z from N(mean, std^2); std may be 0."""
    z = np.divide(mean, std, out=np.full(np.broadcast(mean, std).shape, np.inf), where=std > 0)
    density = np.exp(-0.5 * z**2) * math.sqrt(2 / math.pi)
    return np.where(std > 0, std * density + mean * special.erf(z / math.sqrt(2)), np.abs(mean))


def calibration_curve(
    y: Any, predictive: Any, levels: Any = None
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Stated levels and the share of observations below the predictive's quantile of each.

    levels: strictly between 0 and 1 (None: 0.05, 0.10, ..., 0.95). Of a calibrated model both are equal.
    Source: Kuleshov, Fenner and Ermon (2018), eq. 8.
    """
    try:
        stated = np.linspace(0.05, 0.95, 19) if levels is None else np.asarray(levels, dtype=np.float64)
    except (TypeError, ValueError):
        stated = np.empty(0)
    if stated.ndim != 1 or not stated.size or not ((stated > 0) & (stated < 1)).all():
        raise OptionError(f"levels={levels!r} must be numbers strictly between 0 and 1, in a row.")
    below = _below(y, predictive)
    return stated, (below[:, None] <= stated).mean(axis=0)


def calibration_error(y: Any, predictive: Any, levels: Any = None) -> float:
    """Mean distance of the calibration curve from the diagonal: 0 is perfect, chance alone gives about 0.3 / sqrt(n).
    A model that always predicts the marginal distribution is calibrated too; look at sharpness beside it."""
    stated, found = calibration_curve(y, predictive, levels)
    return float(np.abs(stated - found).mean())


def sharpness(predictive: Any) -> float:
    """Root mean predictive variance, in the units of y: how narrow the predictions are, right or wrong."""
    return float(np.sqrt(array(predictive.variance).astype(np.float64).mean()))


def coverage(y: Any, predictive: Any, level: float = 0.9) -> float:
    """Share of observations in their central interval of the level."""
    y = numbers(y, predictive)
    lower, upper = (_known(array(bound), "bound of the interval") for bound in predictive.interval(level))
    return float(((y >= lower) & (y <= upper)).mean())


def interval_width(predictive: Any, level: float = 0.9) -> float:
    """Mean width of the central intervals of the level, in the units of y."""
    lower, upper = (array(bound).astype(np.float64) for bound in predictive.interval(level))
    return float((upper - lower).mean())


# ---- classes -------------------------------------------------------------------------------------


def accuracy(labels: Any, predictive: Any) -> float:
    """Share of rows whose most probable class is right."""
    labels, probs = class_arrays(labels, predictive)
    return float((probs.argmax(axis=1) == labels).mean())


def brier(labels: Any, predictive: Any) -> float:
    """Squared distance of the probabilities from what happened, summed over classes: 0 to 2. Source: Brier (1950)."""
    labels, probs = class_arrays(labels, predictive)
    truth = np.zeros_like(probs)
    truth[np.arange(len(labels)), labels] = 1.0
    return float(((probs - truth) ** 2).sum(axis=1).mean())


def class_calibration_error(labels: Any, predictive: Any, bins: int = BINS, equal: str = "mass") -> float:
    """Expected calibration error of the predicted class: its stated probability against how often it is right.

    equal: bins of equal "mass" (rows) or equal "width" (of the stated probability). It is biased upwards, by chance in
    every bin, and depends on the bins; differences well below 1 / sqrt(n) say nothing. Source: Naeini et al. (2015).
    """
    if equal not in ("mass", "width"):
        raise OptionError(f"equal={equal!r} does not exist; choose 'mass' or 'width'.")
    check_whole("bins", bins)
    labels, probs = class_arrays(labels, predictive)
    stated, hit = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    order = np.argsort(stated, kind="stable")
    if equal == "mass":
        parts = np.array_split(order, min(bins, len(order)))
    else:
        edges = np.linspace(0, 1, bins + 1)[1:-1]
        parts = np.split(order, np.searchsorted(stated[order], edges, side="right"))
    gaps = [len(part) * abs(hit[part].mean() - stated[part].mean()) for part in parts if len(part)]
    return float(sum(gaps) / len(order))


def class_arrays(labels: Any, predictive: Any) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n c"]]:
    """Labels and probabilities of a Categorical or an array [n, c]. Raises DataError where they do not fit together."""
    probs = floats(predictive.probs if isinstance(predictive, Categorical) else predictive, "probabilities")
    labels = _labels(labels)
    if probs.ndim != 2 or len(labels) != len(probs):
        raise DataError(
            f"There are {len(labels)} labels for probabilities of shape {list(probs.shape)}; probabilities are "
            "[n, classes], one row for each label."
        )
    if not np.isfinite(probs).all():
        row = int(np.flatnonzero(~np.isfinite(probs).all(axis=1))[0])
        raise DataError(f"The probabilities of row {row} are NaN or infinite.")
    wrong = (probs < 0).any(axis=1) | (np.abs(probs.sum(axis=1) - 1) > 1e-4)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"Row {row} holds no probabilities: {probs[row].tolist()}; they are at least 0 and sum to one "
            f"({wrong.sum()} such rows in all). Scores need their softmax first."
        )
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise DataError(
            f"Labels are positions of classes, from 0 to {probs.shape[1] - 1} here; these go from {labels.min()} to "
            f"{labels.max()}."
        )
    return labels, probs


# ---- batches of points ---------------------------------------------------------------------------


def dyadic_batches(n: int, size: int = 10, count: int = 200, seed: int = 0) -> Int[np.ndarray, "count size"]:
    """Batches of test points for `joint_log_likelihood`: each draws `size` times from two anchors of its own.

    Random batches of many inputs say little about a joint prediction, for their points hardly depend on each other;
    repeated points do. Raises OptionError for fewer than two points. Source: Osband et al. (2022), section 4.
    """
    if not all(isinstance(k, int | np.integer) for k in (n, size, count)) or n < 2 or size < 1 or count < 1:
        raise OptionError(
            f"dyadic_batches(n={n}, size={size}, count={count}): whole numbers; two points and one batch at least."
        )
    rng = np.random.default_rng(seed)
    first, step = rng.integers(0, n, count), rng.integers(1, n, count)
    anchors = np.stack([first, (first + step) % n], axis=1)  # two different ones
    return np.take_along_axis(anchors, rng.integers(0, 2, (count, size)), axis=1)


def joint_log_likelihood(y: Any, predictive: Any, batches: Any, draws: int = DRAWS, seed: int = 0) -> float:
    """Mean log probability of a batch of observations together, divided by its size (nats a point).

    y [n] (or labels) and a predictive at the n points; batches [count, size] of their positions, as `dyadic_batches`
    gives; a position that comes twice is two observations at one place, with noise of their own. Gaussians, mixtures of
    Gaussians and samples with noise are exact; of classes, probabilities that are joint over the points are drawn
    `draws` times, so the value has Monte Carlo error and is biased low by it. Raises DataError for a predictive without
    a joint distribution. Source: Osband et al. (2022), eq. 1.
    """
    picks = np.asarray(batches)
    if picks.ndim != 2 or picks.dtype.kind not in "iu" or picks.size == 0:
        raise DataError(
            f"batches must be whole numbers [count, size]; got {picks.dtype} {list(picks.shape)}."
        )
    if isinstance(predictive, Categorical):
        labels, probs = class_arrays(y, predictive)
        _known_positions(picks, len(labels))
        samples, weights = array(predictive.samples), array(predictive.weights)
        if predictive.joint is not None:  # those samples hold for each point alone
            samples, weights = array(predictive.joint(draws, seed)), np.full(draws, 1.0 / draws)
        with np.errstate(divide="ignore"):
            logs = np.log(samples[:, np.arange(len(labels)), labels].astype(np.float64))
            value = special.logsumexp(logs[:, picks].sum(-1) + np.log(weights)[:, None], axis=0)
        return float(value.mean() / picks.shape[1])
    y = numbers(y, predictive)
    _known_positions(picks, len(y))
    return float(_joint_density(y, predictive, picks).mean() / picks.shape[1])


def _known_positions(picks: np.ndarray, n: int) -> None:
    if picks.min() < 0 or picks.max() >= n:
        raise DataError(f"batches hold positions from {picks.min()} to {picks.max()}; there are {n} points.")


def _joint_density(y: np.ndarray, predictive: Any, picks: np.ndarray) -> Float[np.ndarray, " count"]:
    """Log density of every batch."""
    if (
        isinstance(predictive, Samples) and predictive.noise is not None
    ):  # given the function, points are independent
        values, noise = (array(part).astype(np.float64) for part in (predictive.values, predictive.noise))
        logs = -0.5 * (np.log(2 * math.pi * noise) + (y - values) ** 2 / noise)
        return special.logsumexp(logs[:, picks].sum(-1), axis=0) - math.log(len(values))
    if isinstance(predictive, Mixture):
        logs = np.stack([_joint_density(y, part, picks) for part in predictive.components])
        with np.errstate(divide="ignore"):
            return special.logsumexp(logs + np.log(array(predictive.weights))[:, None], axis=0)
    if not isinstance(predictive, Gaussian):
        raise DataError(
            f"A {type(predictive).__name__} has no joint density here; Gaussians, mixtures of them and samples with "
            "noise have."
        )
    noise = array(predictive.aleatoric).astype(np.float64)
    covariance = array(predictive.covariance).astype(np.float64)
    blocks = covariance[picks[:, :, None], picks[:, None, :]]
    # between two observations at one place stands the function's variance, on the diagonal the noise as well
    twice = (picks[:, :, None] == picks[:, None, :]) & ~np.eye(picks.shape[1], dtype=bool)
    blocks = blocks - np.where(twice, noise[picks][:, :, None], 0.0)
    try:
        roots = np.linalg.cholesky(blocks)
    except np.linalg.LinAlgError as error:
        raise DataError(
            "The covariance of a batch is singular: pass an observed predictive, whose noise mends it."
        ) from error
    white = np.linalg.solve(roots, (y - array(predictive.mean))[picks][..., None])[..., 0]
    logdet = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(-1)
    return -0.5 * (white**2).sum(-1) - logdet - 0.5 * picks.shape[1] * math.log(2 * math.pi)


# ---- reading -------------------------------------------------------------------------------------


def numbers(y: Any, predictive: Any) -> Float[np.ndarray, " n"]:
    """y [n] as float64. Raises DataError where it does not belong to the predictive, or one of them is no number."""
    if not hasattr(predictive, "variance"):
        raise DataError(
            f"A {type(predictive).__name__} is no predictive; pass model.predictive(X), or one made by hand, such as "
            "Gaussian(mean, variance) of fspace.predictive."
        )
    values, mean = floats(y, "y"), array(predictive.mean)
    if mean.ndim != 1 or values.shape != mean.shape:
        raise DataError(
            f"y has shape {list(values.shape)}, the predictive {list(mean.shape)}; both must be [n], of the same "
            "points (several outputs: one at a time)."
        )
    if len(values) == 0:
        raise DataError("There are no observations to measure on.")
    for what, numbers in (("y", values), ("The predicted mean", mean)):
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise DataError(
                f"{what} is NaN or infinite in row {row} ({(~np.isfinite(numbers)).sum()} in all)."
            )
    return values


def floats(values: Any, name: str) -> np.ndarray:
    """An array of float64. Raises DataError, with its name, where values hold no numbers."""
    try:
        return array(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must hold numbers: {error}.") from error


def _known(values: np.ndarray, what: str) -> np.ndarray:
    """values, of which NaN would count as a miss. Raises DataError where there is any."""
    if np.isnan(values).any():
        row, count = int(np.flatnonzero(np.isnan(values))[0]), np.isnan(values).sum()
        raise DataError(
            f"The predicted {what} is NaN in row {row} ({count} in all): the predictive's variance is NaN or negative "
            "there."
        )
    return values


def _labels(labels: Any) -> Int[np.ndarray, " n"]:
    values = array(labels)
    whole = values.ndim == 1 and values.size > 0 and values.dtype.kind in "iufb"
    if not whole or not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise DataError(
            "Labels must be positions of classes: whole numbers [n], at least one; "
            "numpy.searchsorted(model.classes_, y) gives them."
        )
    return values.astype(np.int64)


def _as_predicted(y: np.ndarray, predictive: Any) -> Tensor:
    import torch

    return (
        torch.from_numpy(y).to(predictive.probs.device) if y.dtype.kind == "i" else like(predictive.mean, y)
    )


def _below(y: Any, predictive: Any) -> Float[np.ndarray, " n"]:
    """P(value <= y); of counts the middle of the step that it takes there."""
    values = like(predictive.mean, numbers(y, predictive))
    below = _known(array(predictive.cdf(values)).astype(np.float64), "probability to be below y")
    if predictive.counts:
        below = below - 0.5 * np.exp(array(predictive.log_prob(values)))
    return below


def gaussian_parts(predictive: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Means and standard deviations [k, n] and weights [k] of a predictive that is a mixture of Gaussians."""
    if isinstance(predictive, Samples):
        if predictive.noise is None:
            return None
        values, noise = array(predictive.values), array(predictive.noise)
        return (
            values.astype(np.float64),
            np.sqrt(noise.astype(np.float64)),
            np.full(len(values), 1 / len(values)),
        )
    parts = predictive.components if isinstance(predictive, Mixture) else [predictive]
    if not all(isinstance(part, Gaussian) for part in parts):
        return None
    mean = np.stack([array(part.mean) for part in parts]).astype(np.float64)
    std = np.stack([array(part.stddev) for part in parts]).astype(np.float64)
    weights = array(predictive.weights).astype(np.float64) if isinstance(predictive, Mixture) else np.ones(1)
    return mean, std, weights
