"""GPClassifier: scikit-learn's own checks, real data, weights, saving, refusals."""

import json
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import fspace
from fspace.errors import DataError, FspaceError, ModelFileError, NumericalError, OptionError
from fspace.inference.candidates import input_scaling
from fspace.predictive import Categorical

CHECKS = list(estimator_checks_generator(fspace.GPClassifier(kernel="matern")))


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=[c.func.__name__ for _, c in CHECKS])
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    return train_test_split(X, y, test_size=0.3, random_state=0)


@pytest.fixture(scope="module")
def plain(cancer):
    X, _, y, _ = cancer
    return fspace.GPClassifier(kernel="matern").fit(X, y)


def test_two_classes_are_told_apart_as_well_as_by_a_linear_model(cancer, plain):
    X, X_test, y, y_test = cancer
    linear = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    ours, theirs = (log_loss(y_test, m.predict_proba(X_test)) for m in (plain, linear))
    assert ours < theirs + 0.03 and plain.score(X_test, y_test) > 0.95
    assert isinstance(plain.predictive(X_test), Categorical)
    lowest, first = (min(h["loss"] for h in plain.history_), plain.history_[0]["loss"])
    assert lowest < first and np.isfinite(plain.log_evidence_)


def test_probabilities_are_calibrated_where_classes_overlap():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 2))
    truth = 1 / (1 + np.exp(-2 * X[:, 0] * X[:, 1]))
    y = rng.random(1500) < truth
    model = fspace.GPClassifier(kernel="matern").fit(X[:1000], y[:1000])
    probs = model.predict_proba(X[1000:])[:, 1]
    assert np.abs(probs - truth[1000:]).mean() < 0.08
    assert np.abs(0.5 - truth[1000:]).mean() > 0.16  # the twin: always one half
    assert model.classes_.dtype == bool


@pytest.mark.parametrize("kernel", ["matern", "deep"])
def test_many_classes(kernel):
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=500, train_size=700, random_state=0, stratify=y)
    model = fspace.GPClassifier(kernel=kernel, members=1).fit(X, y)
    probs = model.predict_proba(X_test)
    assert probs.shape == (500, 10) and np.allclose(probs.sum(1), 1)
    assert model.score(X_test, y_test) > 0.95 and log_loss(y_test, probs) < 0.25


def test_auto_chooses_by_rows_it_has_not_seen(cancer):
    X, X_test, y, y_test = cancer
    model = fspace.GPClassifier(members=1).fit(X, y)
    assert set(model.choice_["scores"]) == {"matern", "deep 1"}
    assert log_loss(y_test, model.predict_proba(X_test)) < 0.15


def test_labels_of_any_kind_come_back():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    for labels in (names, pd.Series(names, name="species"), y + 7, names.astype(object)):
        model = fspace.GPClassifier(kernel="rbf").fit(X, labels)
        assert model.score(X, labels) > 0.93
    assert fspace.GPClassifier(kernel="rbf").fit(X, pd.Series(names, name="species")).target_names_ == [
        "species"
    ]


def test_rare_classes_count_more_when_asked():
    rng = np.random.default_rng(1)
    X = np.concatenate([rng.normal(size=(300, 2)), rng.normal(1.2, 1.0, size=(30, 2))])
    y = np.repeat([0, 1], [300, 30])
    plain = fspace.GPClassifier(kernel="matern").fit(X, y)
    even = fspace.GPClassifier(kernel="matern", class_weight="balanced").fit(X, y)
    assert abs(plain.predict_proba(X)[:, 1].mean() - 1 / 11) < 0.03
    assert even.predict(X).mean() > 2 * plain.predict(X).mean()


def test_balance_asks_for_rows_of_every_class():
    """A class that is named but absent has no frequency that could be balanced."""
    X, y = np.arange(12.0).reshape(6, 2), ["a", "b"] * 3
    model = fspace.GPClassifier(kernel="matern", class_weight="balanced")
    with pytest.raises(OptionError, match=r"of the classes \['c'\] there is no row.*rows of every class"):
        model.partial_fit(X, y, classes=["a", "b", "c"])
    own = fspace.GPClassifier(kernel="matern", class_weight={"a": 1.0, "b": 2.0, "c": 1.0})
    try:
        own.partial_fit(X, y, classes=["a", "b", "c"])
    except OptionError as error:
        pytest.fail(f"what the message advises is refused: {error}")
    assert own.predict_proba(X).shape == (6, 3)


