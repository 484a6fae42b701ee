"""BNNRegressor and BNNClassifier: scikit-learn's own checks, real data, saving, refusals, Ctrl-C, divergence."""

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LinearRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import estimator_checks_generator

import fspace
from fspace.errors import DataError, DivergedWarning, FspaceError, ModelFileError, OptionError
from fspace.inference.weights import (
    Ensemble,
    GaussianPrior,
    Laplace,
)
from fspace.kernels import CausalConv, ConvNet, ResidualMLP

QUICK = {"hidden": (8,), "epochs": 15}
CHECKS = [
    (estimator, check)
    for model in (
        fspace.BNNRegressor("map", hidden=(8,), learning_rate=0.05, epochs=50, batch_size=64),
        fspace.BNNClassifier("map", hidden=(8,), learning_rate=0.05, epochs=50, batch_size=64),
    )
    for estimator, check in estimator_checks_generator(model)
]


@pytest.mark.parametrize(
    ("estimator", "check"), CHECKS, ids=[f"{type(e).__name__}-{c.func.__name__}" for e, c in CHECKS]
)
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


def test_an_ensemble_on_diabetes_is_as_good_as_a_linear_model_and_calibrated(diabetes):
    X, X_test, y, y_test = diabetes
    model = fspace.BNNRegressor(epochs=60).fit(X, y)
    linear = LinearRegression().fit(X, y)
    assert model.score(X_test, y_test) > linear.score(X_test, y_test) - 0.05
    lower, upper = model.predictive(X_test).interval(0.9)
    inside = ((y_test.to_numpy() >= lower.numpy()) & (y_test.to_numpy() <= upper.numpy())).mean()
    assert abs(inside - 0.9) < 4 * (0.9 * 0.1 / len(y_test)) ** 0.5
    wrong = (np.abs(y_test.to_numpy() - model.predict(X_test)) < (upper - lower).numpy() / 4).mean()
    assert abs(wrong - 0.9) > 4 * (0.9 * 0.1 / len(y_test)) ** 0.5  # half the interval fails the same test
    assert model.posterior_.latent(X_test.to_numpy()).variance.min() > 0
    assert model.relevance_.sum() == pytest.approx(1.0)


def test_an_ensemble_on_digits():
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=700, test_size=500, random_state=0, stratify=y)
    model = fspace.BNNClassifier(Ensemble(3), epochs=60).fit(X, y)
    assert model.score(X_test, y_test) > 0.93 and log_loss(y_test, model.predict_proba(X_test)) < 0.3
    assert model.predictive(X_test).mutual_information.min() >= 0


