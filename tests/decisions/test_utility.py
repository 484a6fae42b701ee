"""Expected utility: closed forms against Monte Carlo and against scipy, with wrong formulas that must be told apart."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import fspace
from fspace.decisions import (
    CostMatrix,
    CVaR,
    Linear,
    MeanVariance,
    Newsvendor,
    best_action,
    value_of_information,
)
from fspace.errors import DataError, NotFittedError, OptionError, UtilityError
from fspace.posterior import FunctionPosterior, MixturePosterior
from fspace.predictive import Categorical, Gaussian, Mixture, Samples


class Fixed(FunctionPosterior):
    """A posterior that says the same whatever is asked, one row of x a point."""

    num_inputs = 1

    def __init__(self, predictive):
        self.predictive = predictive

    def observed(self, x):
        return self.predictive

    latent = observed

    def draw(self, n=1, seed=None):
        raise NotImplementedError


def gaussian(mean, std):
    mean, std = torch.tensor(mean).double(), torch.tensor(std).double()
    return Gaussian(mean, std.square(), torch.diag(std.square()))


X = torch.zeros(3, 1, dtype=torch.float64)
ONE = gaussian([1.0, -0.5, 2.0], [0.5, 1.0, 2.0])
MIXTURE = Mixture([ONE, gaussian([3.0, 0.5, -2.0], [0.3, 0.2, 1.0])], [0.3, 0.7])
NOISY = Samples(torch.tensor([[1.0, 0.0, 2.0], [2.0, 1.0, -1.0]]).double(), torch.tensor([0.2, 0.5, 1.0]))
ACTIONS = torch.tensor([-1.0, 0.4, 1.7]).double()


def as_function(utility):
    """The same utility without its closed form."""
    return lambda action, y: utility(action, y)


@pytest.mark.parametrize("predictive", [ONE, MIXTURE, NOISY], ids=["gaussian", "mixture", "samples"])
@pytest.mark.parametrize(
    "utility, risk",
    [(Newsvendor(3.0, 1.0), None), (Linear(), None), (Linear(), MeanVariance(0.7)), (Linear(), CVaR(0.2))],
    ids=["newsvendor", "linear", "mean-variance", "cvar"],
)
def test_closed_forms_equal_monte_carlo(predictive, utility, risk):
    closed = best_action(Fixed(predictive), X, ACTIONS, utility, risk)
    sampled = best_action(Fixed(predictive), X, ACTIONS, as_function(utility), risk, samples=40_000)
    assert closed.exact and not sampled.exact
    assert not closed.standard_error.any()
    z = (closed.values - sampled.values) / sampled.standard_error
    assert z.abs().max() < 4.5  # nine values, each within 4.5 standard errors: false alarm below 1e-4
    twin = (1.05 * closed.values + 0.05 - sampled.values) / sampled.standard_error  # a formula that is 5% off
    assert twin.abs().max() > 4.5


@pytest.mark.parametrize("risk", [MeanVariance(0.7), CVaR(0.2), None], ids=["mean-variance", "cvar", "mean"])
def test_standard_errors_are_those_of_repeated_samples(risk):
    """The reported error over the spread of the estimate, 200 repetitions: their ratio has a standard error of 5%."""
    runs = [
        best_action(Fixed(ONE), X, ACTIONS, as_function(Linear()), risk, 400, seed) for seed in range(200)
    ]
    spread = torch.stack([run.values for run in runs]).std(0)
    told = torch.stack([run.standard_error for run in runs]).mean(0)
    assert ((told / spread).log().abs() < 0.2).all()
    margins = torch.stack([run.margin for run in runs]).std(0)
    told = torch.stack([run.margin_error for run in runs]).mean(0)
    assert ((told / margins).log().abs() < 0.25).all()


def test_newsvendor_orders_the_quantile():
    decided = best_action(Fixed(MIXTURE), X, None, Newsvendor(3.0, 1.0))
    assert torch.allclose(MIXTURE.cdf(decided.action), torch.full((3,), 0.75).double(), atol=1e-9)
    grid = torch.linspace(-6, 8, 4001).double()
    searched = best_action(Fixed(MIXTURE), X, grid, Newsvendor(3.0, 1.0))
    assert torch.allclose(decided.action, searched.action, atol=0.004)
    assert (decided.value >= searched.value - 1e-12).all()


def test_newsvendor_against_an_integral():
    y = stats.norm(1.0, 0.5)
    want = integrate.quad(lambda t: -(3 * max(t - 0.4, 0) + max(0.4 - t, 0)) * y.pdf(t), -4, 6, points=[0.4])[
        0
    ]
    got = best_action(Fixed(ONE), X, [0.4], Newsvendor(3.0, 1.0)).values[0, 0]
    assert got.item() == pytest.approx(want, abs=1e-8)


def test_cvar_against_an_integral():
    """The mean of the worst tenth of a mixture, by quadrature."""
    parts = [(0.3, stats.norm(1.0, 0.5)), (0.7, stats.norm(3.0, 0.3))]
    q = MIXTURE.quantile(0.1)[0].item()
    want = integrate.quad(lambda t: 10 * t * sum(w * d.pdf(t) for w, d in parts), -5, q, points=[0.0])[0]
    got = best_action(Fixed(MIXTURE), X, [1.0], Linear(), CVaR(0.1)).values[0, 0]
    assert got.item() == pytest.approx(want, abs=1e-7)


def test_mean_variance_finds_markowitz():
    """Correlated outputs of a coregionalised model: weights are covariance^-1 mean / aversion, and a grid agrees."""
    x = torch.rand(40, 1).double()
    y = torch.cat([torch.sin(6 * x), torch.sin(6 * x) + 0.3 * torch.randn(40, 1).double()], 1) + 1.0
    posterior = (
        fspace.GPRegressor(kernel="rbf", outputs="coregionalised", progress=False).fit(x, y).posterior_
    )
    place = x[:2]
    best = best_action(posterior, place, None, Linear(), MeanVariance(2.0))
    around = best.action[0] + 0.2 * torch.randn(300, 2).double()
    others = best_action(posterior, place[:1], around, Linear(), MeanVariance(2.0))
    assert (others.values <= best.value[0] + 1e-9).all()
    sampled = best_action(posterior, place[:1], around[:3], as_function(Linear()), MeanVariance(2.0), 20_000)
    assert ((sampled.values - others.values[:, :3]) / sampled.standard_error).abs().max() < 4.5


def test_cost_matrix_and_its_samples():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]).double()
    cost = torch.tensor([[0.0, 1.0, 10.0], [2.0, 0.0, 2.0]]).double()
    closed = best_action(Fixed(Categorical(probs)), X, None, CostMatrix(cost))
    assert torch.allclose(closed.values, -(probs @ cost.T))
    assert closed.index.tolist() == [0, 1, 1] or closed.index.tolist() == [1, 1, 1]
    sampled = best_action(Fixed(Categorical(probs)), X, [0, 1], as_function(CostMatrix(cost)), samples=20_000)
    assert ((sampled.values - closed.values).abs() < 4.5 * sampled.standard_error + 1e-12).all()


def test_bayes_action_of_a_conjugate_model(known_gp):
    """Normal prior and noise, known variances: the newsvendor orders m + z s of the textbook's posterior predictive."""
    noise, prior, y = 0.5, 2.0, torch.tensor([1.3, 0.2, 0.9, 1.8]).double()
    posterior = known_gp(torch.zeros(4, 1), y, scale=prior, noise=noise)  # four looks at one value
    precision = 1 / prior + 4 / noise
    mean, std = y.sum().item() / noise / precision, math.sqrt(1 / precision + noise)
    order = best_action(posterior, X[:1], None, Newsvendor(4.0, 1.0)).action.item()
    assert order == pytest.approx(mean + stats.norm.ppf(0.8) * std, abs=1e-6)
    assert abs(order - mean) > 0.1  # acting on the mean is another order


