"""Decisions against peers: Bayesian optimisation, bandits, labels, and money lost by acting on the mean.

    python benchmarks/decisions.py                    everything that is not in the results yet
    python benchmarks/decisions.py --parts wheel --seeds 3

Every run (part, case, method, seed) is written to benchmarks/results/decisions.jsonl when it is done; what is there is
not run again. One seed of all of optimisation takes about 11 minutes of one core, three of them deep kernels.
Peers stand in the same run: BoTorch's SingleTaskGP with qLogEI by its own recipe, Sobol points, LinUCB,
NeuralLinear, uniform arms, random and margin labels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np
import torch
from search_problems import EVALUATIONS

LINES = common.RESULTS / "decisions.jsonl"
DELTAS = (0.5, 0.7, 0.9, 0.95, 0.99)
STEPS = 1000


# Surrogates of `Optimizer` beside its Matern GP; Hamiltonian Monte Carlo asks for four settings at a time.
SURROGATES = {
    "fspace deep": {"model": "deep"},
    "fspace NNGP": {"model": "neural"},
    "fspace ensemble": {"model": "ensemble"},
    "fspace HMC, batches of 4": {"model": "hmc"},
    "fspace qLogNEI": {"acquisition": "qLogNEI"},
    "fspace qLogEI": {},
    "fspace thompson": {"acquisition": "thompson"},
}


def bayesian_optimisation(case: str, method: str, seed: int) -> dict[str, Any]:
    """Simple regret (of the noise-free function at the best observed that is feasible; none: no regret) and seconds a
    step, of the clock and of the processor. Surrogates take qLogEI, as BoTorch does, where they do not say another."""
    from search_problems import NOISE, botorch_recipe, problem, random_points

    task, rng, n = problem(case), np.random.default_rng(seed), EVALUATIONS[case]
    noise = NOISE if case.startswith("noisy") else 0.0
    initial = 2 * task.d + 2
    start, processor = time.perf_counter(), time.process_time()

    def observe(x: list[float]) -> list[float]:
        return [task.f(x) + noise * rng.standard_normal(), *task.slacks(x)]

    x, y = torch.empty(0), torch.empty(0)
    if method in SURROGATES:
        x, y = _ask_and_tell(task, observe, SURROGATES[method], initial, n, 4 if "HMC" in method else 1, seed)
    elif method == "BoTorch qLogEI":
        x, y = botorch_recipe(task, observe, initial, n, seed)
    else:
        x = random_points(task, n, seed, sobol=method == "Sobol")
        y = torch.tensor([observe(row) for row in x.tolist()], dtype=torch.float64)
        y[:, 0] = -y[:, 0]
    good = (y[:, 1:] >= 0).all(1)
    best = x[torch.where(good, y[:, 0], -math.inf).argmax()].tolist()
    return {
        "regret": task.f(best) - task.least if good.any() else None,
        "seconds_a_step": (time.perf_counter() - start) / n,
        "processor_seconds_a_step": (time.process_time() - processor) / n,
    }


def _ask_and_tell(
    task: Any, observe: Any, options: dict[str, Any], initial: int, n: int, batch: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All x [n, d] that an `Optimizer` asked for, and their outcomes [n, 1 + slacks], the first turned around."""
    from fspace.decisions import Optimizer

    slacks = [f"slack{k}" for k in range(len(task.slacks([0.5] * task.d)))]
    optimizer = Optimizer(
        task.settings(),
        {"y": "minimize"},
        [f"{name} >= 0" for name in slacks],
        initial=initial,
        seed=seed,
        **{"acquisition": "qLogEI", **options},
    )
    x: list[list[float]] = []
    y: list[list[float]] = []
    while len(x) < n:
        for configuration in optimizer.ask(1 if len(x) < initial else min(batch, n - len(x))):
            x.append([float(configuration[f"x{i}"]) for i in range(task.d)])
            y.append(observe(x[-1]))
            optimizer.tell(configuration, dict(zip(["y", *slacks], y[-1], strict=True)))
    outcomes = torch.tensor(y, dtype=torch.float64)
    outcomes[:, 0] = -outcomes[:, 0]
    return torch.tensor(x, dtype=torch.float64), outcomes


