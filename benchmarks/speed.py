"""Time to a peer's own best test log-likelihood, both sides in one run, the peer by its documented recipe.

    python benchmarks/speed.py                                      GPyTorch, BoTorch, scikit-learn
    python benchmarks/speed.py --gpflow-python ENV/bin/python       and GPflow, from its own environment
    python benchmarks/speed.py --cases svgp-protein --budget 20     a short look at one

A peer is scored on the test rows along its way with its clock stopped, and the time counted is when it
*first* came within --tolerance nats of its best: the peer is spared the rest. fspace's time is that of a
whole `fit`: the first, of the settings listed for the case and tried in that order, that reaches the peer's best
within the same tolerance. The peer's own kernel comes first, then a deep kernel; every fit is in the result.
--set tries other settings instead. GPflow's compilation is not counted. All get standardised columns.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import peers

INDUCING = 512
HIDDEN, FEATURES = (64, 64), 8


def uci(table: str, rows: int | None = None) -> peers.Arrays:
    """The first published split, or `rows` training rows of it."""
    from fspace.data import load_uci

    return standardised(*load_uci(table, 0), rows)


def flights() -> peers.Arrays:
    """Arrival delay of 300,000 flights; the flights that are left are the test rows."""
    from fspace.data import load_flights

    X, y = (np.asarray(part, dtype=np.float64) for part in load_flights(None, seed=0))
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:300_000], order[300_000:]
    return standardised(X[train], y[train], X[test], y[test], None)


def standardised(X: Any, y: Any, X_test: Any, y_test: Any, rows: int | None) -> peers.Arrays:
    """Columns and target to mean 0 and deviation 1 over the training rows."""
    if rows is not None:
        chosen = np.random.default_rng(0).permutation(len(y))[:rows]
        X, y = X[chosen], y[chosen]
    centre, scale = X.mean(0), X.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    return peers.Arrays(
        (X - centre) / scale,
        (y - y.mean()) / y.std(),
        (X_test - centre) / scale,
        (y_test - y.mean()) / y.std(),
    )


def cases(
    gpflow_python: str | None,
) -> dict[str, tuple[str, Callable[[], peers.Arrays], Callable[..., Any], list[dict[str, Any]]]]:
    """name -> (peer, data, the peer's side, settings of fspace in the order tried)."""

    def svgp(data: peers.Arrays, seconds: float, seed: int) -> Any:
        import torch

        torch.manual_seed(seed)
        extractor = peers.network(data.X.shape[1], HIDDEN, FEATURES)
        return peers.gpytorch_svgp(data, seconds, seed, extractor, FEATURES, INDUCING)

    deep = [{"kernel": "deep", "members": 1, "inducing": m} for m in (128, 256, INDUCING)]
    matern = [{"kernel": "matern", "inference": "exact"}, deep[0] | {"inference": "collapsed"}]
    found: dict[str, Any] = {
        "svgp-protein": ("GPyTorch SVGP deep kernel", lambda: uci("protein"), svgp, deep),
        "svgp-kin8nm": ("GPyTorch SVGP deep kernel", lambda: uci("kin8nm"), svgp, deep),
        "svgp-flights": ("GPyTorch SVGP deep kernel", flights, svgp, deep),
        "botorch-2000": ("BoTorch exact", lambda: uci("kin8nm", 2000), peers.botorch_exact, matern),
        "botorch-5000": ("BoTorch exact", lambda: uci("kin8nm", 5000), peers.botorch_exact, matern),
        "sklearn-2000": ("scikit-learn exact", lambda: uci("kin8nm", 2000), peers.sklearn_exact, matern),
        "sklearn-5000": ("scikit-learn exact", lambda: uci("kin8nm", 5000), peers.sklearn_exact, matern),
    }
    if gpflow_python is not None:
        python: str = gpflow_python
        sparse = [{"kernel": "matern", "inference": "collapsed", "inducing": INDUCING}, deep[0]]
        for model in ("sgpr", "svgp"):
            for table in ("kin8nm", "protein"):

                def side(data: peers.Arrays, seconds: float, seed: int, model: str = model) -> Any:
                    return peers.gpflow(data, seconds, seed, python, model, INDUCING)

                found[f"gpflow-{model}-{table}"] = (
                    f"GPflow {model.upper()}", lambda table=table: uci(table), side, sparse)  # fmt: skip
    return found


def fspace_fit(data: peers.Arrays, settings: dict[str, Any], seed: int) -> list[float]:
    """[seconds of the whole fit, rmse, log-likelihood]."""
    import torch

    import fspace

    start = time.perf_counter()
    model = fspace.GPRegressor(**({"progress": False, "seed": seed} | settings)).fit(data.X, data.y)
    spent = time.perf_counter() - start
    predictive = model.predictive(data.X_test)
    truth = torch.as_tensor(data.y_test, dtype=predictive.mean.dtype)
    rmse = (predictive.mean - truth).square().mean().sqrt().item()
    return [spent, rmse, predictive.log_prob(truth).mean().item()]


def warm_up() -> None:
    """First calls load libraries: kept off everyone's clock."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    data = peers.Arrays(X, X[:, 0] + 0.1 * rng.normal(size=60), X, X[:, 0])
    extractor = peers.network(3, (8,), 2)
    peers.gpytorch_svgp(data, 0.2, 0, extractor, 2, 10)
    peers.botorch_exact(data, 1.0, 0)
    peers.sklearn_exact(data, 1.0, 0)
    for kernel in ("deep", "matern"):
        fspace_fit(data, {"kernel": kernel}, 0)


def first_within(curve: peers.Curve, target: float) -> float:
    """Seconds when the log-likelihood first reaches the target; infinity if never."""
    return next((point[0] for point in curve if point[2] >= target), math.inf)


def run_case(
    name: str, case: Any, seconds: float, seed: int, tolerance: float, tries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Both sides of one case."""
    peer, load, side, settings = case
    data = load()
    common.say(f"{name}: {len(data.y)} rows, {data.X.shape[1]} columns, {len(data.y_test)} test rows")
    curve, facts = side(data, seconds, seed)
    best = max(curve, key=lambda point: point[2])
    target = best[2] - tolerance
    peer_time = first_within(curve, target)
    common.say(
        f"  {peer}: log-likelihood {best[2]:.4f}, rmse {best[1]:.4f}, first reached at {peer_time:.1f} s"
    )
    fits = []
    for options in [settings[0] | extra for extra in tries] or settings:
        fit = fspace_fit(data, options, seed)
        fits.append({"settings": options, "seconds": fit[0], "rmse": fit[1], "log_likelihood": fit[2]})
        common.say(f"  fspace {options}: log-likelihood {fit[2]:.4f}, rmse {fit[1]:.4f}, {fit[0]:.1f} s")
    ours = min((fit["seconds"] for fit in fits if fit["log_likelihood"] >= target), default=math.inf)
    return {
        "peer": peer,
        "rows": len(data.y),
        "columns": int(data.X.shape[1]),
        "budget_s": seconds,
        "peer_best": {"log_likelihood": best[2], "rmse": best[1], "seconds": best[0]},
        "peer_s": peer_time,
        "peer_facts": facts,
        "peer_curve": curve,
        "fspace_s": None if math.isinf(ours) else ours,
        "fspace_fits": fits,
        "ratio": None if math.isinf(ours) else peer_time / ours,
    }


def show(results: dict[str, Any]) -> None:
    """Print one line a case."""
    from rich.console import Console
    from rich.table import Table

    view = Table(
        "case", "peer", "rows", "peer's best log-lik.", "peer s", "fspace log-lik.", "fspace s", "sooner",
        title="test log-likelihood per row (standardised target), seconds to the peer's best",
    )  # fmt: skip
    for name, row in results.items():
        if "error" in row:
            view.add_row(name, row["peer"], "", "failed")
            continue
        fit = row["fspace_fits"][-1]
        ratio = "not reached" if row["ratio"] is None else f"{row['ratio']:.1f}"
        view.add_row(
            name, row["peer"], f"{row['rows']:,}",
            f"{row['peer_best']['log_likelihood']:.4f}", f"{row['peer_s']:.1f}",
            f"{fit['log_likelihood']:.4f}", f"{fit['seconds']:.1f}", ratio,
        )  # fmt: skip
    Console(width=max(130, Console().width)).print(view)


def main() -> None:
    """Run the cases asked for; cases of earlier runs stay in the result until run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help="comma-separated (default: all)")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds that a peer may train")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="nats short of the peer's best that still count"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpflow-python", metavar="PATH", help="an interpreter that has gpflow and tf-keras")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", nargs="+", help="a setting to try"
    )
    args = parser.parse_args()
    known = cases(args.gpflow_python)
    chosen = args.cases.split(",") if args.cases else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"no case {name!r}; there are {', '.join(known)} (GPflow's with --gpflow-python)")
    warm_up()
    path = common.RESULTS / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    tries = [common.parse_settings(pairs) for pairs in args.set]
    for name in chosen:
        try:
            results[name] = run_case(name, known[name], args.budget, args.seed, args.tolerance, tries)
        except Exception:  # a peer that fails must not lose the others' figures
            results[name] = {"peer": known[name][0], "error": traceback.format_exc(limit=-3)}
            common.say(name, "FAILED", results[name]["error"])
        results[name] |= {"tolerance": args.tolerance, "seed": args.seed, "machine": common.machine()}
        common.write(
            "speed",
            {"command": "python benchmarks/speed.py --gpflow-python ENV/bin/python", "cases": results},
        )
    show(results)


if __name__ == "__main__":
    main()