def test_a_sparse_count_model_is_decided_by_samples():
    x = np.linspace(0, 1, 40)[:, None]
    y = np.random.default_rng(0).poisson(4.0, 40).astype(float)
    model = fspace.GPRegressor(kernel="rbf", likelihood="poisson", progress=False).fit(x, y)
    decided = best_action(model, x[:3], np.arange(12.0), Newsvendor(3.0, 1.0), samples=4000)
    assert not decided.exact
    exact = best_action(model, x[:3], None, Newsvendor(3.0, 1.0)).action
    assert ((decided.action - exact).abs() <= 1.0).all()


def test_value_of_information_is_the_knowledge_gradient(known_gp):
    """Take or leave (actions 0 and 1): E max(0, m') - max(0, m) with m' normal, in closed form."""
    x = torch.tensor([[0.1], [0.3], [0.9]]).double()
    posterior = known_gp(x, torch.tensor([0.5, -0.4, 0.1]), lengthscale=0.1)
    row, at = torch.tensor([[0.62]]).double(), torch.tensor([[0.62], [0.75], [5.0]]).double()
    found = value_of_information(posterior, row, [0.0, 1.0], Linear(), at, outcomes=150)
    m = posterior.latent(row).mean.item()
    for k in range(3):
        joint = posterior.latent(torch.cat([row, at[k : k + 1]])).covariance
        total = joint[1, 1] + posterior.observed(at[k : k + 1]).aleatoric[0]
        spread = max((joint[0, 1] / total.sqrt()).item(), 1e-12)
        want = m * stats.norm.cdf(m / spread) + spread * stats.norm.pdf(m / spread) - max(m, 0.0)
        error = found.standard_error[k].item()
        assert abs(found.value[k].item() - want) < 4.5 * error + 1e-9
    assert found.value[0] > 10 * found.value[2].abs()  # far away there is nothing to learn
    assert found.value[0] > 4.5 * found.standard_error[0]


