"""`partial_fit` against a new fit: what is gained, and in what time.

    python benchmarks/streaming.py

Half of a table's training rows are fitted; the other half comes as one batch (and, in a second run, as ten). Beside
stand the model before, and a new fit on all rows, all scored on the same test rows (first published split, units of y).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common
import numpy as np
import torch

TABLES = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "kin8nm": "kin8nm",
    "protein": "protein-tertiary-structure",
}
BATCHES = 10


def score(model: Any, X: Any, y: Any) -> float:
    """Mean test log-likelihood."""
    with torch.no_grad():
        predictive = model.predictive(X)
        return predictive.log_prob(torch.as_tensor(y, dtype=predictive.mean.dtype)).mean().item()


def run(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One table."""
    import fspace
    from fspace.data import load_uci

    X, y, X_test, y_test = load_uci(TABLES[name], 0)
    order = np.random.default_rng(0).permutation(len(y))
    first, later = order[: len(y) // 2], order[len(y) // 2 :]

    def fitted(rows: np.ndarray) -> tuple[Any, float]:
        start = time.perf_counter()
        model = fspace.GPRegressor(progress=False, **settings).fit(X[rows], y[rows])
        return model, time.perf_counter() - start

    model, half = fitted(first)
    found: dict[str, Any] = {"rows": len(y), "before": score(model, X_test, y_test), "fit_half_s": half}
    start = time.perf_counter()
    model.partial_fit(X[later], y[later])
    found |= {"update_s": time.perf_counter() - start, "updated": score(model, X_test, y_test)}
    model.forget("batch 1")
    start = time.perf_counter()
    for rows in np.array_split(later, BATCHES):
        model.partial_fit(X[rows], y[rows])
    found |= {"ten_updates_s": time.perf_counter() - start, "ten_updated": score(model, X_test, y_test)}
    again, seconds = fitted(order)
    found |= {"refit_s": seconds, "refitted": score(again, X_test, y_test)}
    gain = found["refitted"] - found["before"]
    found["gain_kept"] = (found["updated"] - found["before"]) / gain if gain > 0 else None
    return found


def main() -> None:
    """Run the tables asked for, print, write."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of GPRegressor"
    )
    args = parser.parse_args()
    settings = common.parse_settings(args.set)
    results = {}
    for name in args.tables.split(","):
        results[name] = run(name, settings)
        common.say(name, {key: round(value, 4) for key, value in results[name].items() if value is not None})
    view = Table(
        "table", "rows", "before", "updated", "refitted", "gain kept", "update s", "refit s", "ratio"
    )
    for name, r in results.items():
        kept = "none to keep" if r["gain_kept"] is None else f"{r['gain_kept']:.0%}"
        view.add_row(name, f"{r['rows']:,}", f"{r['before']:.3f}", f"{r['updated']:.3f}", f"{r['refitted']:.3f}",
                     kept, f"{r['update_s']:.2f}", f"{r['refit_s']:.1f}",
                     f"{r['refit_s'] / r['update_s']:.0f}")  # fmt: skip
    Console(width=max(110, Console().width)).print(view)
    result = {"command": "python benchmarks/streaming.py", "machine": common.machine(), "settings": settings}
    common.write("streaming", {**result, "tables": results})


if __name__ == "__main__":
    main()
