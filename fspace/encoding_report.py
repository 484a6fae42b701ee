"""report.html of `fspace encode`: one self-contained page about one model with latents and the data it encoded."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fspace import encoding_plots as plots
from fspace.canvas import array
from fspace.encoding import FILTERS, GROUPS, STEPWISE
from fspace.encoding_data import Material
from fspace.encoding_scores import ACTIVE
from fspace.page import PAGE, STYLE, captions_once, figure, grid

SHOWN = 30  # images or rows that are shown beside their reconstructions
NEW = 60  # new images; of rows five times as many
WORDS = {"vae": "variational autoencoder", "draw": "DRAW", "vrnn": "variational recurrent network",
         "mixture": "variational autoencoder with a mixture prior",
         "causal": "variational autoencoder of causal convolutions",
         "switching": "switching linear dynamics", "gp-states": "Gaussian process state space",
         "gp-prior": "variational autoencoder with a Gaussian process prior"}  # fmt: skip
BOUNDS = {
    "elbo": "ELBO", "iwae": "IWAE bound", "fivo": "FIVO bound", "relaxed": "relaxed bound (no bound of this model)"
}  # fmt: skip
CAPTIONS = {
    "map": (
        "Each point is one row, image or step at the mean of its latents, seen along the two directions in which "
        "these vary most. What the model finds alike is near; points far off, or of low log-likelihood, are unusual."
    ),
    "beside": "What the latents lose does not come back: compare each original with what the model makes of its code.",
    "samples": (
        "Made from the prior alone. If they do not look like the data, the model has not learnt the whole of them, "
        "however well it reconstructs."
    ),
    "bound": (
        "Higher is better. Data held out from training tell when to stop; the state with the best of these bounds is "
        "the one that was kept."
    ),
    "active": (
        "A latent whose mean hardly changes over the data carries nothing; the model needs no more than those above "
        "the line. Source: Burda et al. (2016)."
    ),
    "ess": (
        "Where few particles count, the proposal does not know what is coming, and the bound is loose there. A filter "
        "resamples where fewer than half count."
    ),
    "bands": "What the frames say about the latent functions; where frames are missing, the bands widen.",
}


def write_encoding_report(
    path: Path,
    name: str,
    model: Any,
    material: Material,
    said: Any,
    results: Mapping[str, Any],
    shown: NDArray[np.intp],
) -> Path:
    """Write the page and return its path; shown: the units of which examples are taken."""
    title = f"{Path(material.source).name if material.names else material.source}: {WORDS[name]}"
    parts = [f"<h1>{escape(title)}</h1>", _lead(results), _cards(results)]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in results["notes"]]
    size = (6.4, 5.0)
    pictures = [
        figure(CAPTIONS["map"], plots.latent_map, said.means, *_colour(name, material, said), size=size)
    ]
    pictures.append(figure(CAPTIONS["active"], plots.active_units, said.means.var(axis=0), ACTIVE))
    parts.append("<h2>What did it find?</h2>" + grid(pictures))
    seen = _examples(name, model, material, said, shown)
    parts.append("<h2>What does it keep, and what does it make?</h2>" + grid(seen))
    history, unit = (
        results["history"],
        dict.fromkeys(STEPWISE, "bound, nats per step") | {"gp-prior": "log density of hidden frames, nats"},
    )
    own = [] if name in unit else history["train"]  # of whole series, in another unit
    words = unit.get(name, "bound, nats")
    fitted = [
        figure(CAPTIONS["bound"], plots.bound_along, own, history["held_out"], history["best_epoch"], words),
        f"<figure>{_scores(results)}</figure>",
    ]
    if said.ess is not None:
        fitted.append(figure(CAPTIONS["ess"], plots.ess_along, said.ess, results["samples"]))
    parts.append("<h2>How well does it fit?</h2>" + grid(fitted))
    parts.append(_settings(results))
    body = captions_once("\n".join(part for part in parts if part))
    path.write_text(PAGE.format(title=escape(title), style=STYLE, body=body), encoding="utf-8")
    return path


def _unit(results: Mapping[str, Any]) -> str:
    return "series" if results["kind"] == "series" else "image" if results["kind"] == "images" else "row"


def _lead(results: Mapping[str, Any]) -> str:
    units, unit = results["units"], _unit(results)
    many = f"{unit}s" if unit != "series" else unit
    fitted = (
        f"Fitted on {units['fitted']:,} {many if units['fitted'] != 1 else unit} of {escape(results['data'])}"
    )
    held = units.get("held out", 0)
    tail = (
        f"; {held:,} more, which the training has not seen, are what is measured on."
        if held
        else "; none was held out, so that the figures are of data that the training has seen."
    )
    stopped = (
        " <b>The training was interrupted; this is its best state so far.</b>"
        if results["interrupted"]
        else ""
    )
    return f"<p class='lead'>{fitted}{tail}{stopped}</p>"


def _cards(results: Mapping[str, Any]) -> str:
    key = "held out" if "held out" in results["scores"] else "fitted"
    score, unit = results["scores"][key], _unit(results)
    where = "held out" if key == "held out" else "fitted"
    pairs = [
        (f"{score['log_likelihood']:.5g}", f"log-likelihood per {unit}, {where} (nats)"),
        (f"{score['log_likelihood'] - score['columns_alone']:+.4g}", "nats above columns by themselves"),
        (f"{results['active_units']} of {results['latents']}", "latents are active"),
        (f"{score['rmse']:.3g}", "RMS error of reconstructions"),
    ]
    cards = "".join(f"<div class='card'><div class='value'>{a}</div><div>{b}</div></div>" for a, b in pairs)
    return f"<div class='cards'>{cards}</div>"


def _scores(results: Mapping[str, Any]) -> str:
    """Log-likelihood, bounds and errors of the data fitted and held out."""
    scores = results["scores"]
    error = {
        part: f" ± {s['standard_error']:.2g}" if results["units"][part] > 1 else ""
        for part, s in scores.items()
    }
    rows = {"log-likelihood": [f"{s['log_likelihood']:.5g}{error[part]}" for part, s in scores.items()]}
    for bound in next(iter(scores.values()))["bounds"]:
        hard = (
            " (hard latents)"
            if "relaxed" in next(iter(scores.values()))["bounds"] and bound != "relaxed"
            else ""
        )
        rows[BOUNDS[bound] + hard] = [f"{s['bounds'][bound]:.5g}" for s in scores.values()]
    rows["columns by themselves"] = [f"{s['columns_alone']:.5g}" for s in scores.values()]
    rows["RMS error of reconstructions"] = [f"{s['rmse']:.4g}" for s in scores.values()]
    head = "".join(f"<th>{key}</th>" for key in scores)
    body = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    unit = _unit(results)
    by = "particles" if results["model"] in FILTERS else "samples"
    note = (
        f"Nats per {unit}, means and their standard errors. Log-likelihoods are estimated with "
        f"{results['samples']} {by} per {unit}, and are lower bounds in expectation."
    )
    share = results.get("pareto_k_above_0.7")
    if share is not None:
        note += f" For {share:.0%} of them Pareto's k is above 0.7: there the estimate is not to be trusted."
    return f"<div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div><p class='note'>{note}</p>"


def _colour(name: str, material: Material, said: Any) -> tuple[NDArray, str]:
    """What the latent map is coloured by: the label, else the cluster or state, else the log-likelihood."""
    if material.label is not None:
        return material.label, material.label_name
    if said.groups is not None:
        return said.groups, GROUPS[name]
    if material.kind != "series":
        return said.log_likelihood, "log-likelihood (nats)"
    if len(material.parts) > 1:
        each = np.zeros(len(material.values))
        for k, rows in enumerate(material.parts):
            each[rows] = said.log_likelihood[k] / len(rows)
        return each, "log-likelihood of the series (nats per step)"
    assert material.times is not None
    return material.times, "time"


def _examples(name: str, model: Any, material: Material, said: Any, shown: NDArray[np.intp]) -> list[str]:
    """Originals beside reconstructions, and samples."""
    if material.kind == "series":
        return _series(name, model, material, said, shown)
    some = shown[np.linspace(0, len(shown) - 1, min(SHOWN, len(shown))).astype(int)]
    values, made = material.values[some], said.reconstruction[some]
    if material.kind == "images":
        new = array(
            model.sample(NEW, 0, noise=False) if name in ("vae", "mixture") else model.sample(NEW, 0)
        ).astype(float)
        if model.likelihood == "categorical":
            new = new.argmax(-1).astype(float)
        new = new.reshape(-1, *material.values.shape[1:])
        low, high = float(material.values.min()), float(material.values.max())
        return [
            figure(CAPTIONS["beside"], plots.beside, values, made),
            figure(CAPTIONS["samples"], plots.sheet, new, low, high),
        ]
    new = array(model.sample(5 * NEW, 0)).astype(float)
    mean, std = material.values.mean(axis=0), material.values.std(axis=0)
    return [
        figure(CAPTIONS["beside"], plots.table_beside, values, made, material.names, mean, std),
        figure(CAPTIONS["samples"], plots.samples_and_data, material.values, new),
    ]


def _series(name: str, model: Any, material: Material, said: Any, shown: NDArray[np.intp]) -> list[str]:
    assert material.times is not None
    rows = material.parts[int(shown[0])]
    times, values, made = material.times[rows], material.values[rows], said.reconstruction[rows]
    if name == "gp-prior":
        new = array(model.sample(1, 0, t=times))[0].reshape(values.shape)
    else:
        new = array(model.sample(1, 0, steps=len(rows)))[0].astype(float)
    found = []
    if values.ndim == 4:
        some = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        found.append(figure(CAPTIONS["beside"], plots.beside, values[some], made[some]))
        found.append(figure(CAPTIONS["samples"], plots.sheet, new[some], low, high))
    else:
        which = "One series"
        found.append(
            figure(CAPTIONS["beside"], plots.series_beside, times, values, made, material.names, which)
        )
        words = "A new series, from latents drawn from the prior"
        found.append(
            figure(CAPTIONS["samples"], plots.series_beside, times, new, None, material.names, words)
        )
    if said.bands is not None:
        t, lower, upper = said.bands
        mean = said.means[material.parts[0]]
        found.append(figure(CAPTIONS["bands"], plots.bands_along, t, mean, lower, upper))
    return found


def _settings(results: Mapping[str, Any]) -> str:
    lines = {"model": results["model"], "seconds to fit": f"{results['seconds']:.1f}"} | dict(
        results["options"]
    )
    lines["training ended by"] = results["history"]["stopped"]
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in lines.items()
    )
    table = f"<div class='wide'><table class='facts'>{rows}</table></div>"
    return f"<details><summary>All settings</summary>{table}</details>"
