"""Scores of predictions against scikit-learn, scipy and a simulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from fspace.errors import DataError, OptionError
from fspace.predictive import Gaussian, Mixture
from fspace.scores import baseline_scores, regression_scores, shown

RNG = np.random.default_rng(0)
Y = RNG.normal(size=(40, 2)) * [1.0, 30.0] + [0.0, 500.0]
MEAN = Y + RNG.normal(size=(40, 2)) * [0.5, 10.0]
STD = np.exp(RNG.normal(size=(40, 2))) * [1.0, 10.0]


def gaussian(mean, std):
    return Gaussian(torch.tensor(mean), torch.tensor(std) ** 2)


@pytest.mark.parametrize("output", [0, 1])
def test_against_sklearn_and_scipy(output):
    scores = regression_scores(Y, gaussian(MEAN, STD), output=output)
    y, mean, std = Y[:, output], MEAN[:, output], STD[:, output]
    lower, upper = stats.norm(mean, std).interval(0.9)
    assert scores == pytest.approx(
        {
            "rmse": math.sqrt(mean_squared_error(y, mean)),
            "mae": mean_absolute_error(y, mean),
            "r2": r2_score(y, mean),
            "log_likelihood": stats.norm(mean, std).logpdf(y).mean(),
            "coverage_90": np.mean((lower <= y) & (y <= upper)),
            "width_90": np.mean(upper - lower),
        },
        rel=1e-9,
    )
    assert scores == pytest.approx(
        regression_scores(y, gaussian(mean, std)), rel=1e-12
    )  # one output by itself


def test_the_likelihood_of_a_mixture_is_the_mixtures():
    one, other = torch.zeros(3).double(), torch.ones(3).double()
    mixture = Mixture([Gaussian(one, one + 0.01), Gaussian(10 * other, other)])
    y = np.array([0.0, 10.0, 5.0])
    density = 0.5 * stats.norm(0, 0.1).pdf(y) + 0.5 * stats.norm(10, 1).pdf(y)
    scores = regression_scores(y, mixture)
    assert scores["log_likelihood"] == pytest.approx(np.log(density).mean(), rel=1e-9)
    matched = stats.norm(mixture.mean.numpy(), mixture.stddev.numpy()).logpdf(y).mean()
    assert abs(scores["log_likelihood"] - matched) > 0.1  # the twin: a moment match would be elsewhere


def test_baseline_against_scipy():
    train, y = Y[:30, 1], Y[30:, 1]
    scores = baseline_scores(y, train)
    normal = stats.norm(train.mean(), train.std())
    assert scores["log_likelihood"] == pytest.approx(normal.logpdf(y).mean())
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((y - train.mean()) ** 2)))
    assert scores["width_90"] == pytest.approx(np.diff(normal.interval(0.9))[0])


def test_coverage_of_the_true_model_and_of_one_too_sure():
    n = 4000
    y = np.random.default_rng(1).normal(size=n)
    zero, one = np.zeros(n), np.ones(n)
    error = 4 * math.sqrt(0.9 * 0.1 / n)  # four standard errors
    assert abs(regression_scores(y, gaussian(zero, one))["coverage_90"] - 0.9) < error
    assert regression_scores(y, gaussian(zero, 0.8 * one))["coverage_90"] < 0.9 - error


def test_constant_targets_and_one_row():
    scores = regression_scores(np.ones(3), gaussian(np.zeros(3), np.ones(3)))
    assert math.isnan(scores["r2"]) and shown("r2", scores["r2"]) == "n/a"
    assert all(math.isfinite(v) for k, v in baseline_scores(np.ones(1), np.ones(5)).items() if k != "r2")
    assert shown("coverage_90", 0.873) == "87.3%"


def test_other_points_are_refused():
    with pytest.raises(DataError, match="y has 3 rows, but the predictive 4"):
        regression_scores(np.zeros(3), gaussian(np.zeros(4), np.ones(4)))
    with pytest.raises(OptionError, match="output=2"):
        regression_scores(Y, gaussian(MEAN, STD), output=2)


def test_counts_are_compared_with_the_shares_of_counts():
    seen, y = np.array([0, 0, 1, 3.0]), np.array([0.0, 1.0, 7.0])
    scores = baseline_scores(y, seen, counts=True)
    want = np.log(np.array([2, 1, 1]) / 5).mean()  # 7 was not seen: as if once
    assert scores["log_likelihood"] == pytest.approx(want)
    assert scores["coverage_90"] == pytest.approx(2 / 3) and scores["width_90"] == 3.0
