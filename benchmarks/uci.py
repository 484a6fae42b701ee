"""The published splits of nine UCI tables with GPRegressor's defaults, beside the published rows.

python benchmarks/uci.py                                   all; goes on where an earlier run stopped
python benchmarks/uci.py --tables yacht,energy --splits 3  the first three splits of two tables
python benchmarks/uci.py --set kernel=matern --label matern
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import published

TABLES = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")
# Begun first, so that no long fit is left alone at the end.
SLOWEST = ("protein", "naval", "power", "kin8nm")
SPLITS = {table: 5 if table == "protein" else 20 for table in TABLES}


def run_split(table: str, split: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Fit one split and score it; a failure is a result too."""
    import torch

    import fspace
    from fspace.data import load_uci

    torch.set_num_threads(threads)
    line: dict[str, Any] = {"table": table, "split": split, "settings": settings, "threads": threads}
    try:
        X_train, y_train, X_test, y_test = load_uci(table, split)
        start = time.perf_counter()
        model = fspace.GPRegressor(**{"progress": False, **settings}).fit(X_train, y_train)
        fitted = time.perf_counter()
        predictive = model.predictive(X_test)
        truth = torch.as_tensor(y_test, dtype=predictive.mean.dtype)
        error = predictive.mean - truth
        lower, upper = predictive.interval(0.9)
        line |= {
            "rows": len(y_train),
            "columns": int(X_train.shape[1]),
            "rmse": error.square().mean().sqrt().item(),
            "log_likelihood": predictive.log_prob(truth).mean().item(),
            "coverage_90": ((truth >= lower) & (truth <= upper)).double().mean().item(),
            "fit_s": fitted - start,
            "predict_s": time.perf_counter() - fitted,
            "choice": _plain(getattr(model, "choice_", None)),
        }
    except Exception:  # one failed split must not lose the hours of the others; it is counted in the table
        line["error"] = traceback.format_exc(limit=-3)
    return line


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over the splits of each table, with the verdict against the published rows."""
    tables: dict[str, Any] = {}
    for table in TABLES:
        mine = [line for line in lines if line["table"] == table]
        good = [line for line in mine if "error" not in line]
        if not mine:
            continue
        row: dict[str, Any] = {"splits": len(good), "of": SPLITS[table], "failed": len(mine) - len(good)}
        if good:
            for measure in ("rmse", "log_likelihood", "coverage_90", "fit_s"):
                mean, error = _mean_error([line[measure] for line in good])
                row[measure] = {"mean": mean, "standard_error": error}
            row["first_split"] = {
                measure: line[measure]
                for line in good
                if line["split"] == 0
                for measure in ("rmse", "log_likelihood")
            }
            for measure in ("rmse", "log_likelihood"):
                row[measure]["verdict"] = published.verdict(row[measure]["mean"], measure, table)
                row[measure]["best_published"], row[measure]["best_by"] = published.best(measure, table)
        tables[table] = row
    return tables


def show(tables: dict[str, Any]) -> None:
    """Print the tables beside the published rows; `*` marks the best figure of a column, ties included."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width))
    for measure, rows in (("rmse", published.RMSE), ("log_likelihood", published.LOG_LIKELIHOOD)):
        view = Table("", *tables, title=f"test {measure}, mean over splits (± standard error for fspace)")
        for name, row in rows.items():
            cells = []
            for table in tables:
                is_best = tables[table].get(measure, {}).get("verdict") != "best"
                mark = "*" if is_best and row[table] == published.best(measure, table)[0] else ""
                cells.append(f"{row[table]}{mark}")
            view.add_row(name, *cells)
        view.add_section()
        ours = []
        for row in tables.values():
            if measure not in row:
                ours.append("failed")
                continue
            mark = "" if row[measure]["verdict"] == "behind" else "*"
            ours.append(f"{row[measure]['mean']:.4g}{mark} ± {row[measure]['standard_error']:.2g}")
        view.add_row("fspace defaults", *ours)
        console.print(view)
    view = Table("", *tables, title="fspace: splits done, 90% interval coverage, seconds per fit")
    view.add_row(
        "splits",
        *(
            f"{r['splits']}/{r['of']}" + (f" ({r['failed']} failed)" * bool(r["failed"]))
            for r in tables.values()
        ),
    )
    for measure in ("coverage_90", "fit_s"):
        view.add_row(
            measure, *(f"{r[measure]['mean']:.3g}" if measure in r else "-" for r in tables.values())
        )
    console.print(view)
    for measure in ("rmse", "log_likelihood"):
        verdicts = [row[measure]["verdict"] for row in tables.values() if measure in row]
        console.print(
            f"{measure}: best {verdicts.count('best')}, ties {verdicts.count('ties')}, of {len(verdicts)}"
        )


def main() -> None:
    """Run what is not done yet, then print and write all that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated (default: all nine)")
    parser.add_argument(
        "--splits", type=int, default=20, help="how many splits of each table, from the first"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="fits at a time")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of GPRegressor"
    )
    parser.add_argument("--label", default="defaults", help="names the result; use one for each --set")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left")
    args = parser.parse_args()
    settings = common.parse_settings(args.set)
    if settings and args.label == "defaults":
        parser.error("--set makes it another experiment: give it a --label")
    wanted = [
        (t, s) for t in args.tables.split(",") for s in range(min(args.splits, SPLITS.get(t) or _unknown(t)))
    ]
    wanted.sort(key=lambda pair: SLOWEST.index(pair[0]) if pair[0] in SLOWEST else len(SLOWEST))
    name = "uci" if args.label == "defaults" else f"uci-{args.label}"
    journal = common.RESULTS / f"{name}.jsonl"
    common.RESULTS.mkdir(exist_ok=True)
    if args.fresh:
        journal.unlink(missing_ok=True)
    done = {(line["table"], line["split"]): line for line in read_journal(journal) if "error" not in line}
    if any(line["settings"] != settings for line in done.values()):
        parser.error(f"{journal.name} holds a run with other settings: use another --label, or --fresh")
    todo = [pair for pair in wanted if pair not in done]
    common.say(f"{len(done)} done before, {len(todo)} to do, {args.jobs} at a time")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    commit = common.commit()
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=None) as pool:
        runs = [pool.submit(run_split, table, split, settings, threads) for table, split in todo]
        for future in as_completed(runs):
            line = future.result() | {"commit": commit}
            with journal.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if "error" in line:
                common.say(line["table"], line["split"], "FAILED", line["error"].strip().splitlines()[-1])
            else:
                common.say(
                    f"{line['table']} {line['split']}: rmse {line['rmse']:.4g}, log-likelihood"
                    f" {line['log_likelihood']:.4g}, fit {line['fit_s']:.1f} s"
                )
    lines = list({(line["table"], line["split"]): line for line in read_journal(journal)}.values())
    tables = summarise(lines)
    show(tables)
    result = {
        "command": f"python benchmarks/uci.py{''.join(f' --set {pair}' for pair in args.set)}"
        + ("" if args.label == "defaults" else f" --label {args.label}"),
        "settings": settings,
        "machine": common.machine() | {"threads": threads, "fits_at_a_time": args.jobs},
        "commits": sorted({line["commit"] for line in lines}),
        "tables": tables,
    }
    common.write(name, result)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of earlier runs; a line cut off by an interruption is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _mean_error(values: list[float]) -> tuple[float, float]:
    import numpy as np

    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), spread / len(values) ** 0.5


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=float)) if value is not None else None


def _unknown(table: str) -> int:
    raise SystemExit(f"no table {table!r}; there are {', '.join(TABLES)}")


if __name__ == "__main__":
    main()
