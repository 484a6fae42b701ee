"""The commands as a person meets them: what is written, what is refused, what is printed where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fspace
from fspace import cli_fit, fitting, runs
from fspace.data import TableEncoder, read_table, write_table
from fspace.errors import OptionError
from fspace.inference.candidates import fit_plain

ROWS = 40
QUICK = ["--kernel", "matern"]


@pytest.fixture
def full_run(terminal, monkeypatch, tmp_path):
    """The terminal, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return terminal


@pytest.fixture
def run(full_run, monkeypatch):
    """The same with a stub of a report, for its pictures take two seconds."""
    stub = lambda path, model, *_, **__: path.write_text(f"seed {model.seed}")  # noqa: E731
    monkeypatch.setattr(runs, "write_report", stub)
    return full_run


def table(seed=0):
    rng = np.random.default_rng(seed)
    size, city = rng.uniform(20, 200, ROWS), rng.choice(["Oxford", "Paris", "Rome"], ROWS)
    price = 3.0 * size + 100.0 * (city == "Paris") + rng.normal(0, 5.0, ROWS)
    frame = pd.DataFrame({"size": size, "city": city, "new": rng.random(ROWS) < 0.5, "price": price})
    return frame.assign(rent=0.01 * price + rng.normal(0, 0.5, ROWS))


@pytest.fixture
def houses(tmp_path):
    write_table(table(), tmp_path / "houses.csv")
    return tmp_path / "houses.csv"


FIT = ["fit", "houses.csv", "--target", "price", "--drop", "rent", "--categorical", "city", *QUICK]


def refused(result, *words):
    """One clear line on stderr, nothing on stdout, status 2."""
    status, out, err = result
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err


# ---- fit ---------------------------------------------------------------------------------------


def test_fit_writes_everything_and_says_what_to_open(full_run, houses):
    status, out, _ = full_run(*FIT, "--out", "results")
    assert status == 0
    folder = houses.parent / "results"
    assert sorted(os.listdir(folder)) == ["metrics.json", "model.fspace", "predictions.csv", "report.html"]
    assert out.rstrip().splitlines()[-1].endswith("open results/report.html")
    for word in ("RMSE", "MAE", "R²", "log-likelihood", "90% interval coverage", "mean only"):
        assert word in out

    # the metrics are those of the predictions in the file, and these are of rows of the table
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["weights"] == {"matern": 1.0} and "Kernel: matern\n" in out
    predictions = read_table(folder / "predictions.csv")
    held, scores = table().iloc[predictions["row"]], metrics["metrics"]["price"]
    assert len(predictions) == metrics["rows"]["test"] == 8 and metrics["rows"]["train"] == 32
    np.testing.assert_allclose(predictions["observed"], held["price"])
    error = predictions["observed"] - predictions["mean"]
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    inside = predictions["observed"].between(predictions["lower_90"], predictions["upper_90"])
    assert scores["coverage_90"] == pytest.approx(inside.mean())
    assert scores["rmse"] < metrics["baseline"]["price"]["rmse"]

    # and the model in the file is the one that made them
    model = fspace.load(folder / "model.fspace")
    mean, std = model.predict(held[["size", "city", "new"]], return_std=True)
    np.testing.assert_allclose(mean, predictions["mean"], rtol=1e-9)
    np.testing.assert_allclose(std, predictions["std"], rtol=1e-9)


def test_json_is_all_that_is_printed(run, houses):
    status, out, _ = run(*FIT, "--json", "--seed", 3)
    assert status == 0
    results = json.loads(out)
    assert results["files"]["report"] == os.path.join("fspace-out", "report.html")
    saved = json.loads((houses.parent / "fspace-out" / "metrics.json").read_text())
    assert {key: value for key, value in results.items() if key != "files"} == saved
    assert results["options"]["seed"] == 3


def test_the_same_seed_gives_the_same_predictions(run, houses):
    read = lambda folder: (houses.parent / folder / "predictions.csv").read_text()  # noqa: E731
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*FIT, "--out", folder, "--seed", seed)[0] == 0
    assert read("a") == read("b") != read("c")


