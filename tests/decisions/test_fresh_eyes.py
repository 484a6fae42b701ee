"""What a newcomer meets in the decision layer: slips of the pen, and things of the wrong kind, said by name."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import fspace
from fspace.compare import command as compare_command
from fspace.compare import pictures
from fspace.compare.results import Results
from fspace.decisions import (
    ArmPosterior,
    Bandit,
    CostMatrix,
    CVaR,
    GymCartPole,
    GymPendulum,
    Linear,
    Newsvendor,
    Optimizer,
    Pendulum,
    Space,
    best_action,
    learning_curve,
    linear_basis,
    off_policy_value,
    plots,
    select,
)
from fspace.decisions.rejecting import losses_of
from fspace.errors import DataError, ModelFileError, OptionError, UtilityError


@pytest.fixture
def run(terminal, tmp_path, monkeypatch):
    """`terminal` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return terminal


SPACE = {"settings": {"x": {"between": [0, 1]}, "n": {"whole": [1, 3]}}}
NEXT = ["decide", "next", "tried.csv", "--space", "space.json", "--out", "o.csv"]


@pytest.fixture
def tried(tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    frame = pd.DataFrame({"x": np.linspace(0, 1, 7), "n": [1, 2, 3, 1, 2, 3, 1]})
    frame["loss"] = (frame["x"] - 0.4) ** 2
    frame.to_csv(tmp_path / "tried.csv", index=False)
    return frame


# ---- the next experiments, by table


def test_a_misspelt_table_is_not_a_new_start(run, tried, tmp_path):
    misspelt = [*NEXT, "--goal", "loss"]
    misspelt[2] = "tired.csv"
    status, _, err = run(*misspelt)
    assert status == 2 and "'tired.csv', but 'tried.csv'" in err and not (tmp_path / "o.csv").exists()
    tried[["x", "n"]].to_csv(
        tmp_path / "tried.csv", index=False
    )  # holds no results: nothing would be left out
    status, out, err = run(*misspelt)
    assert status == 0 and "There is no file 'tired.csv'" in out and "1 experiment is in o.csv" in out, err


def test_a_new_table_begins_anew_and_says_so(run, tried):
    status, out, err = run(
        *["decide", "next", "summer.csv", "--space", "space.json", "--out", "o.csv"],
        "--goal",
        "loss",
        "--count",
        2,
    )
    assert status == 0 and "There is no file 'summer.csv'" in out and "2 experiments are in o.csv" in out, err


@pytest.mark.parametrize(
    "column, goals, words",
    [
        ("lose", ["loss"], ["'loss'", "Did you mean 'lose'"]),
        ("loss", ["loss=maximize", "loss=minimize"], ["loss is given twice"]),
    ],
)
def test_misspelt_columns_and_goals_given_twice(run, tried, tmp_path, column, goals, words):
    tried.rename(columns={"loss": column}).to_csv(tmp_path / "tried.csv", index=False)
    status, _, err = run(*NEXT, *(part for goal in goals for part in ("--goal", goal)))
    assert status == 2 and all(word in err for word in words), err


@pytest.mark.parametrize(
    "n, loss, words",
    [
        (4, 0.1, "row 2: n=4 is outside the whole numbers from 1 to 3."),
        (3, np.inf, "row 2: loss is inf. Remove the row of an experiment that failed"),
    ],
)
def test_a_row_that_cannot_be_is_said_as_a_row(run, tried, tmp_path, n, loss, words):
    tried.loc[2, ["n", "loss"]] = n, loss
    tried.astype({"n": int}).to_csv(tmp_path / "tried.csv", index=False)
    status, _, err = run(*NEXT, "--goal", "loss")
    assert status == 2 and words in err, err


def test_a_count_is_refused_by_its_own_name(run, tried):
    status, _, err = run(*NEXT, "--goal", "loss", "--count", 0)
    assert status == 2 and "count=0" in err


def test_names_with_spaces_and_units_in_constraints(run, tmp_path):
    space = Space(
        {"temperature (°C)": (0.0, 100.0), "äpfel": (0.0, 1.0)}, ["`temperature (°C)` + 20*äpfel <= 50"]
    )
    rows = space.decode(space.sample(50, 0))
    assert max(row["temperature (°C)"] + 20 * row["äpfel"] for row in rows) <= 50 + 1e-6
    with pytest.raises(OptionError, match="between backticks"):
        Space({"temperature (°C)": (0.0, 100.0)}, ["temperature (°C) <= 50"])


# ---- tasks


@pytest.mark.parametrize("task", [Pendulum, GymPendulum, GymCartPole])
@pytest.mark.parametrize("action, at", [(float("nan"), 0.1), (float("inf"), 0.1), (0.0, float("nan"))])
def test_a_step_from_nan_or_by_nan_is_refused(task, action, at):
    if task is not Pendulum:
        pytest.importorskip("gymnasium")
    one = task()
    state = one.reset(np.random.default_rng(0))
    assert np.isfinite(one.step(state, 0.5)).all()
    state[0] = at
    with pytest.raises(DataError, match="finite"):
        one.step(state, action)
    with pytest.raises(DataError, match="finite numbers"):
        one.step(np.zeros(5), 0.0)


# ---- the wrong utility, the wrong model


X = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def models():
    two = torch.stack([X[:, 0], -X[:, 1]], 1)
    return {
        "numbers": fspace.GPRegressor(kernel="rbf", progress=False).fit(X, X[:, 0]),
        "two": fspace.GPRegressor(kernel="rbf", progress=False).fit(X, two),
        "classes": fspace.GPClassifier(kernel="rbf", progress=False).fit(X, X[:, 0] > 0.5),
    }


@pytest.mark.parametrize(
    "kind, actions, utility, risk, words",
    [
        ("classes", [0.0, 1.0], Linear(), None, "Linear is for numbers"),
        ("classes", [0.0, 1.0], Linear(), CVaR(0.1), "Linear is for numbers"),  # payoffs of class positions
        ("classes", None, Newsvendor(1.0, 2.0), None, "Newsvendor is for numbers"),
        ("classes", [0.0, 2.0], CostMatrix([[0, 1], [1, 0]]), None, "positions of its 2 rows"),
        ("classes", [0.5], CostMatrix([[0, 1], [1, 0]]), None, "positions of its 2 rows"),
        ("numbers", None, CostMatrix([[0, 1], [1, 0]]), CVaR(0.1), "for classes"),
        ("numbers", [[0.0, 1.0]], Linear(), None, r"must be numbers \[a\]"),
        ("numbers", ["all", "none"], Linear(), None, r"must be numbers \[a\]"),
        ("two", [0.0, 1.0], Linear(), None, r"\[a, 2\]"),
        ("two", None, Newsvendor(1.0, 2.0), None, "one output, but the model predicts 2"),
    ],
)
def test_utilities_that_are_not_of_the_model(models, kind, actions, utility, risk, words):
    with pytest.raises(OptionError, match=words):
        best_action(models[kind], X[:3], actions, utility, risk)


def test_a_payoff_that_overflows_its_mean_is_refused(models):
    with pytest.raises(UtilityError, match="at most 1e"):
        best_action(models["numbers"], X[:3], [1.0, 2.0], lambda action, y: y.exp() * 1e307)


def test_losses_of_other_rows(models):
    with pytest.raises(DataError, match="y has shape"):
        losses_of(models["numbers"].predictive(X[:3]), [1.0])
    with pytest.raises(DataError, match="y has shape"):
        losses_of(models["classes"].predictive(X[:3]), [1, 0])


def test_arms_of_a_log_are_whole():
    with pytest.raises(DataError, match="whole numbers"):
        off_policy_value([1.0, 0.0], [0.7, 1.0], [0.5, 0.5], [[0.5, 0.5]] * 2, method="ips")


def test_whole_numbers_beyond_floats_are_refused():
    with pytest.raises(DataError, match="too large"):
        fspace.GPRegressor(progress=False).fit([[10**400, 1], [2, 3]], [1.0, 2.0])


def test_counts_that_no_array_has():
    with pytest.raises(OptionError, match="initial must be below 2\\^63"):
        Optimizer({"x": (0.0, 1.0)}, initial=10**400)


NAMES = np.array(["variance", "bald"])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda model: select(model, X, 2, NAMES), "criterion"),
        (lambda model: select(model, X, 2, duplicates=NAMES), "duplicates"),
        (lambda model: learning_curve(list, X, X[:, 0], float, NAMES), "criterion"),
        (lambda model: Bandit(ArmPosterior(linear_basis(2), 2), NAMES), "policy"),
    ],
)
def test_several_names_where_one_is_asked(models, call, words):
    with pytest.raises(OptionError, match=f"{words}=array.* does not exist"):
        call(models["numbers"])


