"""GPRegressor: scikit-learn's own checks, real data, saving, refusals, and fits over awkward tables."""

import math

import numpy as np
import pandas as pd
import polars
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.priors import LogNormalPrior
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import lognorm, multivariate_normal, uniform
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import fspace
from fspace import front
from fspace.errors import DataError, DeviceError, FspaceError, OptionError
from fspace.fitting import channel_scaling
from fspace.inference import network, optimise
from fspace.kernels import CausalConv, ConvNet

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
    assert set(model.choice_["scores"]) >= {"matern", "deep 1"}
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


def test_targets_keep_their_names(wave):
    X, y = wave
    fit = lambda target: fspace.GPRegressor(kernel="matern").fit(X, target).target_names_  # noqa: E731
    assert fit(y) == ["y"]
    assert fit(np.column_stack([y, y])) == ["y0", "y1"]
    assert fit(pd.Series(y, name="height")) == ["height"]
    assert fit(pd.DataFrame({"height": y, 3: y})) == ["height", "y1"]
    assert fit(polars.Series("depth", y)) == ["depth"]
    assert fit(polars.DataFrame({"depth": y, "width": y})) == ["depth", "width"]


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


@pytest.mark.parametrize("frame", [pd.DataFrame, polars.DataFrame])
def test_frames_of_numbers_booleans_and_categories(frame):
    rng = np.random.default_rng(0)
    size, new = rng.uniform(1, 2, 90), rng.random(90) < 0.5
    city = rng.choice(["Oxford", "Paris", "Rome"], 90)
    y = size + 2.0 * new + 5.0 * (city == "Paris") + 0.01 * rng.standard_normal(90)
    table = frame({"size": size, "new": new, "city": city})
    if frame is polars.DataFrame:
        table = table.with_columns(polars.col("city").cast(polars.Categorical))
        first, rest = table[:60], table[60:]
    else:
        table["city"] = table["city"].astype("category")
        first, rest = table.iloc[:60], table.iloc[60:]
    model = fspace.GPRegressor(kernel="matern").fit(first, y[:60])
    assert model.score(rest, y[60:]) > 0.99
    assert list(model.feature_names_in_) == ["size", "new", "city"]
    assert model.relevance_.shape == (5,)
    # the same numbers by hand
    codes = np.column_stack([size, new, city == "Oxford", city == "Paris", city == "Rome"]).astype(float)
    by_hand = fspace.GPRegressor(kernel="matern").fit(codes[:60], y[:60])
    np.testing.assert_allclose(model.predict(rest), by_hand.predict(codes[60:]), rtol=1e-9)


# ---- what must hold of any fit -------------------------------------------------------------------


def small(seed, rows, columns):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, columns))
    return X, np.sin(2 * X[:, 0]) + 0.3 * rng.standard_normal(rows)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shift=st.floats(-1e4, 1e4),
    factor=st.floats(1e-6, 1e6),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_predictions_follow_the_units_of_the_target(seed, shift, factor, sign):
    X, y = small(seed, 25, 2)
    a, b = factor * sign, shift * factor
    mean, std = fspace.GPRegressor(kernel="matern").fit(X, y).predict(X, return_std=True)
    moved, wide = fspace.GPRegressor(kernel="matern").fit(X, a * y + b).predict(X, return_std=True)
    # rounding of y is amplified by the search for kernel parameters, which stops within 1e-5 or so of the best
    np.testing.assert_allclose((moved - b) / a, mean, atol=2e-2 * y.std())
    np.testing.assert_allclose(wide / factor, std, rtol=2e-2)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000), rows=st.integers(3, 30))
