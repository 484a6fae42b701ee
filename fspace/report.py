"""report.html: one self-contained page about one fitted model, readable without a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import class_plots, plots
from .canvas import array
from .page import NARROW, PAGE, STYLE, WIDE, captions_once, figure, grid
from .report_outputs import correlations_of_outputs
from .scores import (
    CLASS_SCORES,
    SCORES,
    baseline_scores,
    class_baseline_scores,
    class_scores,
    regression_scores,
    shown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_INPUTS = 3  # function draws along so many of the most relevant inputs
MOST_OUTPUTS = 4  # of a multi-output model, so many are drawn
MOST_ROWS = 2_000  # rows from which the typical row and the ranges of the inputs are taken

CAPTIONS = {
    "observed": (
        "Each point is one row that the model has not seen: its prediction to the right, what was "
        "observed upwards. The dashed line is a perfect prediction; orange points lie outside their "
        "interval."
    ),
    "calibration": (
        "An interval with a stated probability of 90% should hold 90% of the observations, and so for"
        " every probability. Below the diagonal the model is too sure, above it too cautious; within "
        "the grey band the difference may be chance."
    ),
    "residuals": (
        "Where the model says that it is unsure, errors should be larger: the blue line should follow"
        " the dashed diagonal. A narrow range of predicted deviations means that the model sees the "
        "same noise everywhere."
    ),
    "training": (
        "The loss that the fit lowered, stage by stage; dashed, the loss on a part held out from "
        "training, with its best point marked."
    ),
    "relevance": (
        "How strongly the fitted function varies with each input, as a share of one. It tells what "
        "the model uses, not what causes what."
    ),
    "reliability": (
        "Of the predictions that state 80%, 80% should be right, and so for every probability. Below the diagonal "
        "the model is too sure, above it too cautious; the diagonal should cross nearly all bars, which are what "
        "chance allows."
    ),
    "confusion": "Each row is what was observed, each column what was predicted; the diagonal is right.",
    "rejection": (
        "If the rows that the model is least sure of are handed to a person, how good is it on the rest? The higher "
        "the blue line above the pale one, the better it knows where it is wrong."
    ),
    "probability": (
        "Probabilities while one input moves and the others stay as in a typical row. The bands hold 90% of "
        "what each may be, as the function is not known: more data would narrow them."
    ),
    "draws": (
        "Functions drawn from the posterior while one input moves and the others stay as in a typical"
        " row. Where they part, the data do not decide. The strokes at the bottom are the data."
    ),
}

COUNTS_ONLY = (
    "<p class='note'>\"Mean only\" predicts the training targets' mean, and the shares of their counts, for every row. "
    "Log-likelihoods are of probabilities (nats); errors and widths are in counts.</p>"
)
FREQUENCIES_ONLY = (
    "<p class='note'>\"Frequencies only\" predicts the training part's class frequencies for every row. The "
    "calibration error is the mean difference between the stated probability of the predicted class and how often it "
    "is right; log-likelihoods are in nats.</p>"
)
MEAN_ONLY = (
    "<p class='note'>\"Mean only\" predicts the training targets' mean and standard deviation for every row. "
    "Errors and widths are in the units of the target, and so are the densities.</p>"
)


def write_report(path: str | os.PathLike[str], model: Any, X: Any, y: Any, **options: Any) -> Path:
    """Write the page about a fitted estimator and return its path; X, y and options as for `report_html`."""
    file = Path(path)
    page = report_html(model, X, y, **options)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def report_html(
    model: Any,
    X: Any,
    y: Any,
    *,
    predictive: Any = None,
    X_train: Any = None,
    y_train: Any = None,
    targets: Sequence[str] = ("y",),
    title: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The page about a fitted estimator, as text.

    X, y: rows held out from the fit (None: the page goes without what needs them). predictive: what the model
    says at X, where it is known already. X_train, y_train: for the function draws and the baseline. targets:
    names of the outputs. facts: further lines of the table of settings.
    """
    of_classes = hasattr(model, "classes_")
    kind = "classification" if of_classes else "regression"
    title = title or f"{', '.join(targets)}: Gaussian process {kind}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if X is not None:
        predictive = predictive if predictive is not None else _predictive(model, X)
    if X is not None and of_classes:
        parts.append(_lead(len(array(y)), y_train, facts))
        parts.append(_class_sections(model, y, predictive, y_train))
    elif X is not None:
        outputs = range(len(targets))
        scores = [regression_scores(y, predictive, output=k) for k in outputs]
        base = (
            [baseline_scores(y, y_train, output=k, counts=predictive.counts) for k in outputs]
            if y_train is not None
            else []
        )
        parts.append(_lead(len(array(y)), y_train, facts))
        table = _score_table(targets, scores, base, note=COUNTS_ONLY if predictive.counts else None)
        if len(targets) == 1:
            parts.append(_cards(scores[0]) + "<h2>How good are the predictions?</h2>")
            figures = _diagnostics(y, predictive, 0, targets[0])
            parts.append(grid([*figures, f"<figure>{table}</figure>"]))
        else:
            parts.append("<h2>How good are the predictions?</h2>" + table)
            for k, target in enumerate(targets[:MOST_OUTPUTS]):
                figures = _diagnostics(y, predictive, k, target, NARROW)
                parts.append(f"<h2>{escape(target)}</h2>" + grid(figures, "trio"))
        if len(targets) > MOST_OUTPUTS:
            parts.append(f"<p class='note'>The first {MOST_OUTPUTS} of {len(targets)} outputs are drawn.</p>")
    else:
        parts.append(
            "<p class='lead'>The model was fitted on all rows; none was held out, so nothing here measures "
            "its predictions.</p>"
        )
    parts.append(_learnt(model, X_train if X_train is not None else X, targets))
    if not of_classes:
        parts.append(correlations_of_outputs(model, targets, y, predictive))
    parts.append("<h2>How was it fitted?</h2>" + _choice_table(getattr(model, "choice_", None)))
    history = list(getattr(model, "history_", None) or [])
    if history:
        parts.append(grid([_figure("training", plots.training_curve, history)]))
    parts.append(_facts_table(model, facts))
    body = captions_once("\n".join(part for part in parts if part))
    return PAGE.format(title=escape(title), style=STYLE, body=body)


