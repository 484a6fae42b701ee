"""Fits over random awkward tables: whatever the table, predictions are finite and no numerical failure shows.

`python tests/test_random_fits.py 17 42` repeats the fits of these seeds and prints what they were.
"""

import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fspace

FITS = 200
SAMPLE = 12


@dataclass
class Case:
    """One table, its target, the estimator's options, and what is awkward about it all."""

    X: np.ndarray
    y: np.ndarray
    options: dict[str, Any]
    awkward: list[str]

    def __str__(self) -> str:
        return f"X {self.X.dtype}{list(self.X.shape)}, y {list(self.y.shape)}, {self.options}, {self.awkward}"


def make_case(seed: int) -> Case:
    """A table with some of everything that makes a fit hard, each with a probability of its own."""
    rng = np.random.default_rng(seed)
    # in turn, so that a few seeds in a row have every kernel; networks take the longest and come more seldom
    kernel = ["matern", "rbf", "neural", "matern", "auto", "deep", "rbf", "neural"][seed % 8]
    few, columns = int(rng.integers(2, 41)), int(rng.integers(1, 6))
    rows = (
        int(rng.integers(60, 80)) if kernel == "auto" and seed % 16 == 4 else few
    )  # "auto" tries deep from 60 on
    awkward = []

    def happens(what: str, probability: float) -> bool:
        if rng.random() < probability:
            awkward.append(what)
            return True
        return False

    X = rng.standard_normal((rows, columns))
    y = np.sin(2 * X[:, 0]) + X[:, -1] + rng.choice([0.0, 0.1, 1.0]) * rng.standard_normal(rows)
    if happens("heavy tails", 0.15):
        X = X**7
    if happens("one row a million times larger", 0.1):
        X[rng.integers(rows)] *= 1e6
    if happens("columns of scales 1e-12 to 1e12", 0.4):
        X *= 10.0 ** rng.integers(-12, 13, columns)
    if happens("a column far from zero", 0.15):
        X[:, -1] += 1e6 * max(1e-12, np.abs(X[:, -1]).max())
    if happens("a constant column", 0.2):
        X[:, 0] = rng.choice([0.0, 3.0, -1e12, 1e-12])
    if happens("whole numbers", 0.15):
        X = np.clip(np.round(X), -1e9, 1e9).astype(np.int64)
    if happens("a column twice", 0.1):
        X = np.column_stack([X, X[:, 0]])
    if happens("rows several times", 0.25):
        X = X[rng.integers(0, max(1, rows // 3), rows)]
    if happens("float32 or float16", 0.15):
        X = np.clip(X, -1e4, 1e4).astype(rng.choice(["float32", "float16"]))
    if happens("a constant target", 0.1):
        y = np.full(rows, rng.choice([0.0, 2.5, -1e12]))
    if happens("a target of two values", 0.1):
        y = (y > np.median(y)).astype(np.float64)
    if happens("a target of another scale", 0.3):
        y = y * 10.0 ** rng.integers(-12, 13)
    if happens("a target far from zero", 0.1):
        y = y + 1e8 * np.abs(y).max()
    if happens("an outlier in the target", 0.1):
        y[rng.integers(rows)] += 1e6 * max(1.0, np.abs(y).max())
    if happens("two outputs", 0.15):
        y = np.column_stack([y, rng.standard_normal(rows)])
    options: dict[str, Any] = {"kernel": kernel, "members": 1, "seed": seed}
    options["dtype"] = str(rng.choice(["float32", "float64"]))
    if happens("inducing inputs", 0.4):
        options |= {"inference": "collapsed", "inducing": int(rng.integers(1, 60))}
    if X.dtype.kind == "f" and rows > 2 and happens("gaps", 0.2):
        X = X.copy()
        X[rng.random(X.shape) < 0.2] = np.nan
        X[0] = np.nan_to_num(X[0])  # a column without any value is refused, and rightly
        options["missing"] = "impute"
    return Case(X, y, options, awkward)


def failure(case: Case) -> str | None:
    """What went wrong in one fit and its predictions, near the rows and far from them; None where all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            model = fspace.GPRegressor(**case.options).fit(case.X, case.y)
            far = np.clip(case.X.astype(np.float64) * 5.0, -1e100, 1e100)
            for name, rows in (("rows", case.X), ("rows far away", far)):
                mean, std = model.predict(rows, return_std=True)
                if not np.isfinite(mean).all():
                    return f"a mean at the {name} is not finite"
                if not (np.isfinite(std).all() and (std > 0).all()):
                    return f"a standard deviation at the {name} is not positive and finite"
            if not (np.isfinite(model.log_evidence_) and np.isfinite(model.relevance_).all()):
                return "log evidence or relevance is not finite"
            if mean.shape != case.y.shape:
                return f"the mean has shape {mean.shape}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {place.name}:{place.lineno}: {str(error)[:300]}"
    return None


def failures(seeds) -> list[str]:
    found = []
    for seed in seeds:
        case = make_case(seed)
        wrong = failure(case)
        if wrong is not None:
            found.append(f"seed {seed}: {wrong}\n    {case}")
    return found


def test_a_few_random_fits():
    found = failures(range(SAMPLE))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.slow
def test_two_hundred_random_fits():
    found = failures(range(FITS))
    assert not found, f"\n{len(found)} of {FITS} fits:\n" + "\n".join(found)


def test_a_failure_would_be_seen(monkeypatch):
    """Twins that must be found out: a variance that is negative, a warning, an exception, a NaN."""
    case = make_case(0)
    assert failure(case) is None
    predict = fspace.GPRegressor.predict

    def broken(change):
        def wrong(self, X, **options):
            return change(*predict(self, X, **options))

        return wrong

    for change, words in [
        (lambda mean, std: (mean, 0 * std), "not positive"),
        (lambda mean, std: (mean * np.nan, std), "not finite"),
        (lambda mean, std: (np.log(-np.ones(1)), std), "RuntimeWarning"),
        (lambda mean, std: 1 / 0, "ZeroDivisionError"),
    ]:
        monkeypatch.setattr(fspace.GPRegressor, "predict", broken(change))
        assert words in failure(case)


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        case = make_case(seed)
        print(f"seed {seed}: {failure(case) or 'well'}\n    {case}", flush=True)
