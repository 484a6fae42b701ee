"""GPRegressor: scikit-learn's own checks, real data, saving, refusals, and fits over awkward tables."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import fspace
from fspace.errors import DataError, DeviceError, FspaceError, OptionError

CHECKS = list(estimator_checks_generator(fspace.GPRegressor(kernel="matern")))


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=[c.func.__name__ for _, c in CHECKS])
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    return train_test_split(X, y, test_size=0.25, random_state=0)


@pytest.fixture(scope="module")
def wave():
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, (80, 2))
    return X, np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(80)


def test_auto_is_at_least_as_good_as_a_linear_model_and_calibrated(diabetes):
    X, X_test, y, y_test = diabetes
    model = fspace.GPRegressor(members=1).fit(X, y)
    linear = LinearRegression().fit(X, y)
    assert model.score(X_test, y_test) > linear.score(X_test, y_test) - 0.02
    lower, upper = model.predictive(X_test).interval(0.9)
    inside = ((y_test.to_numpy() >= lower.numpy()) & (y_test.to_numpy() <= upper.numpy())).mean()
    assert abs(inside - 0.9) < 4 * math.sqrt(0.9 * 0.1 / len(y_test))
    # the same interval made for another noise level fails the same test
    wrong = (np.abs(y_test.to_numpy() - model.predict(X_test)) < (upper - lower).numpy() / 4).mean()
    assert abs(wrong - 0.9) > 4 * math.sqrt(0.9 * 0.1 / len(y_test))
    assert set(model.choice_["scores"]) >= {"matern", "deep"}
    assert model.relevance_.sum() == pytest.approx(1.0)


def test_agrees_with_the_exact_formula(wave):
    X, y = wave
    model = fspace.GPRegressor(kernel="matern").fit(X, y)
    posterior = model.posterior_
    kernel, noise = posterior.basis.kernel, posterior.basis.noise[0]
    z = posterior.scaling.inputs(torch.tensor(X))
    k = kernel(z).to_dense() + noise * torch.eye(len(z))
    t = torch.tensor((y - y.mean()) / y.std())
    mean = kernel(z).to_dense() @ torch.linalg.solve(k, t) * y.std() + y.mean()
    assert np.allclose(model.predict(X), mean.numpy(), atol=1e-6)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(z)).double(), k).log_prob(t)
    assert model.log_evidence_ == pytest.approx(evidence.item(), abs=1e-4)


def test_collapsed_on_every_row_is_exact(wave):
    X, y = wave
    exact = fspace.GPRegressor(kernel="rbf").fit(X, y)
    sparse = fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=80).fit(X, y)
    assert np.abs(exact.predict(X) - sparse.predict(X)).max() < 0.02


def test_several_outputs(wave):
    X, y = wave
    both = np.stack([y, X[:, 1] ** 2], axis=1)
    model = fspace.GPRegressor(kernel="matern").fit(X, both)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == both.shape
    assert model.score(X, both) > 0.9
    assert model.sample_y(X[:5], 3).shape == (5, 2, 3)
    assert model.posterior_.draw(2, 0)(X[:5]).shape == (2, 5, 2)


def test_pipeline_and_grid_search(wave):
    X, y = wave
    search = GridSearchCV(
        make_pipeline(StandardScaler(), fspace.GPRegressor()),
        {"gpregressor__kernel": ["matern", "rbf"]},
        cv=2,
    )
    assert search.fit(X, y).best_score_ > 0.8


def test_same_seed_same_fit(wave):
    X, y = wave
    a, b, c = (fspace.GPRegressor(kernel="deep", members=1, seed=s).fit(X, y).predict(X) for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"kernel": "nope"}, OptionError),
        ({"kernel": 3}, OptionError),
        ({"inference": "nope"}, OptionError),
        ({"likelihood": "nope"}, OptionError),
        ({"inducing": 0}, OptionError),
        ({"dtype": "float16"}, OptionError),
        ({"device": "nope"}, DeviceError),
        ({"device": "cuda:99"}, DeviceError),
    ],
)
def test_options_that_do_not_exist(wave, options, kind):
    with pytest.raises(kind):
        fspace.GPRegressor(**options).fit(*wave)


def test_bad_rows_are_named(wave):
    X, y = wave
    frame = pd.DataFrame(X, columns=["a", "b"])
    frame.loc[7, "b"] = np.nan
    with pytest.raises(DataError, match=r"(?s)7.*b|b.*7"):
        fspace.GPRegressor().fit(frame, y)
    with pytest.raises(DataError):
        fspace.GPRegressor().fit(X, np.where(np.arange(80) == 3, np.inf, y))
    with pytest.raises(DataError, match="1 sample"):
        fspace.GPRegressor().fit(X[:1], y[:1])
    assert np.isfinite(
        fspace.GPRegressor(kernel="matern", missing="impute").fit(frame, y).predict(frame)
    ).all()


@pytest.mark.parametrize("kernel", ["matern", "rbf", "neural"])
@pytest.mark.parametrize("seed", range(6))
def test_awkward_tables_never_fail_numerically(kernel, seed):
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(2, 40)), int(rng.integers(1, 5))
    X = rng.standard_normal((n, d)) * 10.0 ** rng.integers(-12, 13, d)
    if seed % 2:
        X[:, 0] = 3.0
    X = X[rng.integers(0, n, n)]  # duplicated rows, with different y below
    y = rng.standard_normal(n) * 10.0 ** rng.integers(-12, 13) if seed % 3 else np.full(n, 2.5)
    try:
        mean, std = fspace.GPRegressor(kernel=kernel).fit(X, y).predict(X, return_std=True)
    except FspaceError as error:  # a refusal must say why
        pytest.fail(f"refused: {error}")
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert (std >= 0).all()