def test_value_of_information_of_classes():
    x = np.linspace(-1, 1, 30)[:, None]
    model = fspace.GPClassifier(kernel="rbf", progress=False).fit(x, x[:, 0] > 0)
    cost = CostMatrix([[0.0, 1.0], [1.0, 0.0]])
    found = value_of_information(model, [[0.02]], None, cost, [[0.0], [0.95]])
    assert found.value[0] > found.value[1] >= -1e-6


def test_mixtures_are_decided_alike():
    x = torch.rand(20, 1).double()
    one = fspace.GPRegressor(kernel="rbf", progress=False).fit(x, x[:, 0]).posterior_
    both = MixturePosterior([one, one], [0.5, 0.5])
    first, second = (best_action(p, x[:4], [0.2, 0.6], Newsvendor(1.0, 2.0)) for p in (one, both))
    assert torch.allclose(first.values, second.values)


def test_rows_beyond_one_part():
    x = torch.rand(30, 1).double()
    posterior = fspace.GPRegressor(kernel="rbf", progress=False).fit(x, x[:, 0]).posterior_
    rows = torch.rand(600, 1).double()
    decided = best_action(posterior, rows, None, Newsvendor(1.0, 2.0))
    assert torch.allclose(decided.action, posterior.observed(rows).quantile(1 / 3))
    assert best_action(
        posterior, rows, ["low", "high"], lambda a, y: y * (a == "high"), samples=8
    ).value.shape == (600,)


@pytest.mark.parametrize(
    "utility, error, words",
    [
        (lambda a, y: torch.where(y > 1, math.nan, y), UtilityError, "row 0"),
        (lambda a, y: y / 0.0, UtilityError, "finite"),
        (lambda a, y: y.mean(1), UtilityError, "one number a sample and row"),
        (lambda a, y: "high", UtilityError, "one number"),
        (CostMatrix([[0.0, 1.0]]), OptionError, "for classes"),
    ],
    ids=["nan", "infinite", "shape", "text", "classes"],
)
def test_utilities_that_cannot_be_averaged(utility, error, words):
    with pytest.raises(error, match=words):
        best_action(Fixed(ONE), X, [0.0, 1.0], utility)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: best_action(m, torch.zeros(0, 1), [0.0], Linear()), DataError, "empty"),
        (lambda m: best_action(m, torch.zeros(2, 3), [0.0], Linear()), DataError, "1 columns"),
        (lambda m: best_action(m, torch.full((2, 1), math.nan), [0.0], Linear()), DataError, "NaN"),
        (lambda m: best_action(m, X, [], Linear()), OptionError, "empty"),
        (lambda m: best_action(m, X, None, Linear()), OptionError, "actions to choose"),
        (lambda m: best_action(m, X, [math.nan], Linear()), OptionError, "NaN"),
        (lambda m: best_action(fspace.GPRegressor(), X, [0.0], Linear()), NotFittedError, "fit"),
        (lambda m: best_action("model", X, [0.0], Linear()), OptionError, "no posterior"),
        (lambda m: Newsvendor(0.0, 1.0), OptionError, "positive"),
        (lambda m: CVaR(1.0), OptionError, "between"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call(Fixed(ONE))


@pytest.mark.parametrize(
    "reduced", [lambda y: y.sum(), lambda y: y.mean(0), lambda y: y.sum(1, keepdim=True)]
)
def test_a_utility_that_sums_over_samples_or_rows_is_refused(reduced):
    """Broadcast, its value would be that of all samples together, told for each."""
    with pytest.raises(UtilityError, match="one number a sample and row"):
        best_action(Fixed(ONE), X, [0.0, 1.0], lambda action, y: reduced(y) * (1.0 + action))


def test_a_utility_that_does_not_depend_on_y():
    found = best_action(Fixed(ONE), X, [0.0, 1.0], lambda action, y: -action)
    assert found.value.tolist() == [0.0] * len(X)
    assert best_action(Fixed(ONE), X, ["wait"], lambda action, y: 3.0).value.tolist() == [3.0] * len(X)


def test_a_model_of_other_columns(tmp_path):
    import pandas as pd

    table = pd.DataFrame({"size": np.arange(20.0), "age": np.arange(20.0)[::-1] ** 2})
    model = fspace.GPRegressor(kernel="rbf", progress=False).fit(table, table["size"])
    with pytest.raises(DataError, match="feature names"):
        best_action(model, table.rename(columns={"age": "years"}), None, Newsvendor(1.0, 1.0))
