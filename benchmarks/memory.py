"""Peak memory above the imports: a fit on 300,000 rows at M = 1,024, then predictions for 1,500,000 rows.

    python benchmarks/memory.py
    python benchmarks/memory.py --rows 20000 --inducing 128 --predict 100000     a short look

Everything runs in one fresh process; the peak is the kernel's own high-water mark (Linux), reset between
the phases. The base is taken after a small fit and prediction, when all libraries are loaded. The data,
its loading and the predictions are part of the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

MIB = 1024.0  # the kernel counts in KiB


def status(field: str) -> float:
    """A field of the process's status in MiB: VmRSS (now) or VmHWM (the highest since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / MIB
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Set the high-water mark to what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(rows: int, inducing: int, predict: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """The phases, in this process."""
    import fspace
    from fspace.data import load_flights

    rng = np.random.default_rng(0)
    small = rng.normal(size=(300, 8))
    options = {"progress": False, "kernel": "deep", "inference": "collapsed"} | settings
    model = fspace.GPRegressor(**options, inducing=32).fit(small, small[:, 0])
    model.predict(small, return_std=True)
    base = status("VmRSS")
    reset_peak()
    X, y = (np.asarray(part, dtype=np.float64) for part in load_flights(rows, seed=0))
    start = time.perf_counter()
    model = fspace.GPRegressor(**options, inducing=inducing).fit(X, y)
    fit = {
        "rows": rows,
        "inducing": inducing,
        "seconds": time.perf_counter() - start,
        "peak_mib": status("VmHWM") - base,
    }
    predictions = []
    for count in predict:
        many = X[rng.integers(0, len(X), count)] + rng.normal(scale=0.01, size=(count, X.shape[1]))
        reset_peak()
        start = time.perf_counter()
        mean, deviation = model.predict(many, return_std=True)
        seconds = time.perf_counter() - start
        assert np.isfinite(mean).all() and (deviation > 0).all()
        predictions.append({"rows": count, "seconds": seconds, "peak_mib": status("VmHWM") - base})
        del many, mean, deviation
    return {"base_mib": base, "settings": options, "fit": fit, "predict": predictions}


def show(result: dict[str, Any]) -> None:
    """Print one line a phase."""
    from rich.console import Console
    from rich.table import Table

    view = Table("phase", "rows", "peak above", "MiB", "seconds", title="peak memory")
    fit = result["fit"]
    view.add_row(f"fit, M = {fit['inducing']}", f"{fit['rows']:,}", f"imports ({result['base_mib']:.0f} MiB)",
                 f"{fit['peak_mib']:.0f}", f"{fit['seconds']:.1f}")  # fmt: skip
    for part in result["predict"]:
        view.add_row("predict, with std", f"{part['rows']:,}", "imports",
                     f"{part['peak_mib']:.0f}", f"{part['seconds']:.1f}")  # fmt: skip
    Console().print(view)


def main() -> None:
    """Measure in a fresh process, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--inducing", type=int, default=1024)
    parser.add_argument(
        "--predict", type=int, nargs="+", default=[150_000, 1_500_000], help="rows to predict"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of GPRegressor"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(args.rows, args.inducing, args.predict, common.parse_settings(args.set))))
        return
    done = subprocess.run(
        [sys.executable, __file__, "--inside", *sys.argv[1:]], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    result = json.loads(done.stdout.splitlines()[-1])
    show(result)
    words = " ".join(sys.argv[1:])
    common.write(
        "memory",
        {"command": f"python benchmarks/memory.py {words}".strip(), "machine": common.machine(), **result},
    )


if __name__ == "__main__":
    main()