def test_several_targets_and_parquet(full_run, tmp_path):
    run = full_run
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    write_table(table().astype({"city": "category"}), tmp_path / "houses.parquet")
    status, out, _ = run("fit", "houses.parquet", "--target", "price", "--target", "rent", *QUICK)
    assert status == 0 and "rent" in out and out.count("mean only") == 2
    assert "likelihood" in out and "…" not in out  # 80 columns are enough
    predictions = read_table("fspace-out/predictions.csv")
    assert list(predictions) == ["row", "observed_price", "observed_rent"] + [
        f"{kind}_{name}" for name in ("price", "rent") for kind in ("mean", "std", "lower_90", "upper_90")
    ]
    assert abs(predictions["observed_rent"] - predictions["mean_rent"]).mean() < 1
    assert run("predict", "fspace-out", "houses.parquet", "--out", "p.parquet")[0] == 0
    assert len(read_table("p.parquet").columns) == 8


def test_outputs_that_go_together(full_run, houses):
    run = full_run
    command = ["fit", "houses.csv", "--target", "price", "--target", "rent", "--categorical", "city", *QUICK]
    status, _, _ = run(*command, "--outputs", "coregionalised")
    assert status == 0
    assert "How do the outputs go together?" in (houses.parent / "fspace-out" / "report.html").read_text()
    refused(run(*FIT, "--outputs", "coregionalised"), "several outputs, and y has one")
    refused(run(*command, "--outputs", "linked"), "'linked' does not exist", "coregionalised")
    labels = ["fit", "houses.csv", "--target", "city", "--task", "classification", *QUICK]
    refused(run(*labels, "--outputs", "coregionalised"), "--outputs is for regressions")


def test_kernels_that_predict_together_are_all_named():
    assert runs.describe_choice({"rbf": 0.25, "matern": 0.75}) == "matern (75%); rbf (25%)"
    assert runs.describe_choice({"rbf": 1.0}) == "rbf"


@pytest.mark.parametrize("columns", [50, 80])
def test_a_number_is_never_cut_at_the_edge_of_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    scores = {
        "rmse": 1.009e6,
        "mae": 764900.0,
        "r2": -0.009184,
        "log_likelihood": -15.26,
        "coverage_90": 0.904,
    }
    of_each = dict.fromkeys(["price", "a_target_with_quite_a_long_name"], scores | {"width_90": 3.018e6})
    cli_fit._print_results(
        {"task": "regression", "targets": list(of_each), "rows": {"test": 5, "train": 9}, "metrics": of_each}
        | {"baseline": of_each, "weights": {"matern": 1.0}, "options": {}, "files": {"report": "report.html"}}
    )
    assert capsys.readouterr().out.count("3,018,000") == 4


