"""report.html of a study: one self-contained page, with the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fspace.compare import pictures
from fspace.compare.pictures import words
from fspace.compare.problems import InBetween
from fspace.compare.ranks import Ranking, higher_is_better, rank, standard_error
from fspace.compare.results import Results
from fspace.compare.sentences import empty_widths, findings, give
from fspace.errors import DataError, OptionError
from fspace.report import PAGE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT, RESULTS = "report.html", "results.csv"
NUMBER_COLUMNS = (
    "log_likelihood",
    "joint_log_likelihood",
    "crps",
    "rmse",
    "calibration_error",
    "coverage_90",
    "augrc",
)
CLASS_COLUMNS = ("log_likelihood", "joint_log_likelihood", "accuracy", "brier", "calibration_error", "augrc")
DETECTION_COLUMNS = (
    "auroc, largest probability", "auroc, entropy", "auroc, mutual information", "fpr95, entropy",
)  # fmt: skip
RANKED = "log_likelihood"

CAPTIONS = {
    "bands": (
        "Each panel is one method fitted to the same rows (dots). Pale: where it expects 90% of the observations; "
        "darker: 90% of what the function may be; thin lines: functions drawn from it. Dashed orange: 90% of the "
        "reference's function. Where there are no dots a good method is unsure, as the reference is."
    ),
    "calibration": (
        "Of the observations 20% should fall below the stated 20% quantile, and so for every level: the line at zero. "
        "An S-shape that starts above and ends below zero is a method too sure of itself. Of classes: above zero the "
        "method is too cautious, below zero too sure."
    ),
    "ranks": (
        "Every method is ranked on every block, 1 is best; a method that failed on one is last there. Orange bars join "
        "methods whose mean ranks differ by less than the critical difference: these cannot be told apart."
    ),
    "cost": "One point a method: what a fit took on this machine, and the score it bought. Up is better.",
    "detection": (
        "The probability that a row of another kind is less sure than a row of the kind that was fitted; one half is "
        "guessing. Points are means over the splits, bars their standard errors."
    ),
    "priors": (
        "What each prior says of functions before any data: draws, and the band that holds 90% of them. A prior on "
        "weights is chosen weight by weight; only here does one see what it means. The orange panel is the Gaussian "
        "process that the same network becomes when its layers are infinitely wide."
    ),
}


def write_report(
    folder: str | os.PathLike[str],
    results: Results,
    *,
    reference: str | None = None,
    priors: Mapping[str, Any] | None = None,
    prior_grid: Any = None,
    limits: Sequence[str] = (),
    title: str = "Which method serves this data?",
) -> Path:
    """Write report.html, results.csv and the pictures into a folder, and return the page's path.

    reference: the method that others are compared with as functions; priors: names to functions drawn [s, g] over
    prior_grid [g], of which `limits` are infinitely wide networks. Raises OptionError for a folder that cannot be made.
    """
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"The report cannot be written to {str(where)!r} ({error.strerror}); name another folder."
        ) from error
    book = _Book(where)
    parts = [f"<h1>{escape(title)}</h1>", _lead(results), _findings(results, reference)]
    for dataset, task in results.datasets.items():
        parts.append(_dataset(book, results, dataset, task, reference))
    parts.append(_ranks(book, results))
    if priors:
        draws = {name: np.asarray(values) for name, values in priors.items()}
        picture = book.add("priors", "priors", pictures.prior_draws(np.asarray(prior_grid), draws, limits))
        parts.append(f"<h2>What do the priors say of functions?</h2>{picture}")
    parts.append(_troubles(results) + _how(results))
    results.frame().to_csv(where / RESULTS, index=False)
    page = where / REPORT
    body = "\n".join(part for part in parts if part)
    page.write_text(PAGE.format(title=escape(title), style=STYLE + MORE_STYLE, body=body), encoding="utf-8")
    return page


class _Book:
    """Pictures, each in the page and in a file of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.told: set[str] = set()
        self.names: set[str] = set()

    def add(self, name: str, caption: str, figure: Figure) -> str:
        """The picture as part of the page; a caption is given once. Another name where there is one of it."""
        while name in self.names:
            name += "-2"
        self.names.add(name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        (self.folder / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        text = "" if caption in self.told else f"<figcaption>{CAPTIONS[caption]}</figcaption>"
        self.told.add(caption)
        image = f"<img alt='{escape(name, quote=True)}' src='data:image/png;base64,{data}'>"
        return f"<figure class='whole'>{image}{text}</figure>"

    def draw(
        self,
        name: str,
        caption: str,
        draw: Callable[..., Axes],
        *args: Any,
        size: tuple[float, float],
        **options: Any,
    ) -> str:
        """One picture with axes of its own."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        draw(*args, ax=figure.add_subplot(), **options)
        return self.add(name, caption, figure)


# ---- parts of the page -----------------------------------------------------------------------------


def _lead(results: Results) -> str:
    counts = f"{len(results.methods)} methods on {len(results.datasets)} data set{'s' * (len(results.datasets) != 1)}"
    early = " <b>The run was interrupted: not all fits are in.</b>" if results.interrupted else ""
    return (
        f"<p class='lead'>{counts}. Every method gets the same budget: {escape(results.budget)}.{early}</p>"
    )


def _findings(results: Results, reference: str | None) -> str:
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(results, reference))
    note = (
        "<p class='note'>± is the standard error over the splits. Random splits of one table overlap; it is corrected "
        "for that by a rule of thumb (Nadeau and Bengio 2003).</p>"
    )
    return f"<h2>What was found</h2><div class='wide'><ul>{said}</ul></div>{note}"


def _dataset(book: _Book, results: Results, dataset: str, task: str, reference: str | None) -> str:
    slug = "".join(c if c.isalnum() else "-" for c in dataset)
    parts = [f"<h2>{escape(dataset)}</h2><p class='note'>{escape(results.sources.get(dataset, ''))}</p>"]
    rows = [row for row in results.rows if row["dataset"] == dataset]
    if any("functions" in row for row in rows):
        truth = InBetween.truth if dataset == InBetween.name else None
        parts.append(
            book.add(f"{slug}-bands", "bands", pictures.bands(results, dataset, reference, truth=truth))
        )
        parts.append(_distances(results, dataset, reference))
    columns = NUMBER_COLUMNS if task == "regression" else CLASS_COLUMNS
    parts.append(_scores(results, dataset, columns))
    if any("auroc, entropy" in row["scores"] for row in rows):
        parts.append(_scores(results, dataset, DETECTION_COLUMNS))
        size = (7.0, 1.3 + 0.32 * len(results.methods))
        parts.append(
            book.draw(f"{slug}-detection", "detection", pictures.detection, results, dataset, size=size)
        )
    if any("calibration" in row for row in rows):
        small = (7.6, 4.4)
        curves = book.draw(
            f"{slug}-calibration", "calibration", pictures.calibration_curves, results, dataset, size=small
        )
        cost = book.draw(f"{slug}-cost", "cost", pictures.cost_quality, results, dataset, size=small)
        parts.append(f"<div class='grid'>{curves}{cost}</div>")
    return "".join(parts)


def _scores(results: Results, dataset: str, columns: Sequence[str]) -> str:
    """Mean and standard error of every method; the best of each column is bold."""
    tables = {}
    for metric in columns:
        with suppress(DataError):  # no method has it
            tables[metric] = results.means(metric, dataset)
    best = {metric: _best(metric, means) for metric, means in tables.items()}
    lines = []
    for name in dict.fromkeys(row["method"] for row in results.rows if row["dataset"] == dataset):
        cells = []
        for metric, means in tables.items():
            text = "–"
            if name in means:
                text = _figure(*means[name])
            cells.append(f"<td>{f'<b>{text}</b>' if name in best[metric] else text}</td>")
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(words(metric))}</th>" for metric in tables)
    return f"<div class='wide'><table><tr><th></th>{head}</tr>{''.join(lines)}</table></div>"


def _best(metric: str, means: Mapping[str, tuple[float, float]]) -> set[str]:
    """The best of a column: nearest to the level, largest or smallest."""
    if metric.startswith("coverage"):
        distance = {name: abs(mean - 0.9) for name, (mean, _) in means.items()}
    else:
        sign = -1 if higher_is_better(metric) else 1
        distance = {name: sign * mean for name, (mean, _) in means.items()}
    least = min(distance.values(), default=math.nan)
    return {name for name, value in distance.items() if value <= least + 1e-12}


def _figure(value: float, error: float) -> str:
    """A mean and its standard error, with the digits that this leaves."""
    if not math.isfinite(error):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mean, _, spread = give(value, error).partition(" ± ")
    return f"{mean}<span class='dim'> ± {spread}</span>" if spread else mean


def _distances(results: Results, dataset: str, reference: str | None) -> str:
    if reference is None:
        return ""
    try:
        table = results.distances(dataset, reference, InBetween.noise**2)
    except DataError:
        return ""
    widths = empty_widths(results, dataset, reference)
    means = table.groupby(level="method", sort=False).mean()
    lines = []
    for name in means.sort_values("wasserstein").index:
        cells = []
        for column in ("wasserstein", "sliced", "mean", "std", "kl"):
            error = standard_error(table.loc[name, column], 0.0)
            cells.append(f"<td>{_figure(float(means.loc[name, column]), error)}</td>")
        text = "–"
        if name in widths:
            gap = widths[name].dropna()
            text = _figure(float(gap.mean()), standard_error(gap, 0.0))
        label = f"<i>two samples of {escape(reference)}</i>" if name == "chance" else escape(str(name))
        lines.append(f"<tr><th>{label}</th>{''.join(cells)}<td>{text}</td></tr>")
    head = "".join(
        f"<th>{text}</th>"
        for text in (
            "Wasserstein-2",
            "sliced",
            "means apart",
            "deviations apart",
            "KL, nats a probe",
            "width where no data",
        )
    )
    chains = results.worst_chains(dataset, reference)
    agreed = (
        ""
        if chains is None
        else f" Its chains: R-hat of function values at most {chains[0]:.3f}, at least {chains[1]:.0f} effective draws."
    )
    return (
        f"<p class='note'>Distance of f from {escape(reference)} as a function, at probes over the inputs, in units of "
        "y; the last column is the ratio of standard deviations where no training input is near, below 1 where a "
        f"method is too sure.{agreed}</p>"
        f"<div class='wide'><table><tr><th></th>{head}</tr>{''.join(lines)}</table></div>"
    )


def rankings(results: Results, metric: str = RANKED) -> dict[str, Ranking]:
    """Rankings of each task: over data sets where there are five or more, else over all their splits (which are not
    independent). Tasks with less than two methods or blocks are left out."""
    found = {}
    for task in dict.fromkeys(results.datasets.values()):
        try:
            values = results.values(metric, task)
        except DataError:
            continue
        count = len(values.index.unique("dataset"))
        blocks = values.groupby(level="dataset", sort=False).mean() if count >= 5 else values
        if blocks.shape[1] > 1 and len(blocks) > 1:
            what = (
                f"{task}, {count} data sets"
                if count >= 5
                else f"{task}, {len(blocks)} splits of {count} data set{'s' * (count > 1)}"
            )
            found[what] = rank(blocks.to_numpy(), list(blocks.columns), higher_is_better(metric))
    return found


def _ranks(book: _Book, results: Results) -> str:
    parts = []
    for what, ranking in rankings(results).items():
        slug = "ranks-" + what.split(",")[0]
        size = (8.6, 1.6 + 0.3 * ((len(ranking.methods) + 1) // 2))
        parts.append(f"<h3>{escape(what)}</h3>")
        parts.append(book.draw(slug, "ranks", pictures.rank_diagram, ranking, RANKED, size=size))
        order = np.argsort(ranking.ranks, kind="stable")
        best = order[0]
        lines = "".join(
            f"<tr><th>{escape(ranking.methods[i])}</th><td>{ranking.ranks[i]:.2f}</td>"
            f"<td>{'–' if i == best else f'{ranking.pairs[best, i]:.3f}'}</td></tr>"
            for i in order
        )
        note = (
            "" if "splits" not in what else " Splits of one table overlap, so these p-values are too small."
        )
        parts.append(
            f"<p class='note'>Friedman's test that all are alike: p = {ranking.p_value:.2g}. Wilcoxon's test against "
            f"{escape(ranking.methods[best])}, corrected by Holm over all pairs.{note}</p>"
            "<div class='wide'><table><tr><th></th><th>mean rank</th><th>p against the best</th></tr>"
            f"{lines}</table></div>"
        )
    return "<h2>Who is better over all?</h2>" + "".join(parts) if parts else ""


def _troubles(results: Results) -> str:
    rows = results.troubles()
    if not rows:
        return ""
    lines = "".join(
        f"<tr><th>{escape(row['dataset'])}, split {row['split']}</th><td>{escape(row['method'])}</td>"
        f"<td>{escape(row['status'])}</td><td>{escape(row['reason'])}</td></tr>"
        for row in rows
    )
    return (
        "<h2>What went wrong</h2><p class='note'>Fits that were stopped by the budget count with their best state; "
        "those that diverged or failed count as the last of their block, and are left out of means.</p>"
        f"<div class='wide'><table class='facts'>{lines}</table></div>"
    )


def _how(results: Results) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in results.sources.items()
    )
    budget = f"<tr><th>budget</th><td>{escape(results.budget)}</td></tr>"
    return (
        f"<h2>How it was done</h2><div class='wide'><table class='facts'>{budget}{lines}</table></div>"
        f"<p class='note'>All scores, one a line: {RESULTS}.</p>"
    )


MORE_STYLE = """
.whole { margin-bottom: 14px; }
.whole img { max-width: 100%; width: auto; }
ul { margin: .8rem 0; padding-left: 1.2rem; }
li { margin: .35rem 0; }
h3 { font-size: 1rem; margin: 1.2rem 0 .6rem; }
td { white-space: nowrap; }
td .dim { font-size: .82em; }
.facts td { white-space: normal; }
"""
