"""Decisions against peers: Bayesian optimisation, bandits, labels, and money lost by acting on the mean.

    python benchmarks/decisions.py                    everything that is not in the results yet
    python benchmarks/decisions.py --parts wheel --seeds 3

Every run (part, case, method, seed) is written to benchmarks/results/decisions.jsonl when it is done; what is there is
not run again. Peers stand in the same run: BoTorch's SingleTaskGP with qLogEI by its own recipe, Sobol points, LinUCB,
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

LINES = common.RESULTS / "decisions.jsonl"
EVALUATIONS = {"branin": 25, "hartmann6": 40, "ackley10": 40, "noisy branin": 25}
DELTAS = (0.5, 0.7, 0.9, 0.95, 0.99)
STEPS = 1000


def functions(case: str) -> tuple[Callable[..., float], int, float, list[tuple[float, float]]]:
    """A function to minimise on settings in its box, their number, its least value, the box."""
    from botorch.test_functions import Ackley, Branin, Hartmann

    kinds: dict[str, Any] = {
        "branin": Branin,
        "noisy branin": Branin,
        "hartmann6": Hartmann,
        "ackley10": lambda: Ackley(10),
    }
    f = kinds[case]()
    box = [(float(a), float(b)) for a, b in f.bounds.T.tolist()]
    return lambda x: float(f(torch.tensor(x, dtype=torch.float64)[None])), f.dim, float(f.optimal_value), box


def bayesian_optimisation(case: str, method: str, seed: int) -> dict[str, Any]:
    """Simple regret (of the noise-free function at the best observed) and seconds a step."""
    f, d, least, box = functions(case)
    rng, n = np.random.default_rng(seed), EVALUATIONS[case]
    noise = 5.0 if case.startswith("noisy") else 0.0
    initial = 2 * d + 2
    start = time.perf_counter()
    names = [f"x{i}" for i in range(d)]

    def observe(x: list[float]) -> float:
        return f(x) + noise * rng.standard_normal()

    if method in ("fspace qLogNEI", "fspace qLogEI", "fspace thompson", "Sobol"):
        from fspace.decisions import Optimizer

        options: dict[str, Any] = {"acquisition": method.split()[-1]} if method != "Sobol" else {}
        count = n if method == "Sobol" else initial
        optimizer = Optimizer(dict(zip(names, box, strict=True)), initial=count, seed=seed, **options)
        for _ in range(n):
            (configuration,) = optimizer.ask()
            optimizer.tell(configuration, observe([configuration[name] for name in names]))
        best = optimizer.best.configuration
        regret = f([best[name] for name in names]) - least
    else:
        regret = f(botorch_recipe(observe, box, initial, n, seed)) - least
    return {"regret": regret, "seconds_a_step": (time.perf_counter() - start) / n}


def botorch_recipe(
    observe: Callable[[list[float]], float], box: list[tuple[float, float]], initial: int, n: int, seed: int
) -> list[float]:
    """BoTorch's own loop: SingleTaskGP, normalised and standardised, refitted at each step, qLogEI."""
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from botorch.optim import optimize_acqf
    from botorch.utils.sampling import draw_sobol_samples
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    bounds = torch.tensor(box, dtype=torch.float64).T
    x = draw_sobol_samples(bounds, n=initial, q=1, seed=seed)[:, 0]
    y = -torch.tensor([observe(row) for row in x.tolist()], dtype=torch.float64)[:, None]
    while len(x) < n:
        model = SingleTaskGP(
            x, y, input_transform=Normalize(len(box), bounds=bounds), outcome_transform=Standardize(1)
        )
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        gain = qLogExpectedImprovement(model, best_f=y.max())
        new, _ = optimize_acqf(gain, bounds, q=1, num_restarts=10, raw_samples=512)
        x = torch.cat([x, new])
        y = torch.cat([y, -torch.tensor([[observe(new[0].tolist())]], dtype=torch.float64)])
    return x[int(y.argmax())].tolist()


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
        ("fspace qLogNEI", "fspace qLogEI", "fspace thompson", "BoTorch qLogEI", "Sobol"),
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