def test_each_row_is_predicted_on_its_own(data, seed, rows):
    X, y = small(seed, rows, 2)
    model = fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=10).fit(X, y)
    picks = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=10))
    whole, part = model.predict(X, return_std=True), model.predict(X[picks], return_std=True)
    np.testing.assert_allclose(part[0], whole[0][picks], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(part[1], whole[1][picks], rtol=1e-9, atol=1e-9)


# ---- many rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        torch.as_tensor,
        lambda x: pd.DataFrame(x).add_prefix("c"),
        polars.DataFrame,
        np.ndarray.tolist,
    ],
)
def test_rows_are_predicted_in_parts(wave, kind, monkeypatch):
    X, y = wave
    table = kind(X)
    model = fspace.GPRegressor(kernel="matern").fit(table, np.column_stack([y, -y]))
    mean, std = model.predict(table, return_std=True)
    seen = []
    encode = type(model.encoder_).transform

    def watched(self, X, first_row=0):
        seen.append((len(X), first_row))
        return encode(self, X, first_row)

    monkeypatch.setattr(type(model.encoder_), "transform", watched)
    monkeypatch.setattr(front, "CHUNK_VALUES", 60)
    parts = model.predict(table, return_std=True)
    assert seen == [(30, 0), (30, 30), (20, 60)]
    np.testing.assert_allclose(parts[0], mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts[1], std, rtol=1e-9, atol=1e-12)
    bad = X.copy()
    bad[71, 1] = np.nan
    with pytest.raises(DataError, match="Row 71"):
        model.predict(kind(bad))


# ---- options -------------------------------------------------------------------------------------


def test_sites_learn_what_the_collapsed_bound_learns(wave):
    X, y = wave
    scores = [
        fspace.GPRegressor(kernel="matern", inference=way).fit(X[:60], y[:60]).score(X[60:], y[60:])
        for way in ("sites", "collapsed")
    ]
    assert scores[0] > 0.9 and abs(scores[0] - scores[1]) < 0.05


def test_inducing_inputs_by_tolerance(wave):
    X, y = wave
    counts = []
    for tolerance in (0.2, 0.02):
        model = fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=tolerance).fit(X, y)
        basis = model.posterior_.basis
        z = basis.embed(model.posterior_.scaling.inputs(torch.tensor(X)))
        left = basis.prior_variance(z).sum() - basis.whiten(z).square().sum()
        assert 0 < left / basis.prior_variance(z).sum() < 1.1 * tolerance
        counts.append(len(basis.inducing_inputs))
    assert counts[0] < counts[1] < len(X)


def test_a_likelihood_object_says_where_the_noise_starts(wave):
    X, y = wave
    own = GaussianLikelihood()
    own.noise = 0.5
    model = fspace.GPRegressor(kernel="matern", likelihood=own).fit(X, y)
    named = fspace.GPRegressor(kernel="matern").fit(X, y)
    assert own.noise.item() == pytest.approx(0.5)  # the caller's own stays as it was
    assert model.posterior_.noise_variance.item() == pytest.approx(
        named.posterior_.noise_variance.item(), rel=0.05
    )
    own.raw_noise.requires_grad_(False)
    with pytest.raises(OptionError, match="fixed"):
        fspace.GPRegressor(likelihood=own).fit(X, y)
    with pytest.raises(OptionError, match="heteroscedastic"):
        fspace.GPRegressor(likelihood="student").fit(X, y)