def test_results_are_printed_where_only_ascii_can_be(houses):
    command = [sys.executable, "-m", "fspace.cli", *FIT]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(fspace.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, env=env, cwd=houses.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").rstrip().endswith("report.html")


def test_parquet_without_pyarrow_is_refused(run, houses, tmp_path, monkeypatch):
    assert run(*FIT, "--out", "fitted")[0] == 0
    write_table(table(), tmp_path / "houses.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(run("fit", "houses.parquet", "--target", "price"), "pip install pyarrow")
    refused(run("predict", "fitted", "houses.parquet", "--out", "p.csv"), "pip install pyarrow")


def test_fit_on_all_rows_measures_nothing(run, houses):
    status, out, _ = run(*FIT, "--test-fraction", 0)
    assert status == 0 and "RMSE" not in out
    assert not os.path.exists("fspace-out/predictions.csv")
    assert json.loads(open("fspace-out/metrics.json").read())["metrics"] == {}


def test_empty_cells_on_request(run, tmp_path):
    frame = table().drop(columns="rent")
    frame.loc[7, "size"] = np.nan
    write_table(frame, tmp_path / "houses.csv")
    command = ["fit", "houses.csv", "--target", "price", "--categorical", "city", *QUICK]
    refused(run(*command), "Row 7, column 'size'", "--missing impute")  # the row of the file, not of a split
    assert not os.path.exists("fspace-out")
    assert run(*command, "--missing", "impute")[0] == 0


def test_a_category_that_only_held_out_rows_have(run, tmp_path):
    frame = table().drop(columns="rent")
    held = runs._split(ROWS, 0.2, 0)[1]
    frame.loc[held[0], "city"] = "Naples"
    write_table(frame, tmp_path / "houses.csv")
    assert run("fit", "houses.csv", "--target", "price", "--categorical", "city", *QUICK)[0] == 0


# ---- earlier results -----------------------------------------------------------------------------


def test_earlier_results_are_never_lost_in_silence(run, houses):
    assert run(*FIT)[0] == 0
    first = open("fspace-out/report.html").read()
    status, out, _ = run(*FIT, "--seed", 5)
    assert status == 0 and out.rstrip().endswith("open fspace-out-2/report.html")
    assert run(*FIT, "--seed", 5)[1].rstrip().endswith("open fspace-out-3/report.html")
    assert open("fspace-out/report.html").read() == first
    refused(run(*FIT, "--out", "fspace-out"), "--overwrite")
    assert open("fspace-out/report.html").read() == first
    open("fspace-out/notes.txt", "w").write("mine")
    assert run(*FIT, "--out", "fspace-out", "--overwrite", "--seed", 5, "--test-fraction", 0)[0] == 0
    assert open("fspace-out/report.html").read() != first
    assert not os.path.exists("fspace-out/predictions.csv")  # of the earlier run
    assert open("fspace-out/notes.txt").read() == "mine"


def test_an_empty_folder_is_used_and_a_file_is_not(run, houses):
    os.mkdir("empty")
    assert run(*FIT, "--out", "empty")[0] == 0 and os.path.exists("empty/report.html")
    refused(run(*FIT, "--out", "houses.csv"), "is a file")
    refused(run(*FIT, "--out", "houses.csv/inside"), "cannot be made")


def test_a_report_that_fails_does_not_take_the_model_with_it(run, houses, monkeypatch):
    def broken(*args, **options):
        raise OptionError("no picture today")

    monkeypatch.setattr(runs, "write_report", broken)
    refused(run(*FIT, "--out", "results"), "no picture today")
    assert sorted(os.listdir("results")) == ["metrics.json", "model.fspace", "predictions.csv"]
    assert [name for name in os.listdir(".") if name.startswith(".")] == []


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "houses.csv"], ["--target", "'size', 'city'"]),
        (["fit", "houses.csv", "--target", "prize"], ["'prize'", "Did you mean 'price'"]),
        (["fit", "house.csv", "--target", "price"], ["no file 'house.csv'", "Did you mean 'houses.csv'"]),
        (["fit", "houses.csv", "--target", "price"], ["'city' holds text", "--categorical city"]),
        (["fit", "houses.csv", "--target", "city"], ["target 'city' holds text"]),
        ([*FIT, "--categorical", "town"], ["--categorical town", "no such column"]),
        ([*FIT, "--categorical", "size,new"], ["--categorical size --categorical new"]),
        ([*FIT, "--drop", "tow"], ["--drop tow"]),
        ([*FIT, "--drop", "price"], ["is the target"]),
        ([*FIT, "--kernel", "cubic"], ["--kernel cubic", "matern"]),
        ([*FIT, "--inference", "magic"], ["--inference magic"]),
        ([*FIT, "--missing", "drop"], ["--missing drop", "impute"]),
        ([*FIT, "--task", "sorting"], ["--task sorting"]),
        ([*FIT, "--test-fraction", "1.5"], ["1.5"]),
        ([*FIT, "--device", "cuda:77"], ["cuda:77"]),
        (["predict", "nothing", "houses.csv", "--out", "p.csv"], ["no model 'nothing'"]),
        (["predict", "houses.csv", "houses.csv", "--out", "p.csv"], ["houses.csv", "not a model"]),
        (["predict", "x", "houses.csv", "--out", "houses.csv"], ["exists", "--overwrite"]),
        (["predict", "x", "houses.csv", "--out", "p.xls"], ["ends in .csv or .parquet"]),
    ],
)
def test_refusals_are_one_line(run, houses, arguments, words):
    refused(run(*arguments), *words)
    assert os.listdir(houses.parent) == ["houses.csv"]


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows(run, tmp_path, rows):
    write_table(table()[["size", "price"]].iloc[:rows], tmp_path / "few.csv")
    refused(run("fit", "few.csv", "--target", "price", *QUICK), f"{rows} row")


def test_unknown_options_are_refused_by_the_parser(run):
    status, _, err = run("fit", "--colour", "red")
    assert status == 2 and "--colour" in err


# ---- predict ---------------------------------------------------------------------------------------


