"""What a study found, in plain sentences, each with its standard error.

A difference is called more than chance where it is beyond the 95% interval of Student's t over the splits, with the
standard error corrected for their overlap (`ranks.standard_error`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from fspace.compare.problems import InBetween
from fspace.compare.ranks import standard_error
from fspace.compare.results import Results, functions
from fspace.errors import DataError

SCORE = "log_likelihood"
TOO_SURE = 0.8  # coverage of 90% intervals below which a method is named
EMPTY = 0.1  # of the probes' range: a probe with no training input this near lies where there is no data


def findings(results: Results, reference: str | None = None) -> list[str]:
    """Sentences about every data set, the most important first. reference: a method of the in-between problem."""
    sentences = []
    for dataset, task in results.datasets.items():
        try:
            values = results.values(SCORE, dataset=dataset)
        except DataError:
            sentences.append(f"{dataset}: no method could be measured.")
            continue
        share = results.test_share(dataset)
        sentences += _best(dataset, values, share)
        sentences += _spaces(dataset, values, share, results)
        if task == "regression":
            sentences += _too_sure(dataset, results)
        else:
            sentences += _noticed(dataset, results)
        sentences += _as_functions(dataset, results, reference)
        sentences += _cost(dataset, values, results)
    return sentences


def difference(first: pd.Series, second: pd.Series, share: float) -> tuple[float, float, bool]:
    """Mean paired difference over the splits that both have, its standard error, and whether it is more than chance."""
    apart = (first - second).dropna().to_numpy()
    apart = apart[np.isfinite(apart)]
    if not len(apart):
        return math.nan, math.nan, False
    mean, error = float(apart.mean()), standard_error(apart, share)
    far = len(apart) > 1 and abs(mean) > stats.t.ppf(0.975, len(apart) - 1) * error
    return mean, error, bool(far)


def give(value: float, error: float, digits: int = 2) -> str:
    """A figure with its standard error, with as many digits as that has."""
    if abs(value) < 1e-9:  # rounding
        return "0"
    if not math.isfinite(error):
        return f"{value:.{digits + 1}g} (one split: no standard error)"
    known = error > 1e-9 * abs(value)
    places = max(0, digits - 1 - math.floor(math.log10(error))) if known else digits
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def _best(dataset: str, values: pd.DataFrame, share: float) -> list[str]:
    """Who predicts best, and who cannot be told from it."""
    means = values.mean().dropna().sort_values(ascending=False)
    infinite = [str(name) for name in means.index if means[name] == -math.inf]
    said = [f"{dataset}: {name} gave what happened no probability at all in some place." for name in infinite]
    means = means[np.isfinite(means)]
    if len(means) < 2:
        return said
    best = means.index[0]
    near = [name for name in means.index[1:] if not difference(values[best], values[name], share)[2]]
    mean, error, far = difference(values[best], values[means.index[1]], share)
    figure = give(float(means.iloc[0]), standard_error(values[best].dropna(), share))
    text = f"{dataset}: {best} predicts best, {figure} nats a point; {means.index[1]} "
    if math.isnan(mean):
        return [f"{text}was measured on other splits, so the two cannot be compared.", *said]
    if mean < 0:
        return [f"{text}has {give(-mean, error)} more on the splits that both have.", *said]
    text += f"has {give(mean, error)} less"
    if far:
        return [f"{text}, which is more than chance.", *said]
    others = _listed([*near[:5], f"{len(near) - 5} more"] if len(near) > 6 else near)
    count = f"{len(values)} split{'s' * (len(values) > 1)}"
    return [f"{text}. Not to be told from it on {count}: {others}.", *said]


def _spaces(dataset: str, values: pd.DataFrame, share: float, results: Results) -> list[str]:
    """A prior on functions against one on weights."""
    means = values.mean().dropna()
    best: dict[str, str] = {}
    for space in ("function", "weights"):
        names = [name for name in means.index if results.spaces.get(name) == space]
        if not names:
            return []
        best[space] = max(names, key=lambda name: means[name])
    count = sum(results.spaces.get(name) == "weights" for name in means.index)
    networks = f"the best of {count} networks" if count > 1 else "the network"
    mean, error, far = difference(values[best["function"]], values[best["weights"]], share)
    if math.isnan(mean):  # no split on which both were measured
        return []
    verdict = ("more" if mean > 0 else "less") + (" than" if far else ", within chance of")
    note = "; picking the best on the test rows favours the side with more methods" if count > 1 else ""
    return [
        f"{dataset}, functions or weights: the prior on functions ({best['function']}) has {give(abs(mean), error)} "
        f"nats a point {verdict} {networks} ({best['weights']}){note}."
    ]


def _too_sure(dataset: str, results: Results) -> list[str]:
    means = results.means("coverage_90", dataset)
    said = [
        f"{name} {100 * mean:.0f}%{_plus(100 * error)}"
        for name, (mean, error) in means.items()
        if mean < TOO_SURE
    ]
    if not said:
        return []
    return [f"{dataset}: 90% intervals hold too little: {_listed(said)}."]


def _plus(error: float) -> str:
    return f" ± {error:.0f}%" if math.isfinite(error) else ""


def _noticed(dataset: str, results: Results) -> list[str]:
    """Who notices rows of another kind."""
    try:
        values = results.values("auroc, entropy", dataset=dataset)
    except DataError:
        return []
    share = results.test_share(dataset)
    means = values.mean().dropna().sort_values(ascending=False)
    if len(means) < 2:
        return []
    first, last = means.index[0], means.index[-1]
    mean, error, far = difference(values[first], values[last], share)
    figure = give(float(means[first]), standard_error(values[first].dropna(), share))
    return [
        f"{dataset}: {first} tells rows of another kind best, AUROC {figure} by entropy; {last} least, "
        f"{give(mean, error)} lower{', more than chance' if far else ', within chance'}."
    ]


def _as_functions(dataset: str, results: Results, reference: str | None) -> list[str]:
    """Nearness to the reference, and how wide each is where there is no data."""
    if reference is None:
        return []
    try:
        table = results.distances(dataset, reference, InBetween.noise**2)["wasserstein"].unstack("method")
    except DataError:
        return []
    chance = table.pop("chance")
    means = table.mean().sort_values()
    if not len(means):
        return []
    near, far = means.index[0], means.index[-1]
    figures = {
        name: give(float(means[name]), standard_error(table[name].dropna(), 0.0)) for name in (near, far)
    }
    sentences = [
        f"{dataset}: as a function {near} is nearest to {reference}, {figures[near]} away (Wasserstein-2, in units of "
        f"y; two samples of {reference} itself are {chance.mean():.2g} apart), and {far} farthest, {figures[far]}."
    ]
    ratios = empty_widths(results, dataset, reference)
    sure = [name for name in ratios.columns if ratios[name].mean() < 0.5]
    if sure:
        said = [
            f"{name} {give(float(ratios[name].mean()), standard_error(ratios[name].dropna(), 0.0))}"
            for name in sure
        ]
        sentences.append(
            f"{dataset}: where there is no data, the standard deviation of f is less than half of {reference}'s in "
            f"{_listed(said)} (the ratio)."
        )
    return sentences


def empty_widths(results: Results, dataset: str, reference: str) -> pd.DataFrame:
    """Mean ratio of standard deviations of f to the reference's, at probes with no training input near: a row a split,
    a column a method."""
    rows = [r for r in results.rows if r["dataset"] == dataset and "probe_mean" in r.get("functions", {})]
    theirs = {row["split"]: functions(row).std for row in rows if row["method"] == reference}
    lines: dict[int, dict[str, float]] = {}
    for row in rows:
        kept = row["functions"]
        if row["method"] == reference or row["split"] not in theirs:
            continue
        probes, inputs = np.array(kept["probes"]), np.array(kept["train"][0])
        empty = np.abs(probes[:, None] - inputs).min(axis=1) > EMPTY * np.ptp(probes)
        if empty.any():
            ratio = functions(row).std[empty] / theirs[row["split"]][empty]
            lines.setdefault(row["split"], {})[row["method"]] = float(ratio.mean())
    return pd.DataFrame.from_dict(lines, orient="index")


def _cost(dataset: str, values: pd.DataFrame, results: Results) -> list[str]:
    seconds = results.values("fit_seconds", dataset=dataset).mean().dropna()
    if len(seconds) < 2:
        return []
    best, quick, slow = (str(name) for name in (values.mean().idxmax(), seconds.idxmin(), seconds.idxmax()))
    return [
        f"{dataset}: a fit takes from {seconds[quick]:.2g} s ({quick}) to {seconds[slow]:.2g} s ({slow}); the best "
        f"score, {best}'s, {seconds[best]:.2g} s."
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
