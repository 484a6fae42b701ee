"""Decisions against peers: Bayesian optimisation, bandits, labels, and money lost by acting on the mean.

    python benchmarks/decisions.py                    everything that is not in the results yet
    python benchmarks/decisions.py --parts wheel --seeds 3

Every run (part, case, method, seed) is written to benchmarks/results/decisions.jsonl when it is done; what is there is
not run again.
Peers stand in the same run: BoTorch's SingleTaskGP with qLogEI by its own recipe, Sobol points, LinUCB,
NeuralLinear, uniform arms, random and margin labels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import common
import numpy as np
import torch
from search_problems import EVALUATIONS

LINES = common.RESULTS / "decisions.jsonl"
DELTAS = (0.5, 0.7, 0.9, 0.95, 0.99)
STEPS = 1000
POOL = 600  # rows that may be labelled
LABELS, LABELS_OF_CLASSES = (20, 20, 200), (20, 20, 160)  # labels at first, in a batch, at most
SECONDS = 60  # of wall time a fit of selective prediction


# Surrogates of `Optimizer` beside its Matern GP; Hamiltonian Monte Carlo asks for four settings at a time.
SURROGATES = {
    "fspace deep": {"model": "deep"},
    "fspace NNGP": {"model": "neural"},
    "fspace ensemble": {"model": "ensemble"},
    "fspace HMC (batches of 4)": {"model": "hmc"},
    "fspace qLogNEI": {"acquisition": "qLogNEI"},
    "fspace qLogEI": {},
    "fspace thompson": {"acquisition": "thompson"},
}


def bayesian_optimisation(case: str, method: str, seed: int) -> dict[str, Any]:
    """Simple regret (of the noise-free function at the best observed that is feasible; none: no regret) and seconds a
    step, of the clock and of the processor; with noise also the regret where the model, a GP for points without one,
    expects the best of what was observed. Surrogates take qLogEI, as BoTorch does, where they do not say another."""
    from search_problems import NOISE, botorch_recipe, expected_best, problem, random_points

    task, rng, n = problem(case), np.random.default_rng(seed), EVALUATIONS[case]
    noise = NOISE if case.startswith("noisy") else 0.0
    initial = 2 * task.d + 2
    start, processor = time.perf_counter(), time.process_time()

    def observe(x: list[float]) -> list[float]:
        return [task.f(x) + noise * rng.standard_normal(), *task.slacks(x)]

    x, y, optimizer = torch.empty(0), torch.empty(0), None
    if method in SURROGATES:
        batch = 4 if "HMC" in method else 1
        x, y, optimizer = _ask_and_tell(task, observe, SURROGATES[method], initial, n, batch, seed)
    elif method == "BoTorch qLogEI":
        x, y = botorch_recipe(task, observe, initial, n, seed)
    else:
        x = random_points(task, n, seed, sobol=method == "Sobol")
        y = torch.tensor([observe(row) for row in x.tolist()], dtype=torch.float64)
        y[:, 0] = -y[:, 0]
    good = (y[:, 1:] >= 0).all(1)
    best = x[torch.where(good, y[:, 0], -math.inf).argmax()].tolist()
    figures = {
        "regret": task.f(best) - task.least if good.any() else None,
        "seconds_a_step": (time.perf_counter() - start) / n,
        "processor_seconds_a_step": (time.process_time() - processor) / n,
    }
    if noise:
        expected = (
            expected_best(task, x, y)
            if optimizer is None
            else [optimizer.recommended.configuration[f"x{i}"] for i in range(task.d)]
        )
        figures["recommended_regret"] = task.f(expected) - task.least
    return figures


def _ask_and_tell(
    task: Any, observe: Any, options: dict[str, Any], initial: int, n: int, batch: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """All x [n, d] that an `Optimizer` asked for, their outcomes [n, 1 + slacks], the first turned around, and it."""
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
    return torch.tensor(x, dtype=torch.float64), outcomes, optimizer


def agents(method: str, width: int, arms: int, noise: float, scale: float, seed: int) -> Any:
    """A bandit by its name in the table; confidence bounds of one standard deviation.

    The floors and the schedule of GPArms and this width were chosen on seeds 0 to 2 of these same problems.
    """
    from fspace.decisions import ArmPosterior, Bandit, GPArms, NeuralLinear, linear_basis

    if method == "NeuralLinear":
        return Bandit(NeuralLinear(width, arms, seed=seed), seed=seed)
    policy = {"GP UCB": "ucb", "LinUCB": "ucb", "uniform": "uniform"}.get(method, "thompson")
    if method.startswith("GP"):
        return Bandit(GPArms(width, arms, reward_scale=scale, seed=seed), policy, width=1.0, seed=seed)
    lines = ArmPosterior(linear_basis(width, noise=noise), arms, reward_scale=scale)
    return Bandit(lines, policy, width=1.0, seed=seed)


def bandit_run(problem: Any, method: str, noise: float, scale: float, seed: int) -> dict[str, Any]:
    """Cumulative regret, also in percent of what uniform arms lose on the same contexts, and time a step."""
    from fspace.decisions import simulate

    figures = []
    for name in (method, "uniform"):
        agent = agents(name, problem.width, problem.arms, noise, scale, seed)
        start = time.perf_counter()
        regret = float(simulate(agent, problem, STEPS, batch=10, seed=seed).sum())
        figures.append((regret, 1000 * (time.perf_counter() - start) / STEPS))
    (regret, ms), (uniform, _) = figures
    return {"regret": regret, "percent_of_uniform": 100 * regret / uniform, "ms_a_step": ms}


def wheel(case: str, method: str, seed: int) -> dict[str, Any]:
    """Contexts times two, to be of spread one for the methods that do not scale them; rewards in units of 50."""
    from fspace.decisions import Wheel

    class Scaled(Wheel):
        def context(self, rng: np.random.Generator) -> Any:
            return 2.0 * super().context(rng)

        def means(self, context: Any) -> Any:
            return super().means(context / 2.0)

    return bandit_run(Scaled(float(case)), method, 1e-3, 50.0, seed)


def table_bandit(case: str, method: str, seed: int) -> dict[str, Any]:
    """Rows of a classification table: a point lost for every wrong arm."""
    from sklearn import datasets

    from fspace.decisions import TableProblem

    X, y = getattr(datasets, f"load_{case}")(return_X_y=True)
    return bandit_run(TableProblem(X, y), method, 0.1, 1.0, seed)


@lru_cache(maxsize=1)
def label_task(case: str, seed: int) -> tuple[Any, ...]:
    """A pool of at most POOL rows, how to fit and to score on the test part, and the score with all labels of it."""
    import fspace
    from fspace.data import load_uci

    if case.startswith("classes of"):
        from sklearn import datasets
        from sklearn.model_selection import train_test_split

        X, y = getattr(datasets, f"load_{case.split()[-1]}")(return_X_y=True)
        X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=y)
    else:
        X, y, X_test, y_test = load_uci(case, seed)
    keep = np.random.default_rng(seed).permutation(len(y))[:POOL]
    X, y = X[keep], y[keep]

    def fit(X: Any, y: Any) -> Any:
        kind = fspace.GPClassifier if case.startswith("classes of") else fspace.GPRegressor
        return kind(kernel="matern", progress=False).fit(X, y)

    def score(model: Any) -> float:
        if case.startswith("classes of"):
            return float((model.predict(X_test) == y_test).mean())
        return -float(np.sqrt(np.mean((model.predict(X_test) - y_test) ** 2)))

    return X, y, fit, score, score(fit(X, y))


def labels(case: str, method: str, seed: int) -> dict[str, Any] | None:
    """Labels needed to reach 95% of what all labels of the pool gain over few, in RMSE (regression) or accuracy."""
    from fspace.decisions import learning_curve

    classes = case.startswith("classes of")
    if method in (("nipv", "eig") if classes else ("margin", "batchbald")):
        return None
    X, y, fit, score, full = label_task(case, seed)
    first, batch, most = LABELS_OF_CLASSES if classes else LABELS
    curve = learning_curve(fit, X, y, score, method, first, batch, min(most, len(y)), seed)
    start = curve[0]["score"]
    goal = start + 0.95 * (full - start)
    reached = [entry["labels"] for entry in curve if entry["score"] >= goal]
    return {
        "labels": reached[0] if reached else None,
        "of": len(y),
        "most": curve[-1]["labels"],
        "last": curve[-1]["score"],
        "full": full,
    }


def newsvendor(case: str, method: str, seed: int) -> dict[str, Any]:
    """Minutes' worth lost a flight by planning a buffer for its delay: a minute short costs four, one too long one."""
    from fspace.decisions import Newsvendor, best_action

    X, y, model = flights(case, seed)
    cost, truth = Newsvendor(4.0, 1.0), torch.tensor(y[1000:])
    action = torch.tensor(model.predict(X[1000:]))
    if method == "posterior":
        action = best_action(model, X[1000:], None, cost).action
    if method == "training quantile":
        action = torch.full_like(truth, float(np.quantile(y[:1000], 0.8)))
    return {"lost": -float(cost(action, truth).mean())}