def test_predict_finds_columns_by_name_and_says_what_it_left_out(run, houses, tmp_path):
    assert run(*FIT, "--out", "m")[0] == 0
    shuffled = table()[["new", "price", "size", "city", "rent"]]
    write_table(shuffled, tmp_path / "new.csv")
    status, out, err = run("predict", "m", "new.csv", "--out", "deep/p.csv")
    assert status == 0 and "40 predictions" in out and "price, rent" in err
    predictions = read_table("deep/p.csv")
    assert list(predictions) == ["mean", "std", "lower_90", "upper_90"]
    model = fspace.load("m/model.fspace")
    expected = model.predictive(table()[["size", "city", "new"]])
    np.testing.assert_allclose(predictions["mean"], expected.mean.detach(), rtol=1e-9)
    np.testing.assert_allclose(predictions["upper_90"], expected.interval(0.9)[1].detach(), rtol=1e-9)

    for name in ("m/model.fspace", "m/model"):
        status, out, _ = run("predict", name, "new.csv", "--out", "q.csv", "--overwrite", "--json")
        assert status == 0 and json.loads(out)["rows"] == ROWS
        assert open("q.csv").read() == open("deep/p.csv").read()


def test_a_long_table_is_predicted_in_parts(run, houses, monkeypatch):
    assert run(*FIT, "--out", "m")[0] == 0
    assert run("predict", "m", "houses.csv", "--out", "whole.csv")[0] == 0
    monkeypatch.setattr(runs, "CHUNK", 7)
    assert run("predict", "m", "houses.csv", "--out", "parts.csv")[0] == 0
    pd.testing.assert_frame_equal(read_table("whole.csv"), read_table("parts.csv"), rtol=1e-9)


def test_a_bad_cell_in_a_later_part_is_named_by_its_row_in_the_file(run, houses, tmp_path, monkeypatch):
    assert run(*FIT, "--out", "m")[0] == 0
    monkeypatch.setattr(runs, "CHUNK", 7)
    frame = table()
    for change, words in [
        (frame.assign(size=frame["size"].where(frame.index != 31)), ["Row 31, column 'size'"]),
        (frame.assign(city=frame["city"].where(frame.index != 31, "Roma")), ["'city', row 31", "'Rome'"]),
        (frame.assign(city=frame["city"].where(frame.index != 31)), ["Row 31, column 'city'"]),
        (
            frame.assign(size=frame["size"].astype(object).where(frame.index != 31, "much")),
            ["row 31 ('much')"],
        ),
    ]:
        write_table(change, tmp_path / "other.csv")
        refused(run("predict", "m", "other.csv", "--out", "p.csv"), *words)
        assert sorted(os.listdir()) == ["houses.csv", "m", "other.csv"]
    whole = houses.read_text().rstrip()
    (tmp_path / "other.csv").write_text(whole[: whole.rindex(",")])
    refused(run("predict", "m", "other.csv", "--out", "p.csv"), "cut off", "row 39")