def test_a_prior_on_the_noise_counts(wave):
    """The noise is where the log evidence of a fixed kernel plus the prior's log density is largest."""
    X, y = (np.asarray(part, dtype=float) for part in wave)
    kernel = ScaleKernel(RBFKernel()).requires_grad_(False)
    z, t = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    with torch.no_grad():
        k = kernel.double()(torch.from_numpy(z)).to_dense().numpy()

    def least(prior):
        def loss(log_noise):
            log_evidence = multivariate_normal(cov=k + np.exp(log_noise) * np.eye(len(t))).logpdf(t)
            return -log_evidence - prior.logpdf(np.exp(log_noise))

        return np.exp(minimize_scalar(loss, bounds=(-8.0, 1.0), method="bounded").x)

    prior = lognorm(s=0.3, scale=np.exp(-1.0))
    own = GaussianLikelihood(noise_prior=LogNormalPrior(-1.0, 0.3))
    model = fspace.GPRegressor(kernel=kernel, likelihood=own, inference="exact").fit(X, y)
    found = model.posterior_.noise_variance.item() / y.var()
    assert found == pytest.approx(least(prior), rel=1e-3)
    assert abs(found / least(uniform(scale=10.0)) - 1) > 0.1  # the evidence alone says otherwise
    assert not list(model.posterior_.basis.likelihood.named_priors())


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["_pretrain", "_tune"])
def test_an_interrupted_fit_keeps_what_it_has_and_says_so(wave, monkeypatch, where):
    X, y = wave
    trained = getattr(network, where)
    calls = []

    def stage(*args):
        calls.append(where)
        result = trained(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(network, where, stage)
    model = fspace.GPRegressor(kernel="deep", members=5)
    with pytest.warns(UserWarning, match=r"Interrupted while fitting deep 2; .* kept \(deep 1, deep 2\)"):
        model.fit(X, y)
    assert len(calls) == 2 and model.interrupted_
    assert len(model.posterior_.members) == 2
    assert model.score(X, y) > 0.9
    assert not fspace.GPRegressor(kernel="matern").fit(X, y).interrupted_


def test_ctrl_c_in_the_line_search_keeps_the_best_parameters(wave, monkeypatch):
    X, y = wave
    evidence, values = optimise.log_marginal_likelihood, []

    def slow(*args):
        if len(values) == 12:
            raise KeyboardInterrupt
        values.append(evidence(*args))
        return values[-1]

    monkeypatch.setattr(optimise, "log_marginal_likelihood", slow)
    with pytest.warns(UserWarning, match="Interrupted while fitting matern"):
        model = fspace.GPRegressor().fit(X, y)  # auto: nothing after the first kernel is begun
    assert list(model.choice_["weights"]) == ["matern"]
    assert model.score(X, y) > 0.8


# ---- images and sequences ------------------------------------------------------------------------


def test_channels_are_scaled_each_by_itself():
    rng = np.random.default_rng(0)
    for shape, axes in (((50, 3, 4, 5), (0, 2, 3)), ((50, 6, 3), (0, 1))):
        offset = np.array([1e3, 0.0, -2.0]).reshape((3, 1, 1) if len(shape) == 4 else (3,))
        x = rng.standard_normal(shape) * 7.0 + offset
        parts = channel_scaling(x)
        scaled = (x / parts["unit"] - parts["shift"]) / parts["scale"]
        np.testing.assert_allclose(scaled.mean(axis=axes), 0.0, atol=1e-9)
        np.testing.assert_allclose(scaled.std(axis=axes), 1.0, rtol=1e-9)
        constant = channel_scaling(np.full(shape, 3.7))
        assert np.abs(3.7 - constant["shift"]).max() < 1e-12 and (constant["scale"] == 1.0).all()


def test_images_and_sequences_need_a_kernel_that_reads_them(wave):
    images, sequences, y = np.random.default_rng(0).random((9, 1, 8, 8)), np.ones((9, 8, 2)), np.arange(9.0)
    conv = fspace.DeepKernel(ConvNet(1), MaternKernel())
    for X, kernel, words in [
        (images, "auto", "images.*DeepKernel.*ConvNet"),
        (sequences, "matern", "sequences.*DeepKernel.*CausalConv"),
        (sequences, conv, "ConvNet reads rows of 3 dimensions"),
        (wave[0][:9], conv, "ConvNet reads rows of 3 dimensions"),
    ]:
        with pytest.raises(OptionError, match=words):
            fspace.GPRegressor(kernel=kernel).fit(X, y)
    with pytest.raises(DataError, match="this estimator reads"):
        fspace.GPRegressor().fit(np.ones((9, 1, 2, 3, 4)), y)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_images_and_sequences_end_to_end(kind, tmp_path):
    rng = np.random.default_rng(0)
    if kind == "images":
        X = 100.0 + 20.0 * rng.standard_normal((120, 2, 8, 8))
        y = X[:, 1].mean(axis=(1, 2))  # the other channel is noise
        kernel = fspace.DeepKernel(ConvNet(2, channels=(4,), out_features=3), MaternKernel())
    else:
        X = 100.0 + 20.0 * rng.standard_normal((120, 10, 2))
        y = X[:, -3:, 1].mean(axis=1)
        kernel = fspace.DeepKernel(CausalConv(2, channels=6, out_features=3), MaternKernel())
    model = fspace.GPRegressor(kernel=kernel, members=1).fit(torch.tensor(X[:100]), y[:100])
    mean, std = model.predict(X[100:], return_std=True)
    assert mean.shape == std.shape == (20,) and (std > 0).all()
    assert model.relevance_.shape == (2,) and model.relevance_.argmax() == 1
    assert np.corrcoef(mean, y[100:])[0, 1] > 0.5
    assert np.array_equal(fspace.load(model.save(tmp_path / "m.fspace")).predict(X), model.predict(X))
