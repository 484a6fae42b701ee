"""What is not known (epistemic) and what is noise (aleatoric), by several rules.

Every split is the model's own account of itself: another prior, likelihood or approximation splits the same data
differently, and no split is right or wrong by the data alone (Bülte et al. 2025). Grade it by a decision that uses it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fspace.canvas import array
from fspace.compare.metrics import gaussian_parts, mixture_spread
from fspace.errors import OptionError
from fspace.predictive import Categorical

CLASS_RULES, NUMBER_RULES = ("entropy", "brier"), ("variance", "crps")


class Split(NamedTuple):
    """Total uncertainty and its parts, [n] each; total = epistemic + aleatoric."""

    total: Float[np.ndarray, " n"]
    epistemic: Float[np.ndarray, " n"]
    aleatoric: Float[np.ndarray, " n"]


def uncertainty(predictive: Any, rule: str | None = None) -> Split:
    """The total uncertainty of every point, split.

    Classes: "entropy" (default; nats): entropy of the mean probabilities = mutual information + expected entropy.
    "brier": the same with Gini impurity, from 0 to 1.
    Numbers: "variance" (default; squared units of y): the law of total variance, Var E[y|f] + E Var[y|f].
    "crps" (units of y): half the mean distance of two draws of y, of which the members' own is aleatoric.
    All but "variance" are the entropy of a proper scoring rule: total is the least expected score of the mean
    prediction, aleatoric that of the members', epistemic the mean divergence between them (Kotelevskii et al. 2024).

    Limits: entropy and mutual information do not behave as one would ask of the parts: the split depends on the
    members' mean, mutual information is small for members that agree to be unsure, and additivity is a convention
    (Wimmer et al. 2023). Variances see two moments only; with heavy tails they may not exist. All parts need draws of
    the function: a single network, or a Gaussian without an epistemic part, has epistemic 0, which says nothing.
    Raises OptionError for a rule that the predictive has not.
    """
    classes = isinstance(predictive, Categorical)
    rules = CLASS_RULES if classes else NUMBER_RULES
    rule = rule or rules[0]
    if rule not in rules:
        raise OptionError(
            f"rule={rule!r} is not one of {'classes' if classes else 'numbers'}; choose one of {', '.join(rules)}."
        )
    if rule in ("entropy", "variance"):
        epistemic, aleatoric = (
            array(part).astype(np.float64) for part in (predictive.epistemic, predictive.aleatoric)
        )
        return Split(epistemic + aleatoric, epistemic, aleatoric)
    total, aleatoric = _brier(predictive) if rule == "brier" else _crps(predictive)
    return Split(total, total - aleatoric, aleatoric)


def _brier(predictive: Categorical) -> tuple[np.ndarray, np.ndarray]:
    """Gini impurity of the mean probabilities, and its mean over the members."""
    samples, weights = (array(part).astype(np.float64) for part in (predictive.samples, predictive.weights))
    mean = np.tensordot(weights, samples, axes=1)
    return 1 - (mean**2).sum(-1), weights @ (1 - (samples**2).sum(-1))


def _crps(predictive: Any) -> tuple[np.ndarray, np.ndarray]:
    """Half the mean distance of two draws of y: from the mixture, and from one member.

    Gaussian with a known noise: members are N(f, noise), f Gaussian, so that both have a closed form.
    """
    parts = gaussian_parts(predictive)
    if parts is None:
        raise OptionError(
            f"rule='crps' is for Gaussians, mixtures of them and samples with noise, not {type(predictive).__name__}."
        )
    mean, std, weights = parts
    noise = np.sqrt(np.atleast_2d(_noise(predictive)))
    return mixture_spread(mean, std, weights), weights @ noise / math.sqrt(math.pi)


def _noise(predictive: Any) -> np.ndarray:
    """Noise variances of the members, [k, n]."""
    if hasattr(predictive, "components"):
        return np.stack([array(part.aleatoric) for part in predictive.components]).astype(np.float64)
    return array(predictive.noise if hasattr(predictive, "noise") else predictive.aleatoric).astype(
        np.float64
    )
