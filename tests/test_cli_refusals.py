"""Commands that would lose something, or wait for a fit that has no place to go, are refused before they start."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fspace
from fspace import estimators, runs
from fspace.data import read_table
from fspace.scores import shown

FIT = ["fit", "houses.csv", "--target", "price", "--kernel", "matern"]


@pytest.fixture
def houses(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    size, rooms = rng.uniform(20, 200, 40), rng.integers(1, 6, 40)
    price = 3.0 * size + 20.0 * rooms + rng.normal(0, 5.0, 40)
    pd.DataFrame({"size": size, "rooms": rooms, "price": price}).to_csv(tmp_path / "houses.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "houses.csv"


@pytest.fixture
def run(terminal, monkeypatch):
    """The terminal, with a stub of a report."""
    monkeypatch.setattr(runs, "write_report", lambda path, *_, **__: path.write_text("report"))
    return terminal


def refused(result, *words):
    """One clear line on stderr, nothing on stdout, status 2."""
    status, out, err = result
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err


@pytest.fixture
def no_fit(monkeypatch):
    """A fit would be seen."""
    monkeypatch.setattr(estimators.GPRegressor, "fit", lambda *_: pytest.fail("it was fitted first"))


@pytest.mark.parametrize(
    "length", [250, 300]
)  # the unfinished folder's name is longer than that of the folder
def test_folders_that_cannot_be_made_are_refused_before_the_fit(run, houses, no_fit, length):
    refused(run(*FIT, "--out", "o" * length), "cannot be made")
    assert os.listdir(houses.parent) == ["houses.csv"]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_refused_before_the_fit(run, houses, no_fit, seed):
    refused(run(*FIT, "--seed", seed), "seed", "whole number")


def test_results_never_replace_the_table_they_are_made_from(run, houses):
    assert run(*FIT, "--out", "m")[0] == 0
    before = houses.read_bytes()
    refused(run("predict", "m", "houses.csv", "--out", "houses.csv", "--overwrite"), "made from")
    refused(run("predict", "m", "houses.csv", "--out", "./m/../houses.csv", "--overwrite"), "made from")
    assert houses.read_bytes() == before
    again = [
        "fit",
        "m/predictions.csv",
        "--target",
        "observed",
        "--kernel",
        "matern",
        "--out",
        "m",
        "--overwrite",
    ]
    before = Path("m/predictions.csv").read_bytes()
    refused(run(*again), "m/predictions.csv", "made from")
    assert Path("m/predictions.csv").read_bytes() == before


@pytest.mark.parametrize("length", [250, 300])
def test_predictions_that_cannot_be_written(run, houses, length):
    assert run(*FIT, "--out", "m")[0] == 0
    refused(run("predict", "m", "houses.csv", "--out", "p" * length + ".csv"), "cannot be written")
    assert sorted(os.listdir()) == ["houses.csv", "m"]


def test_a_fit_that_fails_leaves_no_folder(run, houses, monkeypatch):
    def fails(*_):
        raise fspace.FspaceError("no")

    monkeypatch.setattr(estimators.GPRegressor, "fit", fails)
    refused(run(*FIT, "--out", "m"), "no")
    assert os.listdir(houses.parent) == ["houses.csv"]


def test_targets_are_checked_before_the_fit_and_named_by_their_row_in_the_file(run, houses, no_fit):
    table = read_table(houses)
    table["price"] = 3
    table.loc[17, "price"] = -1
    table.to_csv(houses, index=False)
    for seed in range(3):  # row 17 is held out, or has another number among those fitted
        refused(run(*FIT, "--likelihood", "poisson", "--seed", seed), "-1 (row 17)")


def test_noise_and_inducing_inputs_are_options_of_the_command(run, houses):
    chosen = ["--likelihood", "heteroscedastic", "--inference", "collapsed", "--inducing"]
    assert run(*FIT, *chosen, "0.01", "--out", "share")[0] == 0
    assert run(*FIT, *chosen, "5", "--out", "number")[0] == 0
    share, number = (fspace.load(f"{folder}/model.fspace") for folder in ("share", "number"))
    assert share.likelihood == number.likelihood == "heteroscedastic"
    assert share.inducing == 0.01 and number.inducing == 5 and isinstance(number.inducing, int)
    assert number.posterior_.site.shift.shape[-1] == 5
    refused(run(*FIT, "--likelihood", "cauchy"), "cauchy", "heteroscedastic")
    refused(run(*FIT, "--inducing", "0"), "inducing")
    refused(run(*FIT, "--inducing", "2.5"), "inducing")


def test_ctrl_c_in_a_running_command_writes_the_best_state(houses):
    command = [*FIT[:-1], "deep", "--members", "50", "--out", "m"]  # minutes, if nobody stopped it
    environment = os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fspace.cli", *command], cwd=houses.parent, env=environment
    )
    part = houses.parent / f".m.{platform.node()}.{process.pid}"
    while not part.exists() and process.poll() is None:  # made right before the fit
        time.sleep(0.01)
    time.sleep(4)  # the first member is under way, or done
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    model = fspace.load(houses.parent / "m" / "model.fspace")
    assert model.interrupted_ and not part.exists()
    frame = read_table(houses)
    assert len(model.predict(frame[["size", "rooms"]])) == len(frame)


def test_what_a_killed_run_left_is_removed_by_the_next(run, houses):
    environment = os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fspace.cli", *FIT[:-1], "deep", "--members", "50", "--out", "m"]
    process = subprocess.Popen(command, cwd=houses.parent, env=environment)
    left = houses.parent / f".m.{platform.node()}.{process.pid}"
    while not left.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL and left.is_dir()
    (left / "model.fspace").write_text("half")
    others = [
        houses.parent / name
        for name in (
            f".m.{platform.node()}.{os.getppid()}",  # it lives
            f".m.elsewhere.{process.pid}",  # on another machine
            f".n.{platform.node()}.{process.pid}",  # of another output
            f".m.{platform.node()}.notes",
        )
    ]
    for other in others:
        other.mkdir()
    assert run(*FIT, "--out", "m")[0] == 0
    assert not left.exists() and all(other.is_dir() for other in others)
    assert fspace.load(houses.parent / "m" / "model.fspace").predict([[50.0, 2.0]]).shape == (1,)


# ---- what a newcomer meets ----------------------------------------------------------------------------


def test_semicolons_are_named_and_never_guessed_at(run, houses, no_fit):
    table = pd.read_csv(houses)
    table.to_csv("ours.csv", index=False, sep=";", decimal=",")
    table.to_csv("packed.csv.gz", index=False, sep=";")
    for name in ("ours.csv", "packed.csv.gz"):
        refused(run("fit", name, "--target", "price"), "separated by semicolons", "sep=';'", name)
    table.assign(note="a;b").to_csv("fine.csv", index=False)  # semicolons in cells are no separators
    assert len(read_table("fine.csv").columns) == 4


def test_semicolons_in_a_table_to_predict(run, houses):
    assert run(*FIT, "--out", "m")[0] == 0
    pd.read_csv(houses).to_csv("ours.csv", index=False, sep=";")
    refused(run("predict", "m", "ours.csv", "--out", "p.csv"), "separated by semicolons")


@pytest.mark.parametrize(
    ("arguments", "words", "not_words"),
    [
        (
            ["--likelihood", "poisson"],
            ["--likelihood poisson is of whole", "such as --likelihood gamma"],
            "Poisson",
        ),
        (
            ["--likelihood", "beta"],
            ["--likelihood beta is of", "such as --likelihood gamma"],
            "BetaLikelihood",
        ),
        (
            ["--likelihood", "cauchy"],
            ["--likelihood cauchy does not", "--task classification"],
            "GPClassifier",
        ),
        (["--likelihood", "gamma", "--inference", "exact"], ["leave --inference auto"], "inference="),
        (["--kernel", "cubic"], ["--kernel cubic does not exist", "additive."], "gpytorch"),
        (["--members", "0"], ["--members 0 must"], "members="),
        (["--inducing", "2.5"], ["--inducing 2.5 must"], "inducing="),
        (["--seed", "-1"], ["--seed -1 must"], "seed="),
        (["--device", "tpu"], ["--device tpu is not"], "device="),
    ],
)
def test_advice_is_in_the_words_of_the_terminal(run, houses, arguments, words, not_words):
    result = run("fit", "houses.csv", "--target", "price", *arguments)
    refused(result, *words)
    assert not_words not in result[2]


def test_text_columns_are_answered_with_options(run, houses):
    table = pd.read_csv(houses)
    table.assign(town=["a", "b"] * 20).to_csv("towns.csv", index=False)
    result = run("fit", "towns.csv", "--target", "price")
    refused(result, "'town' holds text", "say so: --categorical town", "--drop town")
    assert "astype" not in result[2] and "categories=" not in result[2]
    table.assign(town=["a", "b"] * 20, street=["c", "d"] * 20).to_csv("towns.csv", index=False)
    refused(run("fit", "towns.csv", "--target", "price"), "--categorical town --categorical street", "--drop")
    empty = table.astype({"size": float})
    empty.loc[3, "size"] = np.nan
    empty.to_csv("empty.csv", index=False)
    result = run("fit", "empty.csv", "--target", "price")
    refused(result, "fspace fit --missing impute")
    assert "missing=" not in result[2]


def test_identifiers_are_met_with_drop(run, houses):
    table = pd.read_csv(houses)
    table.assign(code=[f"A{i}" for i in range(40)]).to_csv("codes.csv", index=False)
    refused(run("fit", "codes.csv", "--target", "price"), "as an identifier has", "--drop code")
    table.assign(house_id=range(100, 140)).to_csv("ids.csv", index=False)
    fit = ["fit", "ids.csv", "--target", "price", "--kernel", "matern"]
    status, _, err = run(*fit)
    assert status == 0 and "'house_id' looks like an identifier" in err and "--drop house_id" in err
    status, _, err = run(*fit, "--drop", "house_id")
    assert status == 0 and "identifier" not in err
    assert "identifier" not in run(*FIT)[2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (552312.7, "552,300"),
        (-1234567.0, "-1,235,000"),
        (9999.96, "10,000"),
        (1234.5, "1,234"),
        (999.96, "1,000"),
        (12.345, "12.35"),
        (0.00012345, "0.0001234"),
        (1.5e15, "1.5e+15"),
        (float("nan"), "n/a"),
    ],
)
def test_large_numbers_are_shown_as_people_write_them(value, text):
    assert shown("rmse", value) == text


# ---- classes -----------------------------------------------------------------------------------------


@pytest.fixture
def flowers(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    kind = np.repeat(["iris", "rose", "tulip"], [10, 20, 30])
    length = rng.normal(size=60) + 4.0 * (kind == "rose")
    pd.DataFrame({"length": length, "kind": kind}).to_csv(tmp_path / "flowers.csv", index=False)
    monkeypatch.chdir(tmp_path)


def test_rows_held_out_have_the_shares_of_the_classes(run, flowers):
    status, out, _ = run(
        "fit", "flowers.csv", "--target", "kind", "--task", "classification", "--kernel", "matern"
    )
    assert status == 0 and "accuracy" in out
    held = pd.read_csv("fspace-out/predictions.csv")
    assert held["observed"].value_counts().to_dict() == {"iris": 2, "rose": 4, "tulip": 6}
    status, out, _ = run("predict", "fspace-out", "flowers.csv", "--out", "new.csv")
    assert status == 0 and "mutual_information" in out


def test_a_regression_of_labels_points_to_classification(run, flowers):
    refused(run("fit", "flowers.csv", "--target", "kind"), "holds text", "--task classification")


def test_a_classification_of_numbers_warns_once_and_names_a_plain_value(run, houses):
    table = pd.read_csv("houses.csv")
    table.assign(price=np.arange(40.0)).to_csv("houses.csv", index=False)  # whole numbers may be classes
    status, _, err = run("fit", "houses.csv", "--target", "price", "--task", "classification")
    assert status == 2 and "np.float64" not in err
    assert err.count("Note: The number of unique classes") == 1


def test_empty_cells_in_a_prediction_name_the_command_that_fills_them(run, houses):
    assert run(*FIT)[0] == 0
    pd.DataFrame({"size": [1.0, None], "rooms": [2, 3]}).to_csv("holes.csv", index=False)
    refused(run("predict", "fspace-out", "holes.csv", "--out", "p.csv"), "fspace fit --missing impute")


def test_help_is_wrapped_anew(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run("fit", "--help")
    assert status == 0 and "ends the fit early: everything is written" in " ".join(out.split())
    assert "the fit early:\n" not in out
