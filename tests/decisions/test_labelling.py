"""The labelling loop: what it asks for, and that choosing beats chance where the pool is lopsided."""

import numpy as np
import pytest

import fspace
from fspace.decisions import learning_curve
from fspace.errors import DataError, OptionError


def lopsided(n=300, seed=0):
    """Most rows crowd in one corner; the function lives everywhere."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([0.05 * rng.random((n - 40, 1)), rng.random((40, 1))])
    return x, np.sin(9 * x[:, 0]) + 0.01 * rng.standard_normal(n)


def fit(X, y):
    return fspace.GPRegressor(kernel="rbf", progress=False).fit(X, y)


def test_choosing_beats_chance():
    x, y = lopsided()
    grid = np.linspace(0, 1, 60)[:, None]

    def score(model):
        return -np.sqrt(np.mean((model.predict(grid) - np.sin(9 * grid[:, 0])) ** 2))

    curves = {
        c: learning_curve(fit, x, y, score, c, start=4, batch=4, labels=16, seed=1)
        for c in ("variance", "random")
    }
    assert [entry["labels"] for entry in curves["variance"]] == [4, 8, 12, 16]
    asked = [i for entry in curves["variance"] for i in entry["chosen"]]
    assert len(set(asked)) == 16
    assert curves["variance"][-1]["score"] > curves["random"][-1]["score"] + 0.1


@pytest.mark.slow
def test_margin_asks_at_the_boundary():
    x = np.random.default_rng(0).uniform(-1, 1, (60, 1))
    y = (x[:, 0] > 0.2).astype(int)
    model = lambda X, y: fspace.GPClassifier(kernel="rbf", progress=False).fit(X, y)  # noqa: E731
    found = learning_curve(model, x, y, lambda m: m.score(x, y), "margin", start=6, batch=4, labels=10)
    first = found[0]["chosen"]
    gap = np.abs(np.diff(model(x[first], y[first]).predict_proba(x), axis=1))[:, 0]
    gap[first] = np.inf
    assert sorted(found[1]["chosen"]) == sorted(np.argsort(gap)[:4])


def test_refusals():
    x, y = lopsided(60)
    with pytest.raises(OptionError, match="does not exist"):
        learning_curve(fit, x, y, len, "best")
    with pytest.raises(OptionError, match="start=50"):
        learning_curve(fit, x, y, len, start=50, labels=20)
    with pytest.raises(DataError, match="same"):
        learning_curve(fit, x, 0 * y, len, labels=20)


def test_margin_of_numbers_is_refused():
    x, y = lopsided()
    with pytest.raises(OptionError, match="margin"):
        learning_curve(fit, x, y, lambda model: 0.0, "margin", start=4, batch=4, labels=8)
