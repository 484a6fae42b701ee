"""Studies: the same seed, resuming, failures of every kind, budgets, splits and gaps."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import BayesianRidge, LogisticRegression

import fspace
from fspace.compare import cells, study
from fspace.compare.cells import Budget, Cell, Method, run_cell
from fspace.compare.problems import Dataset, InBetween, Table, Uci, digits, gap_rows, shrunk
from fspace.compare.study import Journal, Study
from fspace.errors import DataError, OptionError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # so that other processes find the module by its name
spec = importlib.util.spec_from_file_location("study_estimators", HERE / "study_estimators.py")
made = importlib.util.module_from_spec(spec)
sys.modules["study_estimators"] = made
spec.loader.exec_module(made)

rng = np.random.default_rng(0)
X, Y = rng.normal(size=(40, 3)), rng.normal(size=40)
TABLE = Table("small", X, Y, splits=2)
LABELS = np.where(X[:, 0] + 0.3 * rng.normal(size=40) > 0, "yes", "no")


def one(estimator, dataset=TABLE, budget=None, **method):
    return run_cell(Cell(dataset, 0, Method("it", estimator, **method), budget or Budget(20.0), 0))


def scores(results):
    return [(row["dataset"], row["split"], row["method"], row["scores"]) for row in results.rows]


# ---- results ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_table_and_another_does_not():
    methods = {"GP": fspace.GPRegressor(kernel="rbf"), "noisy": made.Noisy(), "line": BayesianRidge()}
    found = [Study([TABLE], methods, splits=1, seed=seed).run() for seed in (3, 3, 4)]
    assert scores(found[0]) == scores(found[1]) != scores(found[2])
    assert found[0].table("rmse").equals(found[1].table("rmse"))
    assert [row["status"] for row in found[0].rows] == ["ok"] * 3


def test_rows_are_tidy_and_tables_have_means_and_errors():
    results = Study([TABLE], {"a": made.Noisy(), "b": made.Noisy(spread=2.0)}).run()
    frame = results.frame()
    assert set(frame.columns) == {"dataset", "task", "split", "method", "status", "metric", "value"}
    rmse = frame[(frame.metric == "rmse") & (frame.method == "a")]["value"].to_numpy()
    table = results.table("rmse")
    assert table.loc["small", ("a", "mean")] == pytest.approx(rmse.mean())
    expected = rmse.std(ddof=1) * math.sqrt(1 / 2 + 8 / 32)  # splits of one table overlap
    assert table.loc["small", ("a", "error")] == pytest.approx(expected)
    with pytest.raises(DataError, match="no_such.*; there are .*rmse"):
        results.values("no_such")


def test_scores_are_what_the_metrics_say():
    problem = TABLE.problem(0)
    row = one(BayesianRidge())
    mean, std = BayesianRidge().fit(problem.x_train, problem.y_train).predict(problem.x_test, return_std=True)
    density = -0.5 * ((problem.y_test - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    assert row["scores"]["log_likelihood"] == pytest.approx(density.mean())
    assert "joint_log_likelihood" not in row["scores"]  # this one says nothing about points together
    joint = one(fspace.GPRegressor(kernel="rbf"))["scores"]["joint_log_likelihood"]
    assert math.isfinite(joint)


def test_classes_of_any_kind_and_rows_of_another_kind():
    outside = rng.normal(0, 5, (30, 3))
    table = Table("labels", X, LABELS, "classification", 2, outside=outside)
    row = run_cell(Cell(table, 0, Method("m", classifier=LogisticRegression()), Budget(20.0), 0))
    assert row["status"] == "ok" and row["scores"]["accuracy"] > 0.7
    problem = table.problem(0)
    model = LogisticRegression().fit(problem.x_train, problem.y_train)
    ours, theirs = (1 - model.predict_proba(x).max(1) for x in (problem.x_test, problem.outside))
    by_hand = np.mean((theirs[:, None] > ours) + 0.5 * (theirs[:, None] == ours))
    assert row["scores"]["auroc, largest probability"] == pytest.approx(by_hand)
    stated, hit, count = row["calibration"]
    assert sum(count) == 8 and np.dot(hit, count) / 8 == pytest.approx(row["scores"]["accuracy"])


def test_functions_are_kept_of_a_problem_with_probes():
    row = one(fspace.GPRegressor(kernel="rbf"), InBetween())
    kept = json.loads(json.dumps(row))["functions"]
    assert len(kept["probe_draws"]) == cells.DRAWS and len(kept["probe_mean"]) == 21 == len(
        kept["probe_covariance"]
    )
    lower, upper = np.array(kept["latent"])
    between, data = np.abs(kept["grid"]) < 0.3, np.abs(np.abs(kept["grid"]) - 1.3) < 0.3
    assert (upper - lower)[between].mean() > 3 * (upper - lower)[data].mean()
    drawn = np.array(kept["probe_draws"])
    error = np.sqrt(np.diag(kept["probe_covariance"]) / cells.DRAWS)
    assert (np.abs(drawn.mean(0) - kept["probe_mean"]) < 5 * error).all()


# ---- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator, status, words",
    [
        (made.Broken(), "failed", "RuntimeError: no way"),
        (made.NotFinite(), "diverged", "not finite at 1 of 8"),
        (made.SaysSo(), "diverged", "infinite in step 7"),
        (made.Silent(), "failed", "says nothing about its uncertainty"),
        (made.Leaves(), "failed", "SystemExit"),
    ],
)
def test_a_method_that_goes_wrong_is_reported(estimator, status, words):
    row = one(estimator)
    assert row["status"] == status and words in row["reason"]
    assert json.dumps(json.loads(json.dumps(row))) == json.dumps(row)  # as it was after a file


def test_a_diverged_fit_is_measured_where_it_can_be_but_does_not_count():
    results = Study([TABLE], {"well": made.Noisy(), "says so": made.SaysSo(), "broken": made.Broken()}).run()
    assert results.rows[1]["scores"]["rmse"] > 0
    values = results.values("rmse")
    assert values["well"].notna().all() and values[["says so", "broken"]].isna().all().all()
    assert [row["method"] for row in results.troubles()] == ["says so", "broken"] * 2
    assert (results.frame().method == "broken").sum() == 2


def test_the_budget_ends_a_fit():
    row = one(made.Slow(), budget=Budget(0.3))
    assert row["status"] == "stopped" and "0.3 s" in row["reason"] and row["scores"]["rmse"] > 0
    assert 0.2 < row["fit_seconds"] < 10
    row = one(made.Slow(keep=False), budget=Budget(0.3))
    assert row["status"] == "failed" and "did not end within 0.3 s" in row["reason"] and row["scores"] == {}


def test_the_budget_does_not_cut_through_an_import(tmp_path, monkeypatch):
    """Half a module would stay behind, and every later fit in this process fail."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.6)\nWHOLE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_to_import", raising=False)
    row = one(made.Imports(), budget=Budget(0.2))
    assert row["status"] == "stopped" and sys.modules.pop("slow_to_import").WHOLE
    assert "ended the fit; with what had to follow it took" in row["reason"]


