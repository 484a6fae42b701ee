"""How good an encoding is: log-likelihoods beside those of columns by themselves, bounds, errors, active units."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from fspace.encoding_data import Material
from fspace.runs import _versions

ACTIVE = 0.01  # variance of a latent's mean over the data. Source: Burda et al. (2016)


def alone(
    train: Float[np.ndarray, "m d"], rows: Float[np.ndarray, "n d"], likelihood: str
) -> Float[np.ndarray, " n"]:
    """log p of rows (nats) where every column is by itself, fitted on the rows of train; NaN counts for nothing."""
    if likelihood == "gaussian":
        mean, std = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
        std = np.where(std > 0, std, 1.0)  # as the models scale what does not vary
        each = -0.5 * ((rows - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    elif likelihood == "bernoulli":
        seen = (~np.isnan(train)).sum(axis=0)
        share = (np.nansum(train, axis=0) + 0.5) / (seen + 1)
        each = rows * np.log(share) + (1 - rows) * np.log1p(-share)
    else:
        top = int(max(train.max(), rows.max())) + 1
        counts = np.stack([(train == c).sum(axis=0) for c in range(top)]) + 0.5
        each = np.log(counts / counts.sum(axis=0))[rows.astype(int), np.arange(rows.shape[1])]
    return np.nansum(each, axis=1)


def measured(
    name: str,
    model: Any,
    material: Material,
    said: Any,
    train: NDArray,
    test: NDArray,
    seconds: float,
    samples: int,
) -> dict[str, Any]:
    """What metrics.json holds. Means are over units; of a part without units they are left out. samples: behind each
    log-likelihood; said: as `encoding.Encoded`."""
    parts = {"fitted": train} | ({"held out": test} if len(test) else {})
    rows_of = {
        key: np.concatenate([material.parts[k] for k in units]) if material.kind == "series" else units
        for key, units in parts.items()
    }
    simple = alone(material.flat[rows_of["fitted"]], material.flat, model.likelihood)
    if material.kind == "series":
        simple = np.array([simple[rows].sum() for rows in material.parts])
    variances = said.means.var(axis=0)
    error = (said.reconstruction - material.values).reshape(len(material.values), -1)
    spread = lambda values: float(values.std() / np.sqrt(len(values)))  # noqa: E731
    scores = {
        key: {
            "log_likelihood": float(said.log_likelihood[units].mean()),
            "standard_error": spread(said.log_likelihood[units]),
            "columns_alone": float(simple[units].mean()),
            "bounds": {bound: float(values[units].mean()) for bound, values in said.bounds.items()},
            "rmse": float(np.sqrt(np.nanmean(error[rows_of[key]] ** 2))),
        }
        for key, units in parts.items()
    }
    notes = [material.note] if material.note else []
    if model.likelihood == "bernoulli" and bool(((material.values > 0) & (material.values < 1)).any()):
        notes.append(
            "Values between 0 and 1 were read as probabilities to be matched: log-likelihoods compare models of these "
            "data, and are no densities."
        )
    results: dict[str, Any] = {
        "data": material.source,
        "model": name,
        "kind": material.kind,
        "units": {key: len(units) for key, units in parts.items()},
        "rows": len(material.values),
        "shape": list(material.values.shape[1:]),
        "scores": scores,
        "samples": samples,
        "latents": said.means.shape[1],
        "active_units": int((variances > ACTIVE).sum()),
        "latent_variances": variances.tolist(),
        "options": model.options(),
        "history": asdict(model.history_),
        "interrupted": model.history_.stopped == "interrupted",
        "notes": notes,
        "seconds": round(seconds, 3),
        "versions": _versions(),
    }
    if said.pareto_k is not None:
        results["pareto_k_above_0.7"] = float((said.pareto_k > 0.7).mean())
    return results