def agents(method: str, width: int, arms: int, noise: float, scale: float, seed: int) -> Any:
    """A bandit by its name in the table."""
    from fspace.decisions import ArmPosterior, Bandit, NeuralLinear, linear_basis

    if method == "NeuralLinear":
        return Bandit(NeuralLinear(width, arms, seed=seed), seed=seed)
    lines = ArmPosterior(linear_basis(width, noise=noise), arms, reward_scale=scale)
    policy = {"linear Thompson": "thompson", "LinUCB": "ucb", "uniform": "uniform"}.get(method)
    if policy:
        return Bandit(lines, policy, seed=seed)
    return Bandit(ArmPosterior(gp_basis(width, noise, seed), arms, reward_scale=scale), seed=seed)


def gp_basis(width: int, noise: float, seed: int, inducing: int = 100) -> Any:
    """Matern kernel of lengthscale sqrt(width) on standardised contexts, normal inducing inputs: nothing is learned."""
    from gpytorch.kernels import MaternKernel

    from fspace.inference.basis import Basis
    from fspace.inference.optimise import gaussian_likelihood

    kernel = MaternKernel(nu=2.5).double()
    kernel.lengthscale = math.sqrt(width)
    likelihood = gaussian_likelihood(1, noise, torch.device("cpu"))
    likelihood.noise = torch.tensor([[noise]], dtype=torch.float64)
    z = torch.randn(inducing, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Basis(kernel.requires_grad_(False), z, likelihood)


def wheel(case: str, method: str, seed: int) -> dict[str, Any]:
    """Cumulative regret; contexts times two, to be of spread one; rewards in units of 50."""
    from fspace.decisions import Wheel, simulate

    class Scaled(Wheel):
        def context(self, rng: np.random.Generator) -> Any:
            return 2.0 * super().context(rng)

        def means(self, context: Any) -> Any:
            return super().means(context / 2.0)

    agent = agents(method, 2, 5, 1e-3, 50.0, seed)
    start = time.perf_counter()
    regret = simulate(agent, Scaled(float(case)), STEPS, batch=10, seed=seed)
    return {"regret": regret.sum(), "ms_a_step": 1000 * (time.perf_counter() - start) / STEPS}


def table_bandit(case: str, method: str, seed: int) -> dict[str, Any]:
    """Cumulative regret on a classification table: a point lost for every wrong arm."""
    from sklearn import datasets

    from fspace.decisions import TableProblem, simulate

    X, y = getattr(datasets, f"load_{case}")(return_X_y=True)
    problem = TableProblem(X, y)
    agent = agents(method, problem.width, problem.arms, 0.1, 1.0, seed)
    return {"regret": simulate(agent, problem, STEPS, batch=10, seed=seed).sum()}


def labels(case: str, method: str, seed: int) -> dict[str, Any]:
    """Labels needed to reach 95% of what all labels gain over few, in RMSE (regression) or accuracy."""
    import fspace
    from fspace.data import load_uci
    from fspace.decisions import learning_curve

    X, y, X_test, y_test = load_uci(
        {"boston": "bostonHousing", "energy": "energy", "concrete": "concrete"}[case], seed
    )

    def fit(X: Any, y: Any) -> Any:
        return fspace.GPRegressor(kernel="matern", progress=False).fit(X, y)

    def score(model: Any) -> float:
        return -float(np.sqrt(np.mean((model.predict(X_test) - y_test) ** 2)))

    most = min(200, len(y))
    curve = learning_curve(fit, X, y, score, method, 20, 20, most, seed)
    full, first = score(fit(X, y)), curve[0]["score"]
    goal = first + 0.95 * (full - first)
    reached = [entry["labels"] for entry in curve if entry["score"] >= goal]
    return {
        "labels": reached[0] if reached else None,
        "of": len(y),
        "most": most,
        "last": curve[-1]["score"],
        "full": full,
    }


def newsvendor(case: str, method: str, seed: int) -> dict[str, Any]:
    """Minutes' worth lost a flight by planning a buffer for its delay: a minute short costs four, one too long one."""
    import fspace
    from fspace.data import load_flights
    from fspace.decisions import Newsvendor, best_action

    X, y = (np.asarray(part) for part in load_flights(rows=2000, seed=seed))
    model = fspace.GPRegressor(
        kernel="matern", likelihood=case, inference="auto", inducing=100, progress=False
    )
    model.fit(X[:1000], y[:1000])
    cost, truth = Newsvendor(4.0, 1.0), torch.tensor(y[1000:])
    action = torch.tensor(model.predict(X[1000:]))
    if method == "posterior":
        action = best_action(model, X[1000:], None, cost).action
    if method == "training quantile":
        action = torch.full_like(truth, float(np.quantile(y[:1000], 0.8)))
    return {"lost": -float(cost(action, truth).mean())}


BANDITS = ("GP Thompson", "linear Thompson", "LinUCB", "NeuralLinear", "uniform")
PARTS: dict[str, tuple[Callable[[str, str, int], dict[str, Any]], tuple[str, ...], tuple[str, ...]]] = {
    "newsvendor": (newsvendor, ("gaussian", "student_t"), ("posterior", "mean", "training quantile")),
    "wheel": (wheel, tuple(map(str, DELTAS)), BANDITS),
    "tables": (table_bandit, ("iris", "wine", "breast_cancer"), BANDITS),
    "labels": (labels, ("boston", "energy", "concrete"), ("variance", "nipv", "random")),
    "optimisation": (
        bayesian_optimisation,
        tuple(EVALUATIONS),
        (*SURROGATES, "BoTorch qLogEI", "Sobol", "random"),
    ),
}


def done() -> Iterator[dict[str, Any]]:
    """Runs that are written; a last line that was cut off is none."""
    for line in LINES.read_text().splitlines() if LINES.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def summary() -> dict[str, Any]:
    """Mean and standard error over seeds of every figure, by part, case and method."""
    figures: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in done():
        figures[run["part"], run["case"], run["method"]].append(run["figures"])
    parts: dict[str, Any] = {}
    for (part, case, method), runs in figures.items():
        row: dict[str, Any] = {"seeds": len(runs)}
        for name in runs[0]:
            values = [run[name] for run in runs if run[name] is not None]
            row[name] = {
                "mean": float(np.mean(values)) if values else None,
                "missing": len(runs) - len(values),
            }
            if len(values) > 1:
                row[name]["standard_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        parts.setdefault(part, {}).setdefault(case, {})[method] = row
    return parts


def main() -> None:
    """Run what is missing, seed by seed, and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--cases", default="", help="comma-separated; without it, all of each part")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    written = {(run["part"], run["case"], run["method"], run["seed"]) for run in done()}
    common.RESULTS.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        for part in args.parts.split(","):
            run, cases, methods = PARTS[part]
            for case in [case for case in cases if not args.cases or case in args.cases.split(",")]:
                for method in methods:
                    if (part, case, method, seed) in written:
                        continue
                    figures = run(case, method, seed)
                    entry = {"part": part, "case": case, "method": method, "seed": seed, "figures": figures}
                    with LINES.open("a") as file:
                        file.write(json.dumps(entry | {"commit": common.commit()}) + "\n")
                    common.say(part, case, method, seed, figures)
    result = {
        "command": "python benchmarks/decisions.py",
        "machine": common.machine(),
        "budget": {"evaluations": EVALUATIONS, "bandit_steps": STEPS},
    }
    common.write("decisions", {**result, "parts": summary()})


if __name__ == "__main__":
    main()
