"""Every method over weights, by the same rules: the contract, classes, files, Ctrl-C."""

import warnings

import numpy as np
import pytest
import torch

import fspace
from fspace.errors import DivergedWarning, NumericalError
from fspace.front import FunctionEstimator
from fspace.inference.weights import (
    HMC,
    METHODS,
    NUTS,
    SGHMC,
    SGLD,
    SWAG,
    CyclicalSGLD,
    FunctionalPrior,
    MultiSWAG,
)

FEW = {  # settings under which samplers are quick
    "swag": SWAG(4, 6, 2),
    "multiswag": MultiSWAG(4, 6, 2, members=2),
    "sgld": SGLD(8, 2, 2),
    "sghmc": SGHMC(8, 2, 2),
    "csgld": CyclicalSGLD(8, 2, 2),
    "hmc": HMC(8, 2, 5),
    "nuts": NUTS(8, 2, 5, 3),
    "functional_prior": FunctionalPrior(steps=20, samples=8, chains=2, thinning=2),
}
QUICK = {"hidden": (8,), "epochs": 15}


@pytest.fixture(scope="module")
def wave():
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, (80, 2))
    return X, np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(80)


def skip_without_its_library(name):
    if name == "nuts":
        pytest.importorskip("pyro", reason="pip install 'fspace[bnn]'")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_the_contract(name, wave, tmp_path):
    """Predictions, draws that are functions, noise apart from the function, two outputs, and the same from a file."""
    skip_without_its_library(name)
    X, y = wave
    both = np.stack([y, X[:, 1]], 1)
    model = fspace.BNNRegressor(FEW.get(name, name), likelihood="gaussian", **QUICK).fit(X, both)
    latent, observed = model.posterior_.latent(X[:6]), model.posterior_.observed(X[:6])
    assert latent.mean.shape == observed.mean.shape == (6, 2)
    torch.testing.assert_close(observed.variance, latent.variance + observed.aleatoric)
    assert (observed.aleatoric > 0).all() and observed.log_prob(both[:6]).isfinite().all()
    draws = model.posterior_.draw(3, seed=1)
    values = draws(X[:6])
    assert values.shape == (3, 6, 2)
    torch.testing.assert_close(draws[1](X[2:4]), values[1, 2:4])
    torch.testing.assert_close(model.posterior_.draw(3, seed=1)(X[:6]), values)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == both.shape and model.predict(X[:5], return_cov=True)[1].shape == (
        2,
        5,
        5,
    )
    again = fspace.load(model.save(tmp_path / "m.fspace"))
    assert np.array_equal(again.predict(X), mean) and again.get_params() == model.get_params()
    torch.testing.assert_close(again.posterior_.draw(3, seed=1)(X[:6]), values)
    assert again.diagnostics_ == model.diagnostics_


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_classifies(name, classes, wave, tmp_path):
    skip_without_its_library(name)
    X, y = wave
    labels = np.array(["a", "b", "c"])[np.digitize(y, [0.0] if classes == 2 else [-0.4, 0.4])]
    model = fspace.BNNClassifier(FEW.get(name, name), **QUICK).fit(X, labels)
    probs = model.predict_proba(X)
    assert probs.shape == (80, classes) and np.allclose(probs.sum(1), 1) and np.isfinite(probs).all()
    value = model.posterior_.draw(2, seed=0)(X[:4])
    assert value.shape == ((2, 4) if classes == 2 else (2, 4, 3))
    response = model.posterior_.response(value)
    assert ((response >= 0) & (response <= 1)).all()
    again = fspace.load(model.save(tmp_path / "m.fspace"))
    assert np.array_equal(again.predict_proba(X), probs) and list(again.classes_) == list(model.classes_)


def interrupted_after(entries, monkeypatch):
    """Press Ctrl-C after so many entries of a fit's history; the list that their stages are put in."""
    real, stages = FunctionEstimator._recorder, []

    def recorder(self, tell, held):
        record = real(self, tell, held)

        def interrupted(**entry):
            stages.append(entry["stage"])
            record(**entry)
            if len(stages) == entries:
                raise KeyboardInterrupt

        return interrupted

    monkeypatch.setattr(FunctionEstimator, "_recorder", recorder)
    return stages


@pytest.mark.parametrize("name", METHODS)
def test_ctrl_c_keeps_the_best_so_far(wave, name, monkeypatch):
    skip_without_its_library(name)
    interrupted_after(3, monkeypatch)
    with pytest.warns(UserWarning, match="Interrupted"):
        model = fspace.BNNRegressor(FEW.get(name, name), likelihood="gaussian", **QUICK).fit(*wave)
    assert model.interrupted_ and np.isfinite(model.predict(wave[0])).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{"learning_rate": 1e20}, {"noise_variance": 1e-300}, {"prior": 1e-20}])
def test_what_overflows_is_called_so_and_never_predicts_what_is_not_finite(name, options, wave):
    """Either a refusal in words, or the last finite state, whose predictions are finite."""
    skip_without_its_library(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = fspace.BNNRegressor(
                FEW.get(name, name), hidden=(4,), epochs=3, likelihood="gaussian", **options
            ).fit(*wave)
        except NumericalError as error:
            assert "not finite" in str(error)
            return
    assert np.isfinite(model.predict(wave[0], return_std=True)).all()
    if model.diverged_:  # nothing goes on from a start that has diverged
        assert "stiffness" not in model.diagnostics_ and "step_size" not in model.diagnostics_


def test_dropout_that_is_interrupted_in_its_search_starts_no_other_run(wave, monkeypatch):
    stages = interrupted_after(20, monkeypatch)
    with pytest.warns(UserWarning, match="Interrupted"):
        model = fspace.BNNRegressor("dropout", hidden=(8,), epochs=300).fit(*wave)
    assert set(stages) == {"dropout: the rate"}
    assert model.score(*wave) > 0.2  # what it had learned by then


@pytest.mark.parametrize("name", ["fvi", "functional_prior"])
def test_ctrl_c_while_the_kernel_is_learned_ends_the_fit(wave, name, monkeypatch):
    stages = interrupted_after(3, monkeypatch)
    with pytest.warns(UserWarning, match="Interrupted"):
        model = fspace.BNNRegressor(name, likelihood="gaussian", **QUICK).fit(*wave)
    assert set(stages) <= {f"{name}: prior", "functional_prior: prior"} and len(stages) < 6
    assert np.isfinite(model.predict(wave[0], return_std=True)).all()


@pytest.mark.parametrize(
    "name, likelihood",
    [
        ("map", "gaussian"),
        ("laplace", "gaussian"),
        ("dropout", "gaussian"),
        ("ensemble", "gaussian"),
        ("ensemble", "heteroscedastic"),
        ("dropout", "heteroscedastic"),
    ],
)
def test_a_noise_that_has_outgrown_floats_is_called_diverged(wave, name, likelihood):
    """The log density stays finite where a variance is infinite, so that losses alone do not tell."""
    with pytest.warns(DivergedWarning):
        model = fspace.BNNRegressor(name, likelihood=likelihood, learning_rate=1e3, epochs=30).fit(*wave)
    assert model.diverged_ is not None
    assert np.isfinite(model.predict(wave[0], return_std=True)).all()
