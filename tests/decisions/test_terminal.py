"""`fspace decide` as a person meets it: what is written, and what is refused in one line."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

import fspace
from fspace.decisions import Newsvendor, best_action, select


@pytest.fixture
def run(terminal, monkeypatch, tmp_path):
    """`fspace decide` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(terminal, "decide")


def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"size": rng.uniform(0, 1, n), "age": rng.uniform(0, 1, n)})
    return frame, np.sin(4 * frame["size"]) + frame["age"]


@pytest.fixture
def model(tmp_path):
    frame, y = table()
    fitted = fspace.GPRegressor(kernel="rbf", progress=False).fit(frame[:30], y[:30])
    fitted.save(tmp_path / "model.fspace")
    frame.assign(name=[f"r{i}" for i in range(60)])[["age", "name", "size"]].to_csv(
        tmp_path / "pool.csv", index=False
    )
    return fitted


def test_rank(run, model, tmp_path):
    status, out, err = run(
        "rank", "model.fspace", "pool.csv", "--k", 5, "--criterion", "eig", "--out", "next.csv"
    )
    assert status == 0, err
    found = pd.read_csv(tmp_path / "next.csv")
    frame, _ = table()
    assert found["row"].tolist() == select(model, frame, 5, "eig").index.tolist()
    assert found["name"].tolist() == [f"r{i}" for i in found["row"]]
    assert np.allclose(found["size"], frame["size"].iloc[found["row"]])
    assert (tmp_path / "next.png").stat().st_size > 5000 and "next.png" in out
    assert run("rank", "model.fspace", "pool.csv", "--out", "next.csv")[0] == 2  # nothing is written over


def test_act(run, model, tmp_path):
    (tmp_path / "u.json").write_text('{"newsvendor": {"underage": 4, "overage": 1}}')
    status, _, err = run("act", "model.fspace", "pool.csv", "--utility", "u.json", "--out", "orders.csv")
    assert status == 0, err
    want = best_action(model, table()[0], None, Newsvendor(4.0, 1.0))
    assert np.allclose(pd.read_csv(tmp_path / "orders.csv")["action"], want.action)
    (tmp_path / "u.json").write_text('{"payoff": {"amounts": [0, 1], "worst_share": 0.1}}')
    assert run("act", "model.fspace", "pool.csv", "--utility", "u.json", "--out", "bets.csv")[0] == 0
    assert set(pd.read_csv(tmp_path / "bets.csv")["action"]) <= {0, 1}


def test_act_on_classes(run, tmp_path):
    frame, y = table()
    label = np.where(y > y.median(), "ill", "well")
    fspace.GPClassifier(kernel="rbf", progress=False).fit(frame, label).save(tmp_path / "c.fspace")
    frame.to_csv(tmp_path / "data.csv", index=False)
    costs = {"treat": {"well": 1, "ill": 0}, "wait": {"ill": 9, "well": 0}}
    (tmp_path / "u.json").write_text(json.dumps({"costs": costs}))
    status, _, err = run("act", "c.fspace", "data.csv", "--utility", "u.json", "--out", "do.csv")
    assert status == 0, err
    probs = fspace.load(tmp_path / "c.fspace").predict_proba(frame)[:, 0]
    assert (pd.read_csv(tmp_path / "do.csv")["action"] == np.where(probs > 0.1, "treat", "wait")).all()


def test_ask_and_tell_through_a_table(run, tmp_path):
    space = {
        "settings": {"x": {"between": [0, 1]}, "kind": {"choices": ["a", "b"]}},
        "constraints": ["x <= 0.8"],
    }
    (tmp_path / "space.json").write_text(json.dumps(space))
    common = ["tried.csv", "--space", "space.json", "--goal", "loss=minimize", "--overwrite"]
    status, _, err = run("next", *common, "--count", 5, "--out", "next.csv")
    assert status == 0, err
    tried = pd.read_csv(tmp_path / "next.csv")
    tried["loss"] = (tried["x"] - 0.6) ** 2 + 0.3 * (tried["kind"] == "a")
    tried.loc[4, "loss"] = np.nan  # still running
    for _ in range(3):
        tried.to_csv(tmp_path / "tried.csv", index=False)
        status, out, err = run("next", *common, "--out", "next.csv")
        assert status == 0, err
        new = pd.read_csv(tmp_path / "next.csv")
        assert (new["x"] <= 0.8 + 1e-6).all() and "next.png" in out
        new["loss"] = (new["x"] - 0.6) ** 2 + 0.3 * (new["kind"] == "a")
        tried = pd.concat([tried, new])
    assert len(tried.drop_duplicates(["x", "kind"])) == len(tried)
    (tmp_path / "none yet.csv").write_text("x,kind,loss\n")
    status, out, err = run("next", "none yet.csv", *common[1:], "--out", "first.csv")
    assert status == 0 and "No row of 'none yet.csv' has results" in out, err
    status, _, err = run("next", *common, "--model", "neural", "--out", "next.csv")
    assert status == 0, err
    assert not pd.read_csv(tmp_path / "next.csv").equals(new[["x", "kind"]])
    status, _, err = run("next", *common, "--model", "oracle", "--out", "next.csv")
    assert status == 2 and "'oracle' does not exist" in err
    assert (tmp_path / "next.png").exists()