# ---- journals and models of another kind


@pytest.mark.parametrize(
    "lines, words",
    [
        (["[1]"], "line 1"),
        (['{"id": 0, "reward": 1}'], "line 1"),
        (['{"id": 0, "context": [1, 2], "arm": 0}', '{"id": 0, "reward": "a"}'], "line 2"),
        (['{"id": 0, "context": [1, 2], "arm": 0}', '{"id": 0, "reward": NaN}'], "line 2"),
        (['{"id": "0", "context": [1, 2], "arm": "x"}'], "line 1"),
        (['{"id": 0, "context": ["a"], "arm": 1}'], "line 1"),
    ],
)
def test_a_journal_of_something_else(tmp_path, lines, words):
    """A reward that is NaN would be in every later decision."""
    (tmp_path / "j").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ModelFileError, match=words):
        Bandit(ArmPosterior(linear_basis(2), 2), journal=tmp_path / "j")


@pytest.mark.parametrize("acquisition", ["auto", "thompson"])
@pytest.mark.parametrize("kind, words", [("two", "2 outputs"), ("classes", "classes")])
def test_an_outcome_is_one_number(models, acquisition, kind, words):
    box = {"x": (0.0, 1.0), "z": (0.0, 1.0)}
    optimizer = Optimizer(box, model=lambda z, y: models[kind].posterior_, acquisition=acquisition, initial=2)
    optimizer.tell(optimizer.ask(2), [1.0, 2.0])
    with pytest.raises(OptionError, match=f"predicts {words}"):
        optimizer.ask()
    assert optimizer.pending == []
    assert "minimize y; 2 told" in repr(optimizer)