@lru_cache(maxsize=1)
def flights(case: str, seed: int) -> tuple[Any, Any, Any]:
    """2,000 flights, and the model of the first 1,000 that all ways to act share."""
    import fspace
    from fspace.data import load_flights

    X, y = (np.asarray(part) for part in load_flights(rows=2000, seed=seed))
    model = fspace.GPRegressor(
        kernel="matern", likelihood=case, inference="auto", inducing=100, progress=False
    )
    return X, y, model.fit(X[:1000], y[:1000])


def selective(case: str, method: str, seed: int) -> dict[str, Any] | None:
    """Area under the risk-coverage curve (squared error, or 0-1 of classes; the model's own doubt) of a method of
    `fspace compare` on the split of this number, its generalised form, and the risk where all rows are answered."""
    from fspace.compare.cells import Budget, Cell, run_cell
    from fspace.compare.methods import named_methods
    from fspace.compare.problems import Uci, digits

    (found,) = named_methods([method])
    dataset = digits(10) if case == "digits" else Uci(case)
    if found.estimator(dataset.task) is None:
        return None
    row = run_cell(Cell(dataset, seed, found, Budget(SECONDS), seed))
    if "aurc" not in row["scores"]:
        return {"aurc": None, "augrc": None, "risk": None, "status": row["status"], "reason": row["reason"]}
    scores = row["scores"]
    risk = 1 - scores["accuracy"] if case == "digits" else scores["rmse"] ** 2
    return {
        "aurc": scores["aurc"],
        "augrc": scores["augrc"],
        "risk": risk,
        "status": row["status"],
        "fit_seconds": row["fit_seconds"],
    }


