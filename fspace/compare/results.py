"""What a study found, as tidy rows and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fspace.compare.distances import Functions, function_distances
from fspace.compare.ranks import standard_error
from fspace.errors import DataError


@dataclass
class Results:
    """Tidy results: a dict a cell in `rows`, in the order of data sets, splits and methods (`run_cell` says what is in
    it). sources: a sentence about each data set and method; spaces: where each method's prior is; interrupted: Ctrl-C
    came before all cells were done."""

    rows: list[dict[str, Any]]
    budget: str
    sources: dict[str, str] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in their order."""
        return list(dict.fromkeys([*self.spaces, *(row["method"] for row in self.rows)]))

    @property
    def datasets(self) -> dict[str, str]:
        """Names and tasks of the data sets, in their order."""
        return {row["dataset"]: row["task"] for row in self.rows}

    def frame(self) -> pd.DataFrame:
        """One line a cell and score: dataset, task, split, method, status, metric, value."""
        lines = []
        for row in self.rows:
            common = {key: row[key] for key in ("dataset", "task", "split", "method", "status")}
            scores = row["scores"] | {k: row[k] for k in TIMES if k in row}
            lines += [{**common, "metric": name, "value": value} for name, value in scores.items()]
            if not scores:
                lines.append({**common, "metric": "none", "value": float("nan")})
        return pd.DataFrame(lines, columns=[*_COMMON, "metric", "value"])

    def values(self, metric: str, task: str | None = None, dataset: str | None = None) -> pd.DataFrame:
        """A score of every cell: index (dataset, split), a column a method; NaN where there is none. Fits that
        diverged have none that counts. Raises DataError where no cell has it."""
        rows = [row for row in self.rows if task in (None, row["task"]) and dataset in (None, row["dataset"])]
        if not any(metric in _scores(row) for row in rows):
            raise DataError(
                f"No cell has the score {metric!r}; there are {sorted({m for r in rows for m in _scores(r)})}."
            )
        methods = list(dict.fromkeys(row["method"] for row in rows))
        places = list(dict.fromkeys((row["dataset"], row["split"]) for row in rows))
        table = pd.DataFrame(
            np.nan, index=pd.MultiIndex.from_tuples(places, names=["dataset", "split"]), columns=methods
        )
        for row in rows:
            if row["status"] not in ("diverged", "failed"):
                table.loc[(row["dataset"], row["split"]), row["method"]] = _scores(row).get(metric, np.nan)
        return table

    def table(self, metric: str, task: str | None = None) -> pd.DataFrame:
        """Mean over the splits and its standard error, corrected for their overlap (`standard_error`): index dataset,
        columns (method, "mean" or "error" or "splits"). A method's mean is of the splits that it has a score on."""
        values = self.values(metric, task)
        parts = {}
        for dataset in values.index.unique("dataset"):
            share = self.test_share(dataset)
            line: dict[tuple[str, str], float] = {}
            for method in values.columns:
                found = values.loc[dataset, method].dropna().to_numpy()
                mean = float(found.mean()) if len(found) else float("nan")
                line |= {(method, "mean"): mean, (method, "error"): standard_error(found, share)}
                line[(method, "splits")] = float(len(found))
            parts[dataset] = line
        return pd.DataFrame.from_dict(parts, orient="index")

    def means(self, metric: str, dataset: str) -> dict[str, tuple[float, float]]:
        """Mean and standard error on one data set of every method that has one (`table`)."""
        values, share = self.values(metric, dataset=dataset), self.test_share(dataset)
        found = {str(name): values[name].dropna().to_numpy() for name in values.columns}
        return {name: (float(v.mean()), standard_error(v, share)) for name, v in found.items() if len(v)}

    def worst_chains(self, dataset: str, method: str) -> tuple[float, float] | None:
        """The largest R-hat and the least effective size of function values that a sampler tells of, over its splits;
        None of a method without chains."""
        rows = [row for row in self.rows if row["dataset"] == dataset and row["method"] == method]
        told = [row["chains"] for row in rows if "chains" in row]
        if not told:
            return None
        return max(chains["rhat"] for chains in told), min(chains["ess"] for chains in told)

    def distances(self, dataset: str, reference: str, noise_variance: float) -> pd.DataFrame:
        """How far every method is from the reference method as a function, split by split: index (method, split), a
        column each measure of `function_distances`. "chance" is the reference against half of its own draws: what two
        samples of one posterior are apart. Raises DataError where the reference has no functions."""
        rows = [
            row for row in self.rows if row["dataset"] == dataset and "probe_mean" in row.get("functions", {})
        ]
        known = {(row["method"], row["split"]): functions(row) for row in rows}
        if not any(method == reference for method, _ in known):
            raise DataError(f"{reference!r} has no functions on {dataset!r} to compare with.")
        lines = {}
        for (method, split), ours in known.items():
            theirs = known.get((reference, split))
            if theirs is None:
                continue
            if method == reference:
                method, (ours, theirs) = "chance", halves(theirs)
            lines[method, split] = function_distances(ours, theirs, noise_variance)
        table = pd.DataFrame.from_dict(lines, orient="index")
        table.index = pd.MultiIndex.from_tuples(table.index, names=["method", "split"])
        return table

    def test_share(self, dataset: str) -> float:
        """Test rows for each training row, of random splits of one table; 0 where every split has data of its own."""
        rows = [r["rows"] for r in self.rows if r["dataset"] == dataset and "rows" in r and not r["fresh"]]
        if not rows:
            return 0.0
        return float(np.mean([r["test"] / r["train"] for r in rows]))

    def troubles(self) -> list[dict[str, Any]]:
        """The cells that failed, diverged or were stopped, with their reasons."""
        return [row for row in self.rows if row["status"] != "ok"]


def functions(row: Mapping[str, Any]) -> Functions:
    """What a cell kept of its posterior at the probes."""
    kept = row["functions"]
    return Functions(*(np.array(kept[f"probe_{name}"]) for name in ("mean", "covariance", "draws")))


def halves(whole: Functions) -> tuple[Functions, Functions]:
    """The draws of one posterior as two samples, with the moments of each."""
    parts = (whole.draws[::2], whole.draws[1::2])
    first, second = (Functions(part.mean(0), np.cov(part.T), part) for part in parts)
    return first, second


TIMES = ("fit_seconds", "cpu_seconds", "predict_seconds")
_COMMON = ("dataset", "task", "split", "method", "status")


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    times = {name: row[name] for name in TIMES if name in row}
    return dict(row["scores"]) | times