# ---- what the types forbid: a user has no checker of types


UNTYPED = """
import numpy as np
import fspace
from fspace.decisions import (
    ArmPosterior, Bandit, CVaR, GPArms, Linear, MeanVariance, NeuralLinear, Newsvendor, Optimizer, Pendulum, Reject,
    best_action, conformal_threshold, learn_to_control, learning_curve, linear_basis, optimize, optimize_latent, select,
    selective_threshold,
)
from fspace.errors import FspaceError

box, pool = {"x": (0.0, 1.0)}, np.random.default_rng(0).random((20, 3))
known = fspace.GPRegressor(kernel="rbf", progress=False).fit(pool, pool[:, 0])
for call in (
    lambda: optimize(3, box),
    lambda: optimize(box, box),
    lambda: optimize_latent("f", pool),
    lambda: learn_to_control(Pendulum(), None),
    lambda: learning_curve(None, pool, pool[:, 0], len),
    lambda: learning_curve(len, pool, pool[:, 0], 1.0),
    lambda: learning_curve(len, pool, pool[:5, 0], len),
    lambda: learning_curve(len, pool, pool[:, 0], len, batch=2.5),
    lambda: learning_curve(len, pool, pool[:, 0], len, seed=-1),
    lambda: Newsvendor("1", 2.0),
    lambda: Newsvendor(1e200, 2.0),
    lambda: CVaR(None),
    lambda: MeanVariance("a"),
    lambda: Reject(None),
    lambda: conformal_threshold([0.1] * 9, [0] * 9, "0.5"),
    lambda: conformal_threshold([0.1] * 9, [0] * 9, 0.5, most=np.inf),
    lambda: selective_threshold([0.1] * 9, [0] * 9, 0.5, None),
    lambda: linear_basis("2"),
    lambda: linear_basis(2, noise=0.0),
    lambda: linear_basis(2, prior_variance=np.nan),
    lambda: ArmPosterior("basis", 2),
    lambda: Bandit("arms"),
    lambda: Bandit(ArmPosterior(linear_basis(2), 2), width="2"),
    lambda: Bandit(ArmPosterior(linear_basis(2), 2), journal=3),
    lambda: Bandit(ArmPosterior(linear_basis(2), 2)).tell([np.inf], [1.0]),
    lambda: Bandit(ArmPosterior(linear_basis(2), 2)).choose([10**400, 1]),
    lambda: GPArms(2, 2, reward_scale="1"),
    lambda: NeuralLinear("2", 2),
    lambda: Optimizer(box, state=3),
    lambda: best_action(known, pool, "ab", Linear()),
    lambda: best_action(known, pool, 3, Linear()),
    lambda: best_action(known, pool, [1, 2], 3),
    lambda: best_action(known, pool, [1, 2], Linear(), "cvar"),
    lambda: select(known, pool, 1, seed="0"),
):
    try:
        call()
    except FspaceError as error:
        print(error)
"""