def test_grid_search_and_pipeline(cancer):
    X, _, y, _ = cancer
    search = GridSearchCV(
        make_pipeline(StandardScaler(), fspace.GPClassifier(inducing=32)),
        {"gpclassifier__kernel": ["matern", "rbf"]},
        cv=2,
    ).fit(X[:150], y[:150])
    assert search.best_score_ > 0.85


def test_a_saved_classifier_predicts_the_same_in_another_process(cancer, plain, tmp_path):
    X_test = cancer[1]
    plain.save(tmp_path / "m.fspace")
    np.save(tmp_path / "x.npy", X_test)
    script = (
        "import sys, numpy as np, fspace; m = fspace.load(sys.argv[1]); "
        "np.save(sys.argv[3], m.predict_proba(np.load(sys.argv[2]))); print(type(m).__name__, m.classes_)"
    )
    files = [str(tmp_path / name) for name in ("m.fspace", "x.npy", "p.npy")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "GPClassifier [0 1]"
    assert np.array_equal(np.load(files[2]), plain.predict_proba(X_test))


@pytest.mark.parametrize(
    "labels", [np.array(["a", "b", "c"] * 20), np.array(["a", "b", "c"] * 20, dtype=object)]
)
def test_saved_text_labels_keep_their_type(labels, tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 2))
    model = fspace.GPClassifier(kernel="rbf", inducing=20).fit(X, labels)
    again = fspace.load(model.save(tmp_path / "m.fspace"))
    assert again.classes_.dtype == model.classes_.dtype and (again.predict(X) == model.predict(X)).all()