# ---- parts of the page -----------------------------------------------------------------------------


def _class_sections(model: Any, labels: Any, predictive: Any, labels_train: Any) -> str:
    """Scores and diagnostics of predicted classes; labels are positions in model.classes_."""
    scores, classes = class_scores(labels, predictive), model.classes_.tolist()
    base = [] if labels_train is None else [class_baseline_scores(labels, labels_train, len(classes))]
    table = _score_table(["class"], [scores], base, CLASS_SCORES, "frequencies only", FREQUENCIES_ONLY)
    figures = [
        _figure("reliability", class_plots.reliability, labels, predictive),
        _figure("confusion", class_plots.confusion, labels, predictive, classes),
        _figure("rejection", class_plots.accuracy_rejection, labels, predictive),
    ]
    cards = _cards(scores, ("accuracy", "log_likelihood", "brier", "ece"), CLASS_SCORES)
    heading = "<h2>How good are the predictions?</h2>"
    return cards + heading + grid([*figures, f"<figure>{table}</figure>"])


def _lead(n: int, y_train: Any, facts: Mapping[str, Any] | None) -> str:
    data = f" of {escape(str(facts['data']))}" if facts and "data" in facts else ""
    fitted = f"Fitted on {len(array(y_train)):,} rows{data}; " if y_train is not None else ""
    text = f"{fitted}everything below is measured on {n:,} further rows that the fit has not seen."
    return f"<p class='lead'>{text[0].upper() + text[1:]}</p>"


