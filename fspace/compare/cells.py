"""One cell of a study: a method fitted to one split of a data set within a budget, and everything measured on it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.model_selection import ParameterSampler, train_test_split
from threadpoolctl import threadpool_limits

from fspace.canvas import array
from fspace.compare import metrics, selective
from fspace.compare.distances import Functions, function_values
from fspace.compare.problems import Dataset, Problem
from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical, Gaussian, as_tensor

LEVELS = np.linspace(0.05, 0.95, 19)  # of the calibration curves
RELIABILITY_BINS = 10
DRAWS, SHOWN_DRAWS = 300, 6  # functions kept of a problem with probes, and of its picture
VALIDATION = 0.2  # share of the training rows on which settings are compared
LEAST_GRACE = (
    20.0  # seconds after which a fit that does not end is interrupted again, and then may lose its state
)
LONGEST = 1e7  # seconds of a budget
LATER = 0.05  # seconds to wait where an import would be cut through


@dataclass(frozen=True)
class Budget:
    """What every method gets for one cell. seconds: wall time for search and fit together; epochs: of those methods
    that count them (None: as they come); trials: settings tried on a validation part of the training rows."""

    seconds: int | float = 60.0
    epochs: int | None = None
    trials: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.seconds, int | float | np.number) and not isinstance(self.seconds, bool)
        if not (number and 0 < self.seconds <= LONGEST):
            raise OptionError(
                f"seconds={self.seconds!r} must be a positive number (wall time of each fit), at most {LONGEST:g}."
            )
        object.__setattr__(self, "seconds", float(self.seconds))  # 30 is the budget that 30.0 is
        for name in ("epochs", "trials"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise OptionError(f"{name}={value!r} of a budget must be a whole number of at least 1.")

    def __str__(self) -> str:
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        trials = f"{self.trials} settings tried inside the split" if self.trials > 1 else "default settings"
        return f"at most {self.seconds:g} s of wall time a fit{epochs}, {trials}"


@dataclass(frozen=True)
class Method:
    """A way to predict, by the name that tables show. regressor, classifier: estimators not yet fitted (None: not of
    that task), with scikit-learn's interface; of fspace, or any with predict(X, return_std=True) or predict_proba.
    grid: values to try of some options, where the budget has several trials; space: where its prior is, "function" or
    "weights" (else ""), which reports compare; source: what a reader should know."""

    name: str
    regressor: Any = None
    classifier: Any = None
    grid: Mapping[str, Any] = field(default_factory=dict)
    space: str = ""
    source: str = ""

    def estimator(self, task: str) -> Any:
        """The estimator of a task, or None."""
        return self.regressor if task == "regression" else self.classifier

    def fingerprint(self, task: str) -> str:
        """Says whether results of an earlier run still belong to the method."""
        estimator = self.estimator(task)
        params = {name: value for name, value in sorted(estimator.get_params().items()) if name != "progress"}
        return f"{type(estimator).__name__} {params!r} {dict(self.grid)!r}"


@dataclass(frozen=True)
class Cell:
    """What one process is given."""

    dataset: Dataset
    split: int
    method: Method
    budget: Budget
    seed: int
    threads: int | None = None


def run_cell(cell: Cell) -> dict[str, Any]:
    """Fit and measure; whatever goes wrong is in the row that is returned.

    "status": "ok"; "stopped": the budget ended the fit, and its best state was measured; "diverged": the method says so
    or predicts what is not finite (what is finite is measured); "failed": there is nothing to measure. "reason" says
    why. Only Ctrl-C goes through.
    """
    row: dict[str, Any] = {
        "dataset": cell.dataset.name,
        "task": cell.dataset.task,
        "split": cell.split,
        "method": cell.method.name,
        "status": "ok",
        "reason": "",
        "fresh": getattr(cell.dataset, "fresh", False),
        "scores": {},
    }
    threads = torch.get_num_threads()
    try:
        if cell.threads is not None:
            torch.set_num_threads(cell.threads)
        with threadpool_limits(cell.threads), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            _fit_and_measure(cell, row)
        row["warnings"] = sorted({" ".join(str(one.message).split())[:300] for one in said})
    except TimeoutError as error:
        row |= {"status": "failed", "reason": str(error)}
    except (
        Exception,
        SystemExit,
    ) as error:  # a method may do anything; the table says so, and the others go on
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    finally:
        torch.set_num_threads(threads)
    return row


def _fit_and_measure(cell: Cell, row: dict[str, Any]) -> None:
    problem = cell.dataset.problem(cell.split)
    row["rows"] = {"train": len(problem.y_train), "test": len(problem.y_test)}
    row["columns"] = problem.x_train.shape[1]
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # what torch imports at first is no method's cost
    start, worked = time.perf_counter(), time.process_time()
    model = _searched(cell, problem, row)
    row["fit_seconds"] = time.perf_counter() - start
    row["cpu_seconds"] = (
        time.process_time() - worked
    )  # what it takes on a machine that is busy with other things too
    if getattr(model, "interrupted_", False):
        row |= {"status": "stopped", "reason": _stopped(cell.budget.seconds, row["fit_seconds"])}
    told = getattr(model, "diagnostics_", None) or {}
    if "rhat" in told:
        row["chains"] = {"rhat": float(told["rhat"]), "ess": float(told["ess"])}
    start = time.perf_counter()
    with torch.no_grad():
        predictive = predictive_of(model, problem.x_test)
        row["predict_seconds"] = time.perf_counter() - start
        diverged = divergence(model, predictive)
        if diverged:
            row |= {"status": "diverged", "reason": diverged}
        measure(row, model, problem, predictive)


def _stopped(budget: float, took: float) -> str:
    """Why a fit counts as it was when its time was over; and that it took more, where it did."""
    more = f"; with what had to follow it took {took:.3g} s" if took > 1.1 * budget else ""
    return f"the budget of {budget:g} s ended the fit{more}"


# ---- fitting -------------------------------------------------------------------------------------


def _searched(cell: Cell, problem: Problem, row: dict[str, Any]) -> Any:
    """The estimator, fitted with the settings that predict a validation part best, or with its own."""
    budget, task = cell.budget, cell.dataset.task
    estimator = prepared(cell.method.estimator(task), cell.seed * 1000 + cell.split, budget.epochs)
    settings: dict[str, Any] = {}
    if cell.method.grid and budget.trials > 1:
        options = list(ParameterSampler(cell.method.grid, budget.trials, random_state=cell.seed))
        part, held = train_test_split(
            np.arange(len(problem.y_train)),
            test_size=VALIDATION,
            random_state=cell.seed,
            stratify=problem.y_train if task == "classification" else None,
        )
        found = []
        for option in options:
            trial = clone(estimator).set_params(**option)
            try:
                _fit(trial, problem.x_train[part], problem.y_train[part], budget.seconds / (len(options) + 1))
                with torch.no_grad():
                    score = _validation_score(trial, problem.x_train[held], problem.y_train[held])
            except Exception as error:  # a setting that cannot be fitted is not chosen; the row says so
                row.setdefault("failed_trials", []).append(f"{option}: {type(error).__name__}: {error}"[:200])
                score = -math.inf
            found.append(score)
        row["trials"] = [[str(option), score] for option, score in zip(options, found)]
        if max(found) > -math.inf:
            settings = options[int(np.argmax(found))]
    row["settings"] = {name: str(value) for name, value in settings.items()}
    trials = len(row.get("trials", []))
    model = clone(estimator).set_params(**settings)
    _fit(model, problem.x_train, problem.y_train, budget.seconds / (trials + 1))
    return model


def _fit(model: Any, x: np.ndarray, y: np.ndarray, seconds: float) -> None:
    """Fit within the time. A fit that somebody's Ctrl-C ended, not the budget, is no result."""
    with time_limit(seconds) as limit:
        model.fit(x, y)
    if getattr(model, "interrupted_", False) and not limit.over:
        raise KeyboardInterrupt