X3 = np.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (["a"] * 6, "one class only"),
        ([0, 1, np.nan, 0, 1, 0], "row 2"),
        ([0, 1, None, 0, 1, 0], "row 2"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.61], "continuous|Unknown label"),
        ([0, 1, 0], "6 rows, but y has 3"),
        (["a", 1, "b", 2, "a", 1], "mixes labels"),
        (np.array([b"a", b"b"] * 3), "whole numbers"),
        ([[1, 2], [3]] * 3, "differ in length"),
        ([], "got shape"),
        (3, "got shape"),
        (np.ma.MaskedArray([0, 1] * 3, mask=[0, 0, 1, 0, 0, 0]), "row 2"),
        (np.ma.MaskedArray(["a", "b"] * 3, mask=[0, 0, 1, 0, 0, 0]), "row 2"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(y, words):
    with pytest.raises(DataError, match=words):
        fspace.GPClassifier().fit(X3, y)


@pytest.mark.parametrize(
    ("options", "fit", "words"),
    [
        ({"class_weight": "even"}, {}, "class_weight"),
        ({"class_weight": {0: -1.0}}, {}, "positive"),
        ({"class_weight": np.ones(2)}, {}, "class_weight"),
        ({"kernel": "cubic"}, {}, "kernel"),
        ({}, {"sample_weight": [1.0] * 5}, "sample_weight"),
        ({}, {"sample_weight": [1.0, np.nan] * 3}, "row 1"),
        ({}, {"sample_weight": [0.0] * 6}, "not zero everywhere"),
    ],
)
def test_options_and_weights_that_cannot_be_used_are_refused(options, fit, words):
    with pytest.raises(FspaceError, match=words):
        fspace.GPClassifier(**options).fit(X3, [0, 1, 0, 1, 0, 1], **fit)


@pytest.mark.parametrize(
    "y",
    [
        [0.0, 1, 0.0, 1, 0.0, 1],
        pd.Series([0, 1] * 3, dtype=object),
        torch.tensor([0.0, 1.0] * 3, requires_grad=True),
    ],
    ids=["whole numbers of two kinds", "whole numbers as objects", "a tensor with a gradient"],
)
def test_labels_in_other_containers_are_read(y):
    assert fspace.GPClassifier(kernel="matern").fit(X3, y).classes_.tolist() == [0, 1]


def test_weights_beside_a_constant_column():
    """The weighted variance of a constant column, as scikit-learn computes it, may be less than zero."""
    X = np.column_stack([np.full(29, -1e12), np.linspace(-1, 1, 29)])
    weight = np.random.default_rng(0).uniform(0.1, 3.0, 29)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaling = input_scaling(X, warp=False, weight=weight)
    assert scaling["scale"][0] == 1.0 and np.isfinite(scaling["scale"]).all()


def test_all_classes_are_named_once():
    for classes, words in (([0, "a", None], "one kind"), ([0, 1, np.nan], "missing"), ([0, [1]], "classes")):
        with pytest.raises(OptionError, match=words):
            fspace.GPClassifier(kernel="matern").partial_fit(
                X3, [0, 1] * 3, classes=np.array(classes, dtype=object) if "a" in classes else classes
            )
    model = fspace.GPClassifier(kernel="matern").partial_fit(X3, [0, 1] * 3, classes=[0, 1, 2])
    model.partial_fit(X3, [2, 1] * 3, classes=[2, 1, 0])
    with pytest.raises(OptionError, match="first call"):
        model.partial_fit(X3, [0, 1] * 3, classes=[0, 1])


@pytest.mark.parametrize(
    "labels", [pd.to_timedelta([1, 2] * 3, unit="s"), pd.to_datetime(["2020-01-01", "2021-01-01"] * 3)]
)
def test_saved_dates_and_durations_come_back(labels, tmp_path):
    model = fspace.GPClassifier(kernel="matern").fit(X3, pd.Series(labels))
    again = fspace.load(model.save(tmp_path / "m.fspace"))
    assert again.classes_.dtype == model.classes_.dtype and (again.classes_ == model.classes_).all()


def test_saved_class_weights_keep_their_labels(tmp_path):
    model = fspace.GPClassifier(kernel="matern", class_weight={np.int64(0): 1.0, 1: 2.0}).fit(X3, [0, 1] * 3)
    again = fspace.load(model.save(tmp_path / "m.fspace"))
    assert again.class_weight == {0: 1.0, 1: 2.0}
    again.fit(X3, [0, 1] * 3)  # the options serve another fit


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["matern", "deep"])
def test_a_fit_on_the_gpu_predicts_as_one_on_the_cpu(cancer, kernel):
    X, X_test, y, _ = cancer
    probs = [
        fspace.GPClassifier(kernel=kernel, members=1, device=device).fit(X, y).predict_proba(X_test)
        for device in ("cpu", "cuda")
    ]
    assert np.abs(probs[0] - probs[1]).max() < (1e-4 if kernel == "matern" else 0.1)


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_a_file_that_names_other_classes_than_its_model_has_is_refused(plain, tmp_path, labels):
    path = plain.save(tmp_path / "m.fspace")
    with zipfile.ZipFile(path) as archive:
        header, tensors = json.loads(archive.read("model.json")), archive.read("model.safetensors")
    header["classes"] = {**header["classes"], "values": labels, "dtype": "<U1"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", json.dumps(header))
        archive.writestr("model.safetensors", tensors)
    with pytest.raises(ModelFileError, match="classes"):
        fspace.load(path)


def test_a_prior_that_nothing_moves_does_not_pass_for_a_posterior():
    """It would predict every class alike, at the accuracy of a guess, without a word."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 2))
    y = np.digitize(X[:, 0], [-0.4, 0.4])
    fits = {}
    for variance in (30.0, 1e12):
        kernel = ScaleKernel(RBFKernel()).double().requires_grad_(False)
        kernel.outputscale = variance
        fits[variance] = fspace.GPClassifier(kernel=kernel, progress=False)
    assert fits[30.0].fit(X, y).score(X, y) > 0.8
    with pytest.raises(NumericalError, match="No step from the prior raises the bound"):
        fits[1e12].fit(X, y)