def test_what_is_predicted_from_a_file_is_what_python_predicts(run, houses, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHUNK", 9)
    frame = table().astype({"city": "category"})
    for name in ("houses.parquet", "houses.tsv", "houses.csv.gz"):
        write_table(frame, tmp_path / name)
    assert run(*FIT, "--out", "m")[0] == 0
    model = fspace.load("m/model.fspace")
    mean, std = model.predict(frame[["size", "city", "new"]], return_std=True)
    for name in ("houses.csv", "houses.parquet", "houses.tsv", "houses.csv.gz"):
        for out in ("p.csv", "p.parquet", "p.tsv"):
            assert run("predict", "m", name, "--out", out, "--overwrite")[0] == 0
            predictions = read_table(out)
            np.testing.assert_allclose(predictions["mean"], mean, rtol=1e-9)
            np.testing.assert_allclose(predictions["std"], std, rtol=1e-9)
            assert len(predictions) == ROWS


def test_memory_of_a_prediction_does_not_grow_with_the_file(run, tmp_path, monkeypatch):
    """No frame of more than one part is ever encoded."""
    frame = table()[["size", "price"]]
    write_table(frame, tmp_path / "small.csv")
    assert run("fit", "small.csv", "--target", "price", "--out", "m", "--inducing", 4, *QUICK)[0] == 0
    rows = 200_000
    write_table(pd.DataFrame({"size": np.linspace(20, 200, rows)}), tmp_path / "long.csv")
    longest = 0
    encode = TableEncoder.transform

    def watched(self, X, first_row=0):
        nonlocal longest
        longest = max(longest, len(X))
        return encode(self, X, first_row)

    monkeypatch.setattr(TableEncoder, "transform", watched)
    assert run("predict", "m", "long.csv", "--out", "p.csv")[0] == 0
    assert longest == runs.CHUNK < rows
    predictions = pd.read_csv("p.csv")
    assert len(predictions) == rows and predictions["mean"].iloc[-1] == pytest.approx(600, abs=60)


def test_tables_that_do_not_fit_the_model(run, houses, tmp_path):
    assert run(*FIT, "--out", "m")[0] == 0
    frame = table()
    for change, words in [
        (frame.drop(columns="size"), ["now missing", "size"]),
        (frame.assign(city="Roma"), ["'city', row 0", "Did you mean 'Rome'"]),
        (frame.assign(size=frame["size"].where(frame.index != 9)), ["Row 9, column 'size'"]),
    ]:
        write_table(change, tmp_path / "other.csv")
        refused(run("predict", "m", "other.csv", "--out", "p.csv"), *words)
        assert not os.path.exists("p.csv")


def test_categories_written_as_numbers(run, tmp_path):
    """A column of codes is text in one file ("A", "1") and whole numbers in another (1): the same categories."""
    frame = table()[["size", "price"]].assign(code=np.tile(["A", "1"], ROWS // 2))
    write_table(frame, tmp_path / "codes.csv")
    assert run("fit", "codes.csv", "--target", "price", "--categorical", "code", "--out", "m", *QUICK)[0] == 0
    for ending in ("csv", "parquet"):
        write_table(frame[frame["code"] == "1"].astype({"code": int}), tmp_path / f"ones.{ending}")
        assert read_table(f"ones.{ending}")["code"].dtype.kind == "i"
        assert run("predict", "m", f"ones.{ending}", "--out", f"p-{ending}.csv")[0] == 0
    frame = frame.assign(code=np.tile(["A", "01"], ROWS // 2))  # another file's "01" is not the number 1
    write_table(frame, tmp_path / "codes.csv")
    assert run("fit", "codes.csv", "--target", "price", "--categorical", "code", "--out", "n", *QUICK)[0] == 0
    write_table(frame[frame["code"] == "01"], tmp_path / "ones.csv")
    assert run("predict", "n", "ones.csv", "--out", "q.csv")[0] == 0


# ---- Ctrl-C ----------------------------------------------------------------------------------------


def test_ctrl_c_in_the_fit_keeps_the_best_state_and_writes_everything(run, houses, monkeypatch):
    def interrupted(plan, kernel, scaling, stage):
        plan.record(stage=stage, loss=1.0, interrupted=True)
        return fit_plain(plan, kernel, scaling, stage)

    monkeypatch.setattr(fitting, "fit_plain", interrupted)
    status, out, err = run(*FIT, "--out", "m")
    assert status == 130 and "RMSE" in out and out.rstrip().endswith("open m/report.html")
    assert err.count("\n") == 1 and "Interrupted" in err and "best state so far is kept" in err
    assert sorted(os.listdir("m")) == ["metrics.json", "model.fspace", "predictions.csv", "report.html"]
    assert json.loads(open("m/metrics.json").read())["interrupted"] is True
    assert fspace.load("m/model.fspace").interrupted_
    monkeypatch.undo()


def test_ctrl_c_elsewhere_leaves_nothing_half_written(run, houses, monkeypatch):
    assert run(*FIT, "--out", "m")[0] == 0

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_columns", stop)
    status, out, err = run("predict", "m", "houses.csv", "--out", "p.csv")
    assert status in (1, 130) and out == "" and "Traceback" not in err
    assert sorted(os.listdir()) == ["houses.csv", "m"]


# ---- the process -----------------------------------------------------------------------------------


def test_help_is_quick_and_heavy_imports_wait():
    code = (
        "import sys, fspace.cli; "
        "assert not {'torch', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_program_is_silent_on_stderr_when_not_a_terminal(houses):
    done = subprocess.run(
        [sys.executable, "-m", "fspace.cli", *FIT, "--json"],
        cwd=houses.parent,
        env=os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["targets"] == ["price"]
    assert "\x1b" not in done.stdout


def test_version(run):
    assert run("--version")[1].strip() == f"fspace {fspace.__version__}"