def prepared(estimator: Any, seed: int, epochs: int | None) -> Any:
    """A copy that is not fitted, with its seeds set, no progress bar, and the epochs of the budget where it has any."""
    copy = clone(estimator)
    for name in copy.get_params():
        last = name.split("__")[-1]
        if last in ("seed", "random_state"):
            copy.set_params(**{name: seed})
        elif last == "progress":
            copy.set_params(**{name: False})
        elif last == "epochs" and epochs is not None:
            copy.set_params(**{name: epochs})
    return copy


def _validation_score(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    predictive = predictive_of(model, x)
    if divergence(model, predictive):
        return -math.inf
    return metrics.log_likelihood(
        positions(model, y) if isinstance(predictive, Categorical) else y, predictive
    )


@dataclass
class Limit:
    """Whether the time was over."""

    over: bool = False


@contextmanager
def time_limit(seconds: float) -> Iterator[Limit]:
    """Ctrl-C for the block after so many seconds, and again later if it goes on. Estimators of fspace then keep their
    best state; of others TimeoutError is raised. It waits for an import to end, which would leave half a module behind,
    and for compiled code to return. In the main thread of a POSIX system only: elsewhere without effect.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield Limit()
        return
    limit, imports = Limit(), _imports(sys._getframe())

    def ring(number: int, frame: FrameType | None) -> None:
        if _imports(frame) > imports:
            signal.setitimer(signal.ITIMER_REAL, LATER, max(seconds, LEAST_GRACE))
            return
        limit.over = True
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ring)
    ignored = (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    )  # as a shell starts what runs in the background
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, LEAST_GRACE))
    try:
        yield limit
    except KeyboardInterrupt:
        if not limit.over:
            raise
        raise TimeoutError(f"the fit did not end within {seconds:g} s and kept no state to measure") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _imports(frame: FrameType | None) -> int:
    """How many imports are under way in a stack of calls."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


# ---- predicting ----------------------------------------------------------------------------------


def predictive_of(model: Any, x: np.ndarray) -> Any:
    """What a fitted estimator says of y at x [n, d]: its own predictive, or one made of what scikit-learn's give."""
    if hasattr(model, "predictive"):
        return model.predictive(x)
    if hasattr(model, "predict_proba"):
        return Categorical(as_tensor(model.predict_proba(x), None, "probs"))
    try:
        mean, std = model.predict(x, return_std=True)
    except TypeError as error:
        raise OptionError(
            f"{type(model).__name__} says nothing about its uncertainty: it has neither predictive(X) nor "
            "predict(X, return_std=True), which a comparison needs."
        ) from error
    return Gaussian(torch.as_tensor(mean).double(), torch.as_tensor(std).double().square())


def positions(model: Any, labels: np.ndarray) -> np.ndarray:
    """Places of labels in the model's classes. Raises DataError for labels that the training part had none of."""
    known = {label: k for k, label in enumerate(model.classes_.tolist())}
    strange = [label for label in np.unique(labels).tolist() if label not in known]
    if strange:
        raise DataError(f"The test part holds classes that the training part has no row of: {strange[:5]}.")
    return np.array([known[label] for label in labels.tolist()])


def divergence(model: Any, predictive: Any) -> str:
    """Why a fit has to be called diverged, or nothing."""
    said = getattr(model, "diverged_", False)
    if said:
        where = f" ({', '.join(f'{k} {v}' for k, v in said.items())})" if isinstance(said, dict) else ""
        return said if isinstance(said, str) else f"the method says that its training diverged{where}"
    for name in ("probs",) if isinstance(predictive, Categorical) else ("mean", "variance"):
        values = array(getattr(predictive, name))
        bad = int((~np.isfinite(values)).sum())
        if bad:
            return f"the predicted {name} is not finite at {bad} of {values.size} places"
    return ""


# ---- measuring -----------------------------------------------------------------------------------


def measure(row: dict[str, Any], model: Any, problem: Problem, predictive: Any) -> None:
    """Scores and curves of one fit, into its row; of a diverged one those that there are."""
    classes = isinstance(predictive, Categorical)
    y = positions(model, problem.y_test) if classes else problem.y_test
    kinds = CLASS_METRICS if classes else NUMBER_METRICS
    for name, metric in kinds.items():
        try:
            row["scores"][name] = metric(y, predictive)
        except DataError:
            if row["status"] != "diverged":
                raise
    if row["status"] == "diverged":
        return
    loss, doubt = selective.losses(y, predictive), selective.doubt(predictive)
    row["scores"] |= {"aurc": selective.aurc(loss, doubt), "augrc": selective.augrc(loss, doubt)}
    if len(y) > 1:
        _joint(row, model, problem, y)
    row["calibration"] = _reliability(y, predictive) if classes else _calibration(y, predictive)
    if problem.outside is not None:
        _detect(row, model, problem.outside, predictive)
    if problem.probes is not None and problem.grid is not None:
        row["functions"] = _functions(model, problem, predictive)


NUMBER_METRICS = {
    "log_likelihood": metrics.log_likelihood,
    "rmse": metrics.rmse,
    "crps": metrics.crps,
    "calibration_error": lambda y, p: metrics.calibration_error(y, p, LEVELS),
    "coverage_90": metrics.coverage,
    "width_90": lambda _, p: metrics.interval_width(p),
    "sharpness": lambda _, p: metrics.sharpness(p),
}
CLASS_METRICS = {
    "log_likelihood": metrics.log_likelihood,
    "accuracy": metrics.accuracy,
    "brier": metrics.brier,
    "calibration_error": metrics.class_calibration_error,
    "calibration_error_width": lambda y, p: metrics.class_calibration_error(y, p, equal="width"),
}


def _joint(row: dict[str, Any], model: Any, problem: Problem, y: np.ndarray) -> None:
    """The joint score on dyadic batches, of methods that say how points go together."""
    picks, batches = np.unique(metrics.dyadic_batches(len(y)), return_inverse=True)
    together = predictive_of(model, problem.x_test[picks])
    with suppress(DataError, OptionError):  # a predictive of marginals alone has no such score
        row["scores"]["joint_log_likelihood"] = metrics.joint_log_likelihood(y[picks], together, batches)


def _calibration(y: np.ndarray, predictive: Any) -> list[list[float]]:
    stated, found = metrics.calibration_curve(y, predictive, LEVELS)
    return [stated.round(4).tolist(), found.tolist()]


def _reliability(labels: np.ndarray, predictive: Any) -> list[list[float]]:
    """Mean stated probability of the predicted class, share that is right, and rows, in bins of equal width."""
    labels, probs = metrics.class_arrays(labels, predictive)
    stated, hit = probs.max(axis=1), probs.argmax(axis=1) == labels
    place = np.minimum((stated * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    bins = [place == k for k in range(RELIABILITY_BINS) if (place == k).any()]
    return [[float(v[part].mean()) for part in bins] for v in (stated, hit)] + [
        [float(p.sum()) for p in bins]
    ]


def _detect(row: dict[str, Any], model: Any, outside: np.ndarray, inside: Any) -> None:
    """How well each measure of doubt tells rows of another kind."""
    other = predictive_of(model, outside)
    measures = selective.MEASURES[:3] if isinstance(inside, Categorical) else selective.MEASURES[3:]
    for name in measures:
        ours, theirs = selective.doubt(inside, name), selective.doubt(other, name)
        row["scores"][f"auroc, {name}"] = selective.auroc(ours, theirs)
        row["scores"][f"fpr95, {name}"] = selective.fpr95(ours, theirs)


def _functions(model: Any, problem: Problem, predictive: Any) -> dict[str, Any]:
    """What pictures and distances need of a model in one dimension: bands on the grid, moments and draws at probes."""
    assert problem.grid is not None and problem.probes is not None
    observed = predictive_of(model, problem.grid)
    kept: dict[str, Any] = {
        "grid": problem.grid[:, 0],
        "probes": problem.probes[:, 0],
        "mean": array(observed.mean),
        "observed": [array(bound) for bound in observed.interval(0.9)],
        "train": [problem.x_train[:, 0], problem.y_train],
    }
    posterior = getattr(model, "posterior_", None)
    if posterior is not None:
        grid, probes = (torch.from_numpy(x) for x in (problem.grid, problem.probes))
        functions = Functions.of(posterior, probes, DRAWS)
        kept |= {
            "latent": [array(bound) for bound in posterior.latent(grid).interval(0.9)],
            "shown_draws": function_values(posterior, grid, SHOWN_DRAWS),
            "probe_mean": functions.mean,
            "probe_covariance": functions.covariance,
            "probe_draws": functions.draws,
        }
    return {name: _rounded(values) for name, values in kept.items()}


def _rounded(values: Any) -> Any:
    """Arrays as lists with seven digits, which is what float32 networks have."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return [float(f"{v:.7g}") for v in values] if values.ndim == 1 else [_rounded(row) for row in values]