def test_functions_that_are_none():
    done = subprocess.run([sys.executable, "-c", UNTYPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 34, lines
    assert lines[0] == "f must be a function, not int (3)."
    assert "fit must be a function" in lines[3] and "score must be a function" in lines[5]
    assert "batch=2.5" in lines[7] and "seed=-1" in lines[8]


# ---- pictures


def test_pictures_of_decisions_can_be_read(models):
    """No words across a line, long names of actions on several lines, whole numbers of rows."""
    optimizer = Optimizer({"x": (0.0, 1.0)}, initial=2)
    optimizer.tell([{"x": 0.1 * k} for k in range(3)], [1.0 / (1 + k) for k in range(3)])
    ax = plots.convergence(optimizer)
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert not ax.texts and "the model is asked from 3 on" in words
    names = ["wait", "a treatment with a name that is far too long for one line"]
    decision = best_action(models["classes"], X[:9], None, CostMatrix([[0, 1], [1, 0]]))
    ax = plots.actions(decision, names)
    assert max(map(len, ax.get_yticklabels()[1].get_text().split("\n"))) <= 22
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_a_calibration_curve_says_who_has_too_few_rows():
    """Three rows in a bin: no point is drawn, and the legend says why."""
    row = {
        "dataset": "d",
        "task": "classification",
        "split": 0,
        "status": "ok",
        "scores": {},
        "rows": {"test": 40},
    }
    few, many = ([[0.9], [0.8], [count]] for count in (3, 40))
    rows = [row | {"method": "few", "calibration": few}, row | {"method": "many", "calibration": many}]
    ax = pictures.calibration_curves(Results(rows, ""), "d")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["few: too few rows", "many"]
    assert "15 rows or more" in ax.get_xlabel()


# ---- comparing


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_ctrl_c_says_how_to_go_on(run, tmp_path, monkeypatch, overwrite):
    """The first ends the fits, the second cuts through the page that is being written."""
    frame = pd.DataFrame({"x": np.arange(30.0), "y": np.sin(np.arange(30.0))})
    frame.to_csv(tmp_path / "t.csv", index=False)

    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "write_report", pressed)
    more = ["--overwrite"] if overwrite else []
    options = ["--target", "y", "--methods", "linear", "--splits", 1, "--jobs", 1, "--out", "there", *more]
    status, _, err = run("compare", "t.csv", *options)
    assert status == 130 and (tmp_path / "there" / "cells.jsonl").read_text().count("\n") == 1
    words = "the same command without --overwrite goes on" if overwrite else "the same command goes on"
    assert "finished fits are kept" in err and words in err


def test_a_table_too_short_to_split_is_refused(run, tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    status, _, err = run(
        "compare", "t.csv", "--target", "y", "--methods", "linear", "--jobs", 1, "--out", "there"
    )
    assert status == 2 and "t has 1 row; a split needs 2" in err, err


def test_where_all_fits_fail_the_reasons_are_told(run, tmp_path, monkeypatch):
    """No score of any method: the page and the terminal say why each failed."""
    from fspace.compare import cells

    def broken(*_, **__):
        raise DataError("the disk is full")

    monkeypatch.setattr(cells, "_fit", broken)
    pd.DataFrame({"x": np.arange(30.0), "y": np.sin(np.arange(30.0))}).to_csv(tmp_path / "t.csv", index=False)
    options = ["--target", "y", "--methods", "linear", "--splits", 2, "--jobs", 1, "--out", "there"]
    status, out, err = run("compare", "t.csv", *options)
    assert status == 0 and out.count("the disk is full") == 2 and "Open there/report.html" in out, err
