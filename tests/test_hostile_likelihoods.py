"""Fits under likelihoods that are not Gaussian, over hostile tables: finite predictions or a refusal.

`python tests/test_hostile_likelihoods.py poisson 17 42` repeats the fits of these seeds and prints what they were.
FSPACE_HOSTILE_FITS=200 makes so many for every likelihood in the slow test.
"""

import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fspace
from fspace.errors import FspaceError

LIKELIHOODS = (
    "bernoulli",
    "softmax",
    "student_t",
    "laplace",
    "poisson",
    "negative_binomial",
    "gamma",
    "beta",
)
FITS = int(os.environ.get("FSPACE_HOSTILE_FITS", "60"))  # more take longer than a CI job has
SAMPLE = 3


@dataclass
class Case:
    """One table, its target, the estimator's options, and what is hostile about it all."""

    likelihood: str
    X: np.ndarray
    y: np.ndarray
    options: dict[str, Any]
    hostile: list[str]

    def __str__(self) -> str:
        return (
            f"{self.likelihood}, X {self.X.dtype}{list(self.X.shape)}, y {list(self.y.shape)}, {self.options}, "
            f"{self.hostile}"
        )


def make_case(likelihood: str, seed: int) -> Case:
    """A table with some of everything that makes a fit hard, each with a probability of its own."""
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(5, 61)), int(rng.integers(1, 5))
    hostile = []

    def happens(what: str, probability: float) -> bool:
        if rng.random() < probability:
            hostile.append(what)
            return True
        return False

    X = rng.standard_normal((rows, columns))
    f = np.sin(2 * X[:, 0]) + X[:, -1]
    if happens("separable", 0.2):
        f = 100 * f
    if happens("heavy tails", 0.15):
        X = X**7
    if happens("columns of scales 1e-9 to 1e9", 0.5):
        X = X * 10.0 ** rng.uniform(-9, 9, columns)
    if happens("a column far from zero", 0.1):
        X[:, -1] += 1e6 * np.abs(X[:, -1]).max()
    if happens("a constant column", 0.2):
        X[:, 0] = rng.choice([0.0, 3.0, -1e12, 1e-12])
    if happens("rows several times", 0.3):  # with targets that differ
        X = X[rng.integers(0, max(1, rows // 3), rows)]
    if happens("all rows alike", 0.03):
        X[:] = X[0]
    if happens("float32 or float16", 0.1):
        X = np.clip(X, -1e4, 1e4).astype(rng.choice(["float32", "float16"]))
    y = _target(likelihood, f, rng, happens)
    options: dict[str, Any] = {"kernel": ["matern", "rbf", "additive", "neural"][seed % 4], "seed": seed}
    if happens("few inducing inputs", 0.3):
        options["inducing"] = int(rng.integers(1, 6))
    if likelihood in ("bernoulli", "softmax") and happens("balanced classes", 0.2):
        options["class_weight"] = "balanced"
    return Case(likelihood, X, y, options, hostile)


def _target(likelihood: str, f: np.ndarray, rng: np.random.Generator, happens: Any) -> np.ndarray:
    """A target that the likelihood can have made, ordinary or at the ends of its support."""
    rows, some = len(f), slice(0, int(rng.integers(1, len(f) + 1)))
    f = np.clip(f, -30, 20)
    if likelihood == "bernoulli":
        y = (f + 0.3 * rng.standard_normal(rows) > 0).astype(int)
        if happens("a class with one member", 0.2):
            y[:] = 0
        y[0], y[-1] = 1, 0
        return y
    if likelihood == "softmax":
        y = np.digitize(f, [-0.5, 0.5])
        if happens("classes with one member", 0.2):
            y[:] = 0
        y[:3] = [0, 1, 2]
        return y
    if likelihood in ("student_t", "laplace"):
        y = f + rng.standard_t(2, rows)
        if happens("outliers", 0.3):
            y[some] *= 10.0 ** rng.uniform(0, 9)
        if happens("a constant target", 0.1):
            y[:] = rng.choice([0.0, 2.5, -1e12])
        if happens("another scale", 0.4):
            y = y * 10.0 ** rng.uniform(-12, 12)
        return y
    if likelihood in ("poisson", "negative_binomial"):
        y = rng.poisson(np.exp(np.clip(f, -30, 10))).astype(float)
        if happens("counts of a billion", 0.2):
            y[some] = np.round(y[some] * 1e9 + rng.integers(0, 10))
        if happens("zeros alone", 0.1):
            y[:] = 0
        if happens("one count", 0.1):
            y[:] = rng.choice([1.0, 7.0, 1e6])
        if happens("one count of a billion", 0.1):
            y[0] = 1e9
        return y
    if likelihood == "gamma":
        y = np.exp(np.clip(f, -20, 20)) * rng.gamma(2.0, size=rows)
        if happens("another scale", 0.4):
            y = y * 10.0 ** rng.uniform(-12, 12)
        if happens("numbers from 1e-12 to 1e12", 0.2):
            y[some] = 10.0 ** rng.uniform(-12, 12, len(y[some]))
        if happens("a constant target", 0.1):
            y[:] = rng.choice([1e-9, 1.0, 1e9])
        return np.maximum(y, 1e-300)
    share = 1 / (1 + np.exp(-f))
    y = rng.beta(5 * share + 1e-3, 5 * (1 - share) + 1e-3)
    if happens("shares near the ends", 0.3):
        y[some] = rng.choice([1e-12, 1 - 1e-12], len(y[some]))
    if happens("a constant target", 0.1):
        y[:] = rng.choice([1e-9, 0.5, 1 - 1e-9])
    return np.clip(y, 1e-15, 1 - 1e-15)


def fitted(case: Case) -> Any:
    if case.likelihood in ("bernoulli", "softmax"):
        return fspace.GPClassifier(**case.options).fit(case.X, case.y)
    return fspace.GPRegressor(likelihood=case.likelihood, **case.options).fit(case.X, case.y)


def failure(case: Case) -> str | None:
    """What went wrong in one fit and its predictions, near the rows and far from them; None where all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            model = fitted(case)
            far = np.clip(case.X.astype(np.float64) * 1e3, -1e100, 1e100)
            for name, rows in (("rows", case.X), ("rows far away", far)):
                if case.likelihood in ("bernoulli", "softmax"):
                    numbers = {
                        "probability": model.predict_proba(rows),
                        "mi": model.predictive(rows).epistemic,
                    }
                else:
                    mean, std = model.predict(rows, return_std=True)
                    if not (std >= 0).all():
                        return f"a standard deviation at the {name} is negative or NaN"
                    lower, upper = (a.numpy() for a in model.predictive(rows).interval(0.9))
                    if not (lower <= upper).all():
                        return f"an interval at the {name} is upside down"
                    numbers = {"mean": mean, "standard deviation": std, "lower": lower, "upper": upper}
                for what, value in numbers.items():
                    if not np.isfinite(np.asarray(value)).all():
                        return f"a {what} at the {name} is not finite"
            if not (np.isfinite(model.log_evidence_) and np.isfinite(model.relevance_).all()):
                return "log evidence or relevance is not finite"
    except FspaceError:
        return None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {place.name}:{place.lineno}: {str(error)[:300]}"
    return None


def failures(likelihood: str, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        case = make_case(likelihood, seed)
        wrong = failure(case)
        if wrong is not None:
            found.append(f"seed {seed}: {wrong}\n    {case}")
    return found


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_few_hostile_fits(likelihood):
    found = failures(likelihood, range(SAMPLE))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_many_hostile_fits(likelihood):
    found = failures(likelihood, range(FITS))
    assert not found, f"\n{len(found)} of {FITS} fits:\n" + "\n".join(found)


if __name__ == "__main__":
    for seed in map(int, sys.argv[2:]):
        case = make_case(sys.argv[1], seed)
        print(f"seed {seed}: {failure(case) or 'well'}\n    {case}", flush=True)
