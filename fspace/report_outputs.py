"""The part of the report about several outputs that are correlated."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from .canvas import like

MOST_OUTPUTS = 12  # in one table


def correlations_of_outputs(model: Any, targets: Sequence[str], y: Any = None, predictive: Any = None) -> str:
    """Tables of the correlations of the functions and of the noise, and what they are worth at rows held out, y [n, t]
    and what the model says there; nothing where outputs are independent."""
    if getattr(model, "outputs", None) != "coregionalised":
        return ""
    if not np.any(np.triu(model.noise_covariance_, 1)):
        return (
            "<h2>How do the outputs go together?</h2><p>They do not, or not enough: the evidence does not pay for "
            "learning their correlations, and they stay independent.</p>"
        )
    functions = _table("of the functions", correlation(model.coregionalisation_), targets)
    noise = _table("of the noise", correlation(model.noise_covariance_), targets)
    rest = f" The first {MOST_OUTPUTS} outputs." if len(targets) > MOST_OUTPUTS else ""
    return (
        "<h2>How do the outputs go together?</h2><p>Correlations that the model has learned: of the functions, before "
        f"any data are seen at an input, and of the noise around them.{rest}</p>{functions}{noise}"
        + ("" if predictive is None else _worth(y, predictive))
    )


def _worth(y: Any, predictive: Any) -> str:
    y = like(predictive.mean, y)
    together = float(predictive.row_log_prob(y).mean())
    apart = float(predictive.log_prob(y).sum(-1).mean())
    return (
        f"<p>Log density of all outputs of a row together, held out: {together:.4g} nats; as if they were "
        f"independent: {apart:.4g}.</p>"
    )


def correlation(covariance: Float[np.ndarray, "t t"]) -> Float[np.ndarray, "t t"]:
    """Correlations of a covariance."""
    deviation = np.sqrt(np.diag(covariance))
    return covariance / deviation / deviation[:, None]


def _table(caption: str, values: Float[np.ndarray, "t t"], targets: Sequence[str]) -> str:
    names = [escape(target) for target in targets[:MOST_OUTPUTS]]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{v:.2f}</td>' for v in row[: len(names)])}</tr>"
        for name, row in zip(names, values)
    )
    return f"<div class='wide'><table><tr><th>{caption}</th>{head}</tr>{rows}</table></div>"
