"""What a newcomer meets in the decision layer: slips of the pen, and things of the wrong kind, said by name."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fspace import cli
from fspace.compare import command as compare_command
from fspace.decisions import GymCartPole, GymPendulum, Pendulum, Space
from fspace.errors import DataError, OptionError


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a command line in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["fspace", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return command


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


# ---- what the types forbid: a user has no checker of types


UNTYPED = """
import numpy as np
from fspace.decisions import Pendulum, learn_to_control, learning_curve, optimize, optimize_latent
from fspace.errors import FspaceError

box, pool = {"x": (0.0, 1.0)}, np.random.default_rng(0).random((20, 3))
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
    assert len(lines) == 9, lines
    assert lines[0] == "f must be a function, not int (3)."
    assert "fit must be a function" in lines[3] and "score must be a function" in lines[5]
    assert "batch=2.5" in lines[7] and "seed=-1" in lines[8]


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