def test_a_saved_network_predicts_the_same_in_another_process(wave, tmp_path):
    X, y = wave
    model = fspace.BNNRegressor(Laplace("full"), prior=GaussianPrior(1.0, 0.5), **QUICK).fit(X, y)
    model.save(tmp_path / "m.fspace")
    np.save(tmp_path / "x.npy", X)
    script = (
        "import sys, numpy as np, fspace; m = fspace.load(sys.argv[1]); "
        "np.save(sys.argv[3], np.stack(m.predict(np.load(sys.argv[2]), return_std=True))); print(m.inference, m.prior)"
    )
    files = [str(tmp_path / name) for name in ("m.fspace", "x.npy", "p.npy")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{model.inference} {model.prior}"
    assert np.array_equal(np.load(files[2]), np.stack(model.predict(X, return_std=True)))


def test_images_and_sequences(tmp_path):
    rng = np.random.default_rng(0)
    images = 100.0 + 20.0 * rng.standard_normal((60, 2, 8, 8))
    y = images[:, 1].mean(axis=(1, 2))
    options = {"likelihood": "gaussian", "epochs": 10}
    for network, X, target, names in (
        (ConvNet(2, (4,), 1), images, y, ["map", "laplace", "mfvi", "dropout"]),
        (
            CausalConv(2, 6, (1, 2), 1),
            images[:, :, 0].swapaxes(1, 2),
            images[:, 1, 0].mean(1),
            ["ensemble", "laplace"],
        ),
    ):
        for name in names:
            model = fspace.BNNRegressor(name, network, **options).fit(X, target)
            assert model.relevance_.shape == (2,)
            again = fspace.load(model.save(tmp_path / "m.fspace"))
            assert np.array_equal(again.predict(X), model.predict(X))
    labels = (y > y.mean()).astype(int)
    assert (
        fspace.BNNClassifier("map", ConvNet(2, (4,), 1), epochs=20).fit(images, labels).score(images, labels)
        > 0.5
    )
    with pytest.raises(OptionError, match="ConvNet"):
        fspace.BNNRegressor("map").fit(images, y)


def test_networks_of_their_authors_own(wave, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    X, y = wave
    model = fspace.BNNRegressor("map", Own(), epochs=10).fit(X, y)
    path = model.save(tmp_path / "m.fspace")
    with pytest.raises(ModelFileError, match="network"):
        fspace.load(path)
    assert np.array_equal(fspace.load(path, modules={"network": Own()}).predict(X), model.predict(X))
    assert fspace.BNNRegressor("map", torch.nn.Sequential(torch.nn.Linear(2, 1)), epochs=5).fit(X, y)


def test_tables_of_all_kinds_are_encoded(wave):
    X, y = wave
    frame = pd.DataFrame({"a": X[:, 0], "kind": pd.Categorical(np.where(X[:, 1] > 0, "up", "down"))})
    model = fspace.BNNRegressor("map", **QUICK).fit(frame, y)
    assert model.feature_names_in_.tolist() == ["a", "kind"]
    frame.loc[3, "a"] = np.nan
    with pytest.raises(DataError, match="Row 3"):
        fspace.BNNRegressor("map", **QUICK).fit(frame, y)
    assert fspace.BNNRegressor("map", missing="impute", **QUICK).fit(frame, y)
    with pytest.raises(DataError, match="NaN"):
        model.posterior_.latent([[np.nan, 1.0]])
    with pytest.raises(DataError, match=r"shape \[n, 2\]"):
        model.posterior_.latent([[1.0, 1.0, 1.0]])


def test_same_seed_same_fit(wave):
    a, b, c = (fspace.BNNRegressor("mfvi", seed=s, **QUICK).fit(*wave).predict(wave[0]) for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inference": "nope"}, "inference"),
        ({"inference": 3}, "inference"),
        ({"prior": "flat"}, "prior"),
        ({"prior": -1.0}, "prior"),
        ({"temperature": 0.0}, "temperature"),
        ({"inference": "map", "temperature": 0.5}, "claims none"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": 1e300}, "at most 1e\\+30"),
        ({"prior": 1e200}, "its square"),
        ({"prior": 1e-200}, "its square"),
        ({"hidden": (0,)}, "hidden"),
        ({"hidden": "wide"}, "hidden"),
        ({"activation": "cubic"}, "activation"),
        ({"likelihood": "nope"}, "likelihood"),
        ({"noise_variance": -1.0}, "noise_variance"),
        ({"noise_variance": 1.0, "likelihood": "heteroscedastic"}, "noise_variance"),
        ({"network": "resnet"}, "network"),
        ({"network": torch.nn.Linear(3, 1)}, "rows of shape"),
        ({"network": torch.nn.Linear(2, 5)}, "needs"),
        ({"network": ResidualMLP(2, out_features=1), "likelihood": "gaussian"}, "spectral"),
        ({"network": torch.nn.Flatten(), "likelihood": "gaussian"}, "parameter|needs"),
        ({"inference": "laplace", "likelihood": "heteroscedastic"}, "constant"),
        ({"seed": -1}, "seed"),
        ({"progress": True}, "progress"),
        ({"device": "nope"}, "device"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_options_that_do_not_exist(wave, options, words):
    with pytest.raises(FspaceError, match=words):
        fspace.BNNRegressor(**{**QUICK, **options}).fit(*wave)


def test_noise_that_is_known_is_kept_in_the_units_of_y(wave):
    X, y = wave
    model = fspace.BNNRegressor("map", noise_variance=4.0, **QUICK).fit(X, 100 * y)
    torch.testing.assert_close(
        model.predictive(X[:3]).aleatoric, torch.full((3,), 4.0).double(), rtol=1e-5, atol=0
    )
    assert fspace.BNNRegressor("map", noise_variance=np.array([4.0]), **QUICK).fit(X, y)
    with pytest.raises(FspaceError, match="noise_variance"):
        fspace.BNNRegressor("map", noise_variance=[1.0, 2.0, 3.0], **QUICK).fit(X, y)


def test_a_fit_that_diverges_says_so_and_keeps_the_last_finite_state(wave):
    with pytest.warns(DivergedWarning, match="diverged"):
        model = fspace.BNNRegressor("map", learning_rate=1e30, likelihood="gaussian", **QUICK).fit(*wave)
    assert model.diverged_["step"] >= 1 and np.isfinite(model.predict(wave[0])).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DivergedWarning)
        assert fspace.BNNRegressor("map", **QUICK).fit(*wave).diverged_ is None


@pytest.mark.parametrize("rate", [1e3, 1e20, 1e30])
@pytest.mark.parametrize("inference", ["map", "mfvi", "dropout", "laplace", "ensemble"])
def test_the_state_that_is_kept_has_finite_predictions(wave, inference, rate):
    """Weights of 1e30 are finite, and what they predict is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fspace.BNNRegressor(
            inference, hidden=(4,), epochs=3, learning_rate=rate, likelihood="gaussian"
        ).fit(*wave)
    mean, deviation = model.predict(wave[0], return_std=True)
    assert np.isfinite(mean).all() and np.isfinite(deviation).all()
    assert model.diverged_ or rate < 1e20


def test_options_are_cloned():
    model = fspace.BNNRegressor(Laplace("diagonal"), prior=GaussianPrior(1.0))
    assert clone(model).get_params() == model.get_params()