def test_refusals(run, model, tmp_path):
    (tmp_path / "u.json").write_text('{"newsvendor": {"underage": 4}}')
    (tmp_path / "space.json").write_text(
        '{"settings": {"x": {"between": [0, 1]}}, "constraints": ["x >= 2"]}'
    )
    (tmp_path / "bad.csv").write_text("size,years\n1,2\n3,4\n")
    (tmp_path / "tried.csv").write_text("x,y\n0.5,1\n7,2\n")
    for words, command in {
        "does not fit": ["act", "model.fspace", "pool.csv", "--utility", "u.json", "--out", "o.csv"],
        "cannot be read": ["act", "model.fspace", "pool.csv", "--utility", "none.json", "--out", "o.csv"],
        "age": ["rank", "model.fspace", "bad.csv", "--out", "o.csv"],
        "No setting": ["next", "t.csv", "--space", "space.json", "--goal", "y", "--out", "o.csv"],
        "--goal": ["next", "t.csv", "--space", "space.json", "--out", "o.csv"],
        "ends in": ["rank", "model.fspace", "pool.csv", "--out", "o.txt"],
    }.items():
        status, _, err = run(*command)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, (words, err)
    (tmp_path / "space.json").write_text('{"settings": {"x": {"between": [0, 1]}}}')
    status, _, err = run("next", "tried.csv", "--space", "space.json", "--goal", "y", "--out", "o.csv")
    assert status == 2 and "row 1" in err and not (tmp_path / "o.csv").exists()


@pytest.mark.parametrize(
    "utility, words",
    [
        (
            {"payoff": {"amounts": [0, 1], "aversoin": 5}},
            "'aversoin' means nothing here. Did you mean 'aversion'",
        ),
        ({"payoff": {"amounts": [0, 1], "aversion": 1, "worst_share": 0.1}}, "one of them"),
        ({"newsvendor": {"underage": 4, "overage": 1, "salvage": 2}}, "'salvage'"),
    ],
)
def test_nothing_in_a_utility_file_is_ignored(run, model, tmp_path, utility, words):
    """Ignored, a slip of the pen would be a risk-neutral choice under the name of a cautious one."""
    (tmp_path / "u.json").write_text(json.dumps(utility))
    status, _, err = run("act", "model.fspace", "pool.csv", "--utility", "u.json", "--out", "o.csv")
    assert status == 2 and words in err and not (tmp_path / "o.csv").exists()


def test_costs_of_classes_that_are_not_there(run, tmp_path):
    frame, y = table()
    label = np.where(y > y.median(), "ill", "well")
    fspace.GPClassifier(kernel="rbf", progress=False).fit(frame, label).save(tmp_path / "c.fspace")
    frame.to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "u.json").write_text(json.dumps({"costs": {"treat": {"well": 1, "ill": 0, "dead": 3}}}))
    status, _, err = run("act", "c.fspace", "data.csv", "--utility", "u.json", "--out", "o.csv")
    assert status == 2 and "'dead'" in err


@pytest.mark.parametrize(
    "space, goal, words",
    [
        ({"constrains": ["x <= 0.1"]}, "y=minimize", "Did you mean 'constraints'"),
        ({"constraints": "x <= 0.1"}, "y=minimize", "must be a list"),
        ({}, "x=maximize", "is a setting"),
    ],
)
def test_nothing_in_a_space_file_is_ignored(run, tmp_path, space, goal, words):
    """Experiments that a misspelt constraint forbids would be proposed."""
    (tmp_path / "space.json").write_text(json.dumps({"settings": {"x": {"between": [0, 1]}}, **space}))
    status, _, err = run("next", "t.csv", "--space", "space.json", "--goal", goal, "--out", "o.csv")
    assert status == 2 and words in err and not (tmp_path / "o.csv").exists()


def test_a_pool_with_columns_called_row_and_gain(run, model, tmp_path):
    """A name that is written twice cannot be read back."""
    table()[0].assign(row="mine", gain=7).to_csv(tmp_path / "pool.csv", index=False)
    status, out, err = run("rank", "model.fspace", "pool.csv", "--k", 5, "--out", "next.csv")
    assert status == 0 and "'row_'" in out and "'gain_'" in out, err
    found = pd.read_csv(tmp_path / "next.csv")
    assert found.columns.tolist() == ["row_", "gain_", "size", "age", "row", "gain"]
    assert found["row"].eq("mine").all() and found["gain"].eq(7).all()
    assert np.allclose(found["size"], table()[0]["size"].iloc[found["row_"]])


def test_whole_numbers_of_a_space_file_include_the_last(run, tmp_path):
    (tmp_path / "space.json").write_text('{"settings": {"n": {"whole": [1, 2]}}}')
    (tmp_path / "t.csv").write_text("n,y\n1,0.5\n")
    status, _, err = run("next", "t.csv", "--space", "space.json", "--goal", "y", "--out", "o.csv")
    assert status == 0 and pd.read_csv(tmp_path / "o.csv")["n"].tolist() == [2], err


def test_a_count_that_is_none(run, model):
    status, _, err = run("rank", "model.fspace", "pool.csv", "--k", 0, "--out", "o.csv")
    assert status == 2 and "k=0: how many rows to choose" in err