def test_the_budget_holds_where_ctrl_c_is_ignored():
    """As in a process that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert one(made.Slow(), budget=Budget(0.3))["status"] == "stopped"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_gp_stopped_by_the_budget_is_measured():
    x = rng.normal(size=(1500, 6))
    row = one(fspace.GPRegressor(kernel="deep"), Table("large", x, np.sin(x[:, 0]), splits=1), Budget(1.0))
    assert row["status"] == "stopped" and math.isfinite(row["scores"]["log_likelihood"])


def test_a_process_that_dies_takes_no_other_cell_with_it(tmp_path):
    methods = {"a": made.Noisy(), "dies": made.Dies(), "b": made.Noisy(spread=2.0)}
    results = Study([TABLE], methods, splits=1, folder=tmp_path).run(jobs=2)
    assert [row["status"] for row in results.rows] == ["ok", "failed", "ok"] and "died" in results.rows[1][
        "reason"
    ]
    alone = Study([TABLE], {"a": made.Noisy(), "b": made.Noisy(spread=2.0)}, splits=1).run()
    assert scores(alone) == [s for s in scores(results) if s[2] != "dies"]


@pytest.mark.slow
def test_workers_end_with_a_study_that_is_killed(tmp_path):
    """They would wait for ever, in the memory of a process each."""
    script = tmp_path / "killed.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]\n"
        "import study_estimators as made\n"
        "from fspace.compare import Budget, InBetween, Study\n"
        "if __name__ == '__main__':\n"
        f"    methods = {{'a': made.Tells({str(tmp_path / 'a')!r}), 'b': made.Tells({str(tmp_path / 'b')!r})}}\n"
        "    Study([InBetween(1)], methods, budget=Budget(60)).run(jobs=2)\n"
    )
    files = [tmp_path / "a", tmp_path / "b"]
    with subprocess.Popen([sys.executable, str(script)]) as running:
        try:
            assert _within(60, lambda: all(file.exists() and file.read_text() for file in files))
        finally:
            running.kill()
    workers = [int(file.read_text()) for file in files]
    assert running.pid not in workers
    assert _within(20, lambda: not any(_lives(pid) for pid in workers))


def _within(seconds, true):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not true():
        time.sleep(0.1)
    return true()


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]


@pytest.mark.slow
def test_on_ray_the_table_is_the_same(tmp_path):
    ray = pytest.importorskip("ray")
    methods = {"a": made.Noisy(), "broken": made.Broken()}
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}},
        )
    except Exception as error:  # a machine that forbids what Ray needs
        pytest.skip(f"Ray does not start here: {error}")
    try:
        results = Study([TABLE], methods).run(engine="ray", jobs=2)
    finally:
        ray.shutdown()
    assert scores(results) == scores(Study([TABLE], methods).run())


# ---- resuming --------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    calls = tmp_path / "calls"
    counted = made.Noisy(calls=str(calls))
    cut = Study([TABLE], {"a": counted, "stop": made.PressesCtrlC()}, folder=tmp_path).run()
    assert cut.interrupted and len(cut.rows) == 1 and calls.read_text() == "x"
    whole = Study([TABLE], {"a": counted, "b": counted}, folder=tmp_path).run()
    assert not whole.interrupted and len(whole.rows) == 4 and calls.read_text() == "xxxx"
    assert scores(Study([TABLE], {"a": counted, "b": counted}, folder=tmp_path).run()) == scores(whole)
    assert calls.read_text() == "xxxx"
    Study([TABLE], {"a": counted, "b": counted}, folder=tmp_path).run(resume=False)
    assert calls.read_text() == "xxxxxxxx"


def test_what_changed_is_run_again(tmp_path):
    calls = tmp_path / "calls"
    settings = {
        "datasets": [TABLE],
        "methods": {"a": made.Noisy(calls=str(calls))},
        "splits": 1,
        "folder": tmp_path,
    }
    changed = [
        {}, {"seed": 1}, {"budget": Budget(9.0)}, {"methods": {"a": made.Noisy(spread=3.0, calls=str(calls))}},
        {"datasets": [Table("small", X, Y + 1, splits=2)]},
    ]  # fmt: skip
    for change in changed:
        Study(**(settings | change)).run()
    assert len(calls.read_text()) == len(changed)


def test_a_line_cut_off_is_dropped_and_another_file_is_refused(tmp_path):
    Study([TABLE], {"a": made.Noisy()}, folder=tmp_path).run()
    path = tmp_path / study.JOURNAL
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(Journal(path).rows) == 1 and path.read_text() == whole.splitlines()[0] + "\n"
    for other in (
        b"a,b\n1,2\n",
        b'{"key": "a", "row": {}}\n' * 2,
        b'{"key": "a", "row": 3}\n' * 2,
        b"\xff\xfe\n" * 3,
    ):
        path.write_bytes(other)
        with pytest.raises(DataError, match="line 1"):
            Journal(path)
    path.write_text(whole.replace("\n", "\n\n"))  # as an editor may leave it
    assert len(Journal(path).rows) == 2


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_fit(tmp_path):
    calls, file = tmp_path / "calls", tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(DataError, match="cannot be kept"):
            Study([TABLE], {"a": made.Noisy(calls=str(calls))}, folder=folder).run()
    assert not calls.exists()


def test_failed_cells_are_tried_again(tmp_path):
    methods = {"broken": made.Broken()}
    assert Study([TABLE], methods, folder=tmp_path).run().rows[0]["status"] == "failed"
    assert len((tmp_path / study.JOURNAL).read_text().splitlines()) == 2
    Study([TABLE], methods, folder=tmp_path).run()
    assert len((tmp_path / study.JOURNAL).read_text().splitlines()) == 4


# ---- budgets and searches --------------------------------------------------------------------------


def test_settings_are_chosen_on_the_training_rows_alone():
    noise = np.random.default_rng(3).normal(size=400)
    table = Table("wide", np.zeros((400, 1)) + np.arange(400)[:, None], 5 * noise, splits=1)
    row = one(made.Noisy(), table, Budget(20.0, trials=3), grid={"spread": [0.5, 5.0, 60.0]})
    assert row["settings"] == {"spread": "5.0"} and len(row["trials"]) == 3
    assert one(made.Noisy(), table, grid={"spread": [0.5, 5.0]})["settings"] == {}  # one trial: its own


def test_seeds_and_epochs_reach_the_estimator():
    copy = cells.prepared(made.Noisy(), 17, 5)
    assert copy.seed == 17 and copy.epochs == 5 and cells.prepared(made.Noisy(), 17, None).epochs == 3
    assert (
        str(Budget(60.0, 40, 3))
        == "at most 60 s of wall time a fit, 40 epochs, 3 settings tried inside the split"
    )


# ---- data sets -------------------------------------------------------------------------------------


def test_gap_splits_take_the_middle_third_along_each_input():
    table = Table("gaps", X, Y, gap=True)
    assert table.splits == 3 and isinstance(table, Dataset)
    problem = table.problem(1)
    low, high = problem.x_test[:, 1].min(), problem.x_test[:, 1].max()
    assert len(problem.y_test) == 40 - 2 * 13
    assert not ((problem.x_train[:, 1] > low) & (problem.x_train[:, 1] < high)).any()
    assert sorted([*problem.y_train, *problem.y_test]) == sorted(Y)
    assert gap_rows(np.zeros(9)).sum() == 3  # equal values: still a third


def test_published_and_gap_splits_of_uci(fspace_data):
    published, gap = Uci("yacht"), Uci("yacht", gap=True)
    assert (published.splits, gap.splits, Uci("protein").splits) == (20, 6, 5)
    first, between = published.problem(0), gap.problem(2)
    assert len(first.y_test) == 31 and len(first.y_train) + 31 == 308
    assert len(between.y_test) + len(between.y_train) == 308
    inside = between.x_test[:, 2]
    outer = between.x_train[:, 2]
    assert ((outer <= inside.min()) | (outer >= inside.max())).all()


def test_encoding_is_learned_from_the_training_rows():
    frame = pd.DataFrame({"a": X[:, 0], "b": pd.Categorical(LABELS)})
    frame.loc[3, "a"] = np.nan
    problem = Table("frame", frame, Y, missing="impute").problem(0)
    assert problem.x_train.shape == (32, 2) and np.isfinite(problem.x_train).all()
    with pytest.raises(DataError, match="Row 3"):
        Table("frame", frame, Y)


def test_categories_of_polars_and_of_other_rows_are_encoded():
    polars = pytest.importorskip("polars")
    kind = np.where(X[:, 1] > 0, "up", "down")
    for frame in (
        pd.DataFrame({"a": X[:, 0], "kind": pd.Categorical(kind)}),
        polars.DataFrame({"a": X[:, 0], "kind": polars.Series(kind.tolist(), dtype=polars.Categorical)}),
    ):
        problem = Table("frame", frame, Y, outside=frame[:5]).problem(0)
        assert problem.x_train.shape == (32, 2) and problem.outside.shape == (5, 2)
        assert set(problem.x_train[:, 1]) == {0.0, 1.0}


def test_digits_hold_out_classes_and_mnist_is_shrunk_alike():
    problem = digits().problem(0)
    assert set(problem.y_train.tolist()) == set(range(8)) and len(problem.outside) == 174 + 180
    white = shrunk(np.full((1, 784), 255.0)).reshape(8, 8)
    assert white[1:-1, 1:-1].min() == 16 and white[0, 4] == 8 and white[0, 0] == 4


def test_a_sample_in_between_has_nothing_in_between():
    first, again, other = (InBetween().problem(k) for k in (0, 0, 1))
    assert (first.x_train == again.x_train).all() and (first.x_train != other.x_train).any()
    assert np.abs(first.x_train).min() > 0.69 and np.abs(first.x_test).min() < 0.1
    assert np.std(first.y_test - InBetween.truth(first.x_test)) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Study([], {"a": made.Noisy()}), "at least one data set"),
        (lambda: Study([TABLE, TABLE], {"a": made.Noisy()}), "one name"),
        (lambda: Study([TABLE], {"a": LogisticRegression()}), "No method fits"),
        (lambda: Study([TABLE], {"a": made.Noisy()}, splits=0), "splits=0"),
        (lambda: Study([TABLE], {"a": made.Noisy()}).run(engine="spark"), "process, ray"),
        (lambda: Study([TABLE], {"a": made.Noisy()}).run(jobs=0), "jobs=0"),
        (lambda: Budget(0.0), "positive number"),
        (lambda: Budget(math.nan), "seconds=nan"),
        (lambda: Budget(math.inf), "seconds=inf"),
        (lambda: Budget(True), "seconds=True"),
        (lambda: Budget(1.0, trials=0), "trials=0"),
        (lambda: Uci("yatch"), "yacht"),
        (lambda: TABLE.problem(2), "splits 0 to 1"),
        (lambda: Table("t", X, LABELS), "classification"),
        (lambda: Table("t", X, Y[:3]), "40 rows, y has 3"),
        (lambda: Table("t", X, ["a"] + ["b"] * 39, "classification"), "'a' has one row only"),
        (lambda: Table("t", X, np.where(Y > 0, 1.0, np.nan), "classification"), "NaN or missing in row"),
        (lambda: Table("t", X, [None, *LABELS[1:]], "classification"), "missing in row 0"),
        (lambda: Table("t", X, np.array([1, *LABELS[1:]], dtype=object), "classification"), "mixes labels"),
        (lambda: Table("t", X, np.zeros(40, dtype=int), "classification"), "one class only"),
        (lambda: Table("t", X, np.where(Y == Y[3], np.nan, Y)), "Row 3"),
        (lambda: Table("t", sparse.csr_matrix(X), Y), "Sparse"),
        (lambda: Table("t", None, Y), "array"),
        (lambda: Table("t", X, Y, outside=X[:, :2]), "2 features"),
        (lambda: Table("t", X, Y, outside=np.full_like(X, np.nan)), "NaN"),
        (lambda: Table("t", X, Y, seed=2**32 - 1), "below 2"),
        (lambda: InBetween(0), "splits=0"),
        (lambda: InBetween(rows=1), "rows=1"),
        (lambda: Study([TABLE], {"a": made.Noisy}), "an instance, not a class"),
        (lambda: Study([TABLE], {"a": 3}), "no estimator"),
    ],
)  # fmt: skip
def test_what_is_refused(make, words):
    with pytest.raises((OptionError, DataError), match=words):
        make()


@pytest.mark.parametrize(
    "items, what", [(TABLE, "Table"), ([(X, Y)], "tuple"), ("gp", "str"), ([made.Noisy()], "Noisy")]
)
def test_what_is_no_sequence_of_its_kind_is_refused(items, what):
    with pytest.raises(OptionError, match=f"a sequence of Datasets; got a {what}. Pass this"):
        study._all_of(Dataset, items, "datasets", "this")


def test_distances_to_a_reference_method_split_by_split():
    methods = {
        "rbf": fspace.GPRegressor(kernel="rbf"),
        "matern": fspace.GPRegressor(kernel="matern"),
        "line": BayesianRidge(),
    }
    results = Study([InBetween()], methods, splits=2).run()
    table = results.distances("in-between", "rbf", 0.01)
    assert set(table.index) == {
        (m, s) for m in ("matern", "chance") for s in (0, 1)
    }  # a line has no functions here
    kept = [row["functions"] for row in results.rows if row["split"] == 1][:2]
    apart = np.subtract(*(np.array(k["probe_mean"]) for k in kept))
    assert table.loc[("matern", 1), "mean"] == pytest.approx(np.sqrt(np.mean(apart**2)))
    assert table.loc[("chance", 0), "sliced"] < table.loc[("matern", 0), "sliced"]
    with pytest.raises(DataError, match="has no functions"):
        results.distances("in-between", "line", 0.01)