BANDITS = ("GP UCB", "GP Thompson", "linear Thompson", "LinUCB", "NeuralLinear", "uniform")
TABLES = ("boston", "energy", "concrete", "yacht", "wine", "power", "kin8nm")
CLASSES = ("classes of wine", "classes of breast_cancer", "classes of digits")
LABEL_METHODS = ("variance", "nipv", "eig", "bald", "batchbald", "margin", "random")
COMPARED = (
    "gp", "gp-matern", "gp-rbf", "gp-neural", "gp-deep", "wide", "map", "ensemble", "dropout", "mfvi", "laplace",
    "functional-laplace", "swag", "multiswag", "sgld", "sghmc", "csgld", "nuts", "fvi", "functional-prior", "linear",
)  # fmt: skip
Run = Callable[[str, str, int], dict[str, Any] | None]  # None: the case has no such method
PARTS: dict[str, tuple[Run, tuple[str, ...], tuple[str, ...]]] = {
    "newsvendor": (newsvendor, ("gaussian", "student_t"), ("posterior", "mean", "training quantile")),
    "wheel": (wheel, tuple(map(str, DELTAS)), BANDITS),
    "tables": (table_bandit, ("iris", "wine", "breast_cancer"), BANDITS),
    "labels": (labels, (*TABLES, *CLASSES), LABEL_METHODS),
    "selective": (selective, ("yacht", "boston", "energy", "concrete", "wine", "digits"), COMPARED),
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
            if isinstance(runs[0][name], str):
                row[name] = dict(Counter(run[name] for run in runs))
                continue
            values = [run[name] for run in runs if run.get(name) is not None]
            row[name] = {
                "mean": float(np.mean(values)) if values else None,
                "missing": len(runs) - len(values),
            }
            if len(values) > 1:
                row[name]["standard_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        parts.setdefault(part, {}).setdefault(case, {})[method] = row
    _pair_newsvendor(parts.get("newsvendor", {}))
    return parts


def _pair_newsvendor(cases: dict[str, Any]) -> None:
    """What every way to act loses beyond the posterior's, on the same flights: mean and standard error over seeds."""
    lost = {
        (run["case"], run["method"], run["seed"]): run["figures"]["lost"]
        for run in done()
        if run["part"] == "newsvendor"
    }
    for case, rows in cases.items():
        for method, row in rows.items():
            more = [
                value - lost[case, "posterior", seed]
                for (of, by, seed), value in lost.items()
                if (of, by) == (case, method) and (case, "posterior", seed) in lost
            ]
            row["beyond_posterior"] = {"mean": float(np.mean(more)), "missing": row["seeds"] - len(more)}
            if len(more) > 1:
                error = np.std(more, ddof=1) / math.sqrt(len(more))
                row["beyond_posterior"]["standard_error"] = float(error)


def main() -> None:
    """Run what is missing, seed by seed, and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--cases", default="", help="comma-separated; without it, all of each part")
    parser.add_argument("--methods", default="", help="comma-separated; without it, all of each part")
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
                    left_out = args.methods and method not in args.methods.split(",")
                    if left_out or (part, case, method, seed) in written:
                        continue
                    figures = run(case, method, seed)
                    if figures is None:
                        continue
                    entry = {"part": part, "case": case, "method": method, "seed": seed, "figures": figures}
                    with LINES.open("a") as file:
                        file.write(json.dumps(entry | {"commit": common.commit()}) + "\n")
                    common.say(part, case, method, seed, figures)
    result = {
        "command": "python benchmarks/decisions.py",
        "machine": common.machine(),
        "budget": {
            "evaluations": EVALUATIONS,
            "bandit_steps": STEPS,
            "pool": POOL,
            "selective_seconds": SECONDS,
        },
    }
    common.write("decisions", {**result, "parts": summary()})


if __name__ == "__main__":
    main()
