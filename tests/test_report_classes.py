"""The terminal's classification and counts, from a file to the report."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris

from fspace import class_plots
from fspace.errors import DataError
from fspace.predictive import Categorical
from fspace.runs import FitRun, fit_table, predict_table
from fspace.scores import class_baseline_scores, class_scores


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A file of iris with text labels, and the results of its fit."""
    folder = tmp_path_factory.mktemp("flowers")
    data = load_iris(as_frame=True)
    table = data.frame.drop(columns="target").assign(species=data.target_names[data.target])
    table.to_csv(folder / "flowers.csv", index=False)
    run = FitRun(
        str(folder / "flowers.csv"), ["species"], "classification", out=str(folder / "out"),
        options={"kernel": "rbf", "likelihood": "auto"},
    )  # fmt: skip
    return folder, fit_table(run, quiet=True)


def test_everything_is_measured_and_written(flowers):
    folder, results = flowers
    scores = results["metrics"]["species"]
    assert scores["accuracy"] > 0.9 and scores["log_likelihood"] > -0.35
    assert results["baseline"]["species"]["accuracy"] < 0.5
    assert json.loads((folder / "out" / "metrics.json").read_text())["task"] == "classification"
    assert "likelihood" not in results["options"]
    page = (folder / "out" / "report.html").read_text()
    for words in ("accuracy", "calibration error", "handed to a person", "frequencies only"):
        assert words in page
    assert page.count("data:image/png") >= 6


def test_predictions_name_the_class_and_its_probability(flowers):
    folder, _ = flowers
    summary = predict_table(
        str(folder / "out"), str(folder / "flowers.csv"), str(folder / "p.csv"), quiet=True
    )
    table = pd.read_csv(folder / "p.csv")
    assert summary["rows"] == 150 and set(table["predicted"]) == {"setosa", "versicolor", "virginica"}
    shares = table[["p_setosa", "p_versicolor", "p_virginica"]].to_numpy()
    assert np.allclose(shares.sum(1), 1) and (table["mutual_information"] >= 0).all()
    truth = pd.read_csv(folder / "flowers.csv")["species"]
    assert (table["predicted"] == truth).mean() > 0.93


def test_counts_are_told_apart_from_densities(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 3, 150)
    pd.DataFrame({"x": x, "calls": rng.poisson(np.exp(x))}).to_csv(tmp_path / "calls.csv", index=False)
    run = FitRun(
        str(tmp_path / "calls.csv"), ["calls"], out=str(tmp_path / "out"),
        options={"kernel": "rbf", "likelihood": "poisson"},
    )  # fmt: skip
    results = fit_table(run, quiet=True)
    ours, simple = results["metrics"]["calls"], results["baseline"]["calls"]
    assert simple["log_likelihood"] < ours["log_likelihood"] < 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "poisson observations" in page and "shares of their counts" in page


def test_scores_of_classes_by_hand():
    probs = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    scores = class_scores(labels, Categorical(probs))
    assert scores["accuracy"] == 0.75
    assert scores["log_likelihood"] == pytest.approx(np.log([0.8, 0.6, 0.1, 0.7]).mean())
    assert scores["brier"] == pytest.approx(np.mean([0.08, 0.32, 1.62, 0.18]))
    assert scores["ece"] == pytest.approx(np.mean([0.2, 0.4, 0.9, 0.3]))
    simple = class_baseline_scores(labels, np.array([0, 0, 0, 1]), 2)
    assert simple["log_likelihood"] == pytest.approx(np.log([4 / 6, 2 / 6, 2 / 6, 2 / 6]).mean())


def test_class_plots_say_what_they_show():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 200)
    labels = (probs.cumsum(1) > rng.random((200, 1))).argmax(1)
    predictive = Categorical(probs)
    ax = class_plots.reliability(labels, predictive)
    assert "are right" in ax.get_title(loc="left")
    ax = class_plots.confusion(labels, predictive, ["a", "b", "c"])
    right = int((probs.argmax(1) == labels).sum())
    assert ax.get_title(loc="left") == f"{right} of 200 rows are right"
    ax = class_plots.accuracy_rejection(labels, predictive)
    blue = next(line for line in ax.lines if line.get_label() == "least certain first")
    assert blue.get_ydata()[-1] == pytest.approx(right / 200)
    with pytest.raises(DataError):
        class_plots.reliability(labels[:5], predictive)