def _predictive(model: Any, X: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.predictive(X)


def _cards(
    scores: Mapping[str, float],
    keys: Sequence[str] = ("rmse", "r2", "log_likelihood", "coverage_90"),
    kinds: Sequence[tuple[str, str, bool | None]] = SCORES,
) -> str:
    names = {key: name for key, name, _ in kinds}
    cards = [
        f"<div class='card'><div class='value'>{shown(key, scores[key])}</div><div>{names[key]}</div></div>"
        for key in keys
    ]
    return f"<div class='cards'>{''.join(cards)}</div>"


def _score_table(
    targets: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    base: Sequence[Mapping[str, float]],
    kinds: Sequence[tuple[str, str, bool | None]] = SCORES,
    simple: str = "mean only",
    note: str | None = None,
) -> str:
    """Scores down, targets across, each beside what a simple rule without inputs scores."""
    head = "".join(
        f"<th>{escape(target) if len(targets) > 1 else 'this model'}</th>"
        + (f"<th class='dim'>{simple}</th>" if base else "")
        for target in targets
    )
    rows = []
    for key, name, _ in kinds:
        cells = ""
        for k in range(len(targets)):
            cells += f"<td>{shown(key, scores[k][key])}</td>"
            cells += f"<td class='dim'>{shown(key, base[k][key])}</td>" if base else ""
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    note = (MEAN_ONLY if note is None else note) if base else ""
    return f"<div class='wide'><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>{note}"


def _diagnostics(
    y: Any, predictive: Any, output: int, target: str, size: tuple[float, float] = WIDE
) -> list[str]:
    return [
        _figure(
            "observed", plots.predicted_vs_observed, y, predictive, output=output, name=target, size=size
        ),
        _figure("calibration", plots.calibration, y, predictive, output=output, size=size),
        _figure("residuals", plots.residuals_vs_std, y, predictive, output=output, size=size),
    ]


def _learnt(model: Any, X: Any, targets: Sequence[str]) -> str:
    """Relevance, and draws along the most relevant inputs. Images and sequences have no single inputs."""
    encoder = getattr(model, "encoder_", None)
    values = getattr(model, "relevance_", None)
    if encoder is None or values is None or X is None or len(encoder.source_columns) == 0:
        return ""
    share = input_relevance(encoder, array(values))
    names = encoder.feature_names
    known = np.isfinite(share).all()  # a kernel's slope may be NaN
    figures = [_figure("relevance", plots.relevance, names, share)] if len(names) > 1 and known else []
    rows = _some_rows(X)
    order = [int(i) for i in np.argsort(-share, kind="stable")[:MOST_INPUTS]]
    size = WIDE if len(targets) == 1 else NARROW
    if hasattr(model, "classes_"):
        figures += [_figure("probability", class_plots.probability_along, model, rows, i) for i in order]
        return "<h2>What did it learn?</h2>" + grid(figures)
    draws = [
        [_figure("draws", plots.draws_along, model, rows, i, output=k, name=target, size=size) for i in order]
        for k, target in enumerate(targets[:MOST_OUTPUTS])
    ]
    if len(targets) == 1:
        return "<h2>What did it learn?</h2>" + grid(figures + draws[0])
    return "<h2>What did it learn?</h2>" + grid(figures) + "".join(grid(row, "trio") for row in draws)


def input_relevance(encoder: Any, values: np.ndarray) -> np.ndarray:
    """Relevance of the input columns: the levels of one category summed."""
    share = np.zeros(encoder.n_features_in_)
    if len(values) == len(share):
        return np.asarray(values, dtype=np.float64)
    np.add.at(share, encoder.source_columns, values)
    return share


def _choice_table(choice: Mapping[str, Any] | None) -> str:
    """What kernel="auto" compared, best first, with bars for the differences; and who predicts."""
    if choice is None or len(choice["scores"]) < 2:
        return ""
    scores, weights = choice["scores"], choice["weights"]
    best, worst = max(scores.values()), min(scores.values())
    rows = []
    for name, score in sorted(scores.items(), key=lambda item: -item[1]):
        width = 100.0 if best == worst else 8 + 92 * (score - worst) / (best - worst)
        mark = " class='chosen'" if name in weights else ""
        rows.append(
            f"<tr{mark}><th>{escape(name)}</th><td>{score:.5g}</td><td>{weights.get(name, 0):.0%}</td>"
            f"<td class='bar'><span style='width:{width:.0f}%'></span></td></tr>"
        )
    return (
        "<p>The kernel was chosen from the training data alone. Its score is the "
        f"{escape(choice['unit'])}; more is better. Kernels with a weight predict together, as a mixture.</p>"
        "<div class='wide'><table><tr><th>kernel</th><th>score</th><th>weight</th><th></th></tr>"
        f"{''.join(rows)}</table></div>"
    )


def _facts_table(model: Any, facts: Mapping[str, Any] | None) -> str:
    lines: dict[str, Any] = dict(facts or {})
    for name, value in sorted(model.get_params().items()) if hasattr(model, "get_params") else []:
        lines.setdefault(name, value)
    evidence = getattr(model, "log_evidence_", None)
    if evidence is not None:
        lines["log evidence (training)"] = f"{float(evidence):.6g}"
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_brief(value))}</td></tr>"
        for name, value in lines.items()
    )
    table = f"<div class='wide'><table class='facts'>{rows}</table></div>"
    return f"<details><summary>All settings</summary>{table}</details>"


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:159] + "…"


def _some_rows(X: Any) -> Any:
    n = len(X) if hasattr(X, "__len__") else X.shape[0]
    if n <= MOST_ROWS:
        return X
    keep = np.sort(np.random.default_rng(0).choice(n, MOST_ROWS, replace=False))
    return X.iloc[keep] if hasattr(X, "iloc") else X[keep]


def _figure(caption: str, draw: Callable[..., Axes], *args: Any, **options: Any) -> str:
    return figure(CAPTIONS[caption], draw, *args, **options)
