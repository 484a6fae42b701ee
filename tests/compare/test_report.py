"""Findings, pictures and the page of a study, and the terminal's command."""

import json
import math
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fspace.compare import command, pictures
from fspace.compare.ranks import rank
from fspace.compare.report import rankings, write_report
from fspace.compare.results import Results
from fspace.compare.sentences import difference, findings, give
from fspace.errors import DataError, OptionError

GRID, PROBES = np.linspace(-3, 3, 13), np.linspace(-2, 2, 9)
SPLITS = 4


def functions(width, seed):
    """What a cell keeps of a posterior with this standard deviation between the data."""
    std = np.where(np.abs(PROBES) < 0.6, width, 0.1)
    draws = std * np.random.default_rng(seed).standard_normal((300, 9))
    band = [(-2 * np.ones(13)).tolist(), (2 * np.ones(13)).tolist()]
    return {
        "grid": GRID.tolist(), "probes": PROBES.tolist(), "mean": (0 * GRID).tolist(), "observed": band, "latent": band,
        "train": [[-2.0, -1.5, -1.0, 1.0, 1.5, 2.0], [0.0] * 6], "shown_draws": [GRID.tolist()],
        "probe_mean": (0 * PROBES).tolist(), "probe_covariance": np.diag(std**2).tolist(),
        "probe_draws": draws.tolist(),
    }  # fmt: skip


def made_up():
    """Two tasks, four methods: `good` is better by 0.5 on every split, `alike` by chance, `bad` fails on one."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset, task in (("line", "regression"), ("labels", "classification")):
        for split in range(SPLITS):
            level = rng.normal()
            for name, shift, width in (
                ("reference", 0.0, 1.0),
                ("good", 0.5, 0.9),
                ("alike", 0.0, 0.2),
                ("bad", -9.0, 0.1),
            ):
                score = level + shift + 0.01 * rng.normal()
                row = {
                    "dataset": dataset, "task": task, "split": split, "method": name, "status": "ok", "reason": "",
                    "fresh": True, "rows": {"train": 40, "test": 10}, "fit_seconds": 0.1 + abs(shift),
                    "predict_seconds": 0.1,
                    "scores": {"log_likelihood": score, "calibration_error": 0.1},
                }  # fmt: skip
                if task == "regression":
                    row["scores"] |= {"rmse": -score, "coverage_90": 0.5 if name == "bad" else 0.9}
                    row["calibration"] = [[0.25, 0.5, 0.75], [0.3, 0.5, 0.7]]
                    row["functions"] = functions(width, split)
                else:
                    row["scores"] |= {"auroc, entropy": 0.9 + 0.01 * shift, "accuracy": 0.5}
                    row["calibration"] = [[0.55, 0.95], [0.5, 0.99], [20.0, 30.0]]
                if name == "bad" and split == 2:
                    row |= {"status": "failed", "reason": "ValueError: <no> & way", "scores": {}}
                    for name in ("functions", "fit_seconds", "predict_seconds"):
                        row.pop(name, None)
                    row.pop("calibration")
                rows.append(row)
    spaces = {"reference": "function", "good": "weights", "alike": "weights", "bad": ""}
    return Results(rows, "at most 9 s", {"line": "two clusters", "good": "a good one"}, spaces)


RESULTS = made_up()


# ---- findings --------------------------------------------------------------------------------------


def test_differences_are_paired_and_judged_by_students_t():
    """The levels of splits differ by 1, the methods by 0.5 +- 0.01: unpaired, nothing could be said."""
    values = RESULTS.values("log_likelihood", dataset="line")
    mean, error, far = difference(values["good"], values["alike"], 0.0)
    apart = (values["good"] - values["alike"]).to_numpy()
    assert (mean, error) == (pytest.approx(apart.mean()), pytest.approx(apart.std(ddof=1) / 2)) and far
    assert values["good"].std() / 2 > 10 * error
    assert not difference(values["reference"], values["alike"], 0.0)[2] or abs(mean) > 0
    assert not difference(values["good"].iloc[:1], values["alike"].iloc[:1], 0.0)[2]  # one split says nothing


def test_chance_is_called_so_at_its_level():
    """2,000 pairs of columns without a difference: 5% are called more than chance, standard error 0.5%."""
    rng = np.random.default_rng(1)
    called = [difference(*(pd.Series(rng.normal(size=4)) for _ in range(2)), 0.0)[2] for _ in range(2000)]
    assert abs(np.mean(called) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_sentences_say_what_was_found_with_standard_errors():
    text = "\n".join(findings(RESULTS, "reference"))
    assert re.search(
        r"line: good predicts best, .* ± .* nats a point; \w+ has 0\.\d+ ± 0\.\d+ less, which is more than",
        text,
    )
    assert re.search(
        r"functions or weights: .*reference\) has 0\.\d+ ± 0\.\d+ nats a point less than the best of 2", text
    )
    assert "90% intervals hold too little: bad 50% ± 0%" in text
    assert "as a function good is nearest to reference" in text and "bad farthest" in text
    assert "less than half of reference's in alike 0.20 ± 0.00" in text and "bad 0.10 ± 0.00" in text
    assert "labels: good tells rows of another kind best, AUROC 0.9" in text
    assert "nan" not in text


def test_one_split_has_no_standard_error_and_no_claim():
    one = Results([row for row in RESULTS.rows if row["split"] == 0], "b", {}, RESULTS.spaces)
    text = "\n".join(findings(one, "reference"))
    assert "no standard error" in text and "more than chance" not in text and "nan" not in text


def test_figures_have_the_digits_of_their_errors():
    assert give(1.23456, 0.0123) == "1.235 ± 0.012" and give(12.3, 4.56) == "12.3 ± 4.6"
    assert give(0.5, math.nan).startswith("0.5 (one split")


# ---- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    priors = {"narrow": np.random.default_rng(0).normal(size=(20, 13)), "wide <limit>": np.zeros((20, 13))}
    write_report(
        folder, RESULTS, reference="reference", priors=priors, prior_grid=GRID, limits=["wide <limit>"]
    )
    return folder


def test_the_page_is_self_contained_and_complete(page):
    text = (page / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    pngs = sorted(file.name for file in page.glob("*.png"))
    assert pngs == sorted([
        "line-bands.png", "line-calibration.png", "line-cost.png", "labels-calibration.png", "labels-cost.png",
        "labels-detection.png", "priors.png", "ranks-regression.png", "ranks-classification.png",
    ])  # fmt: skip
    assert text.count("data:image/png") == len(pngs)
    for words in (
        "at most 9 s",
        "What went wrong",
        "&lt;no&gt; &amp; way",
        "two clusters",
        "a good one",
        "mean rank",
    ):
        assert words in text
    assert "nan" not in re.sub(r"base64,[^']*", "", text).lower().replace("nancy", "")


def test_all_scores_are_in_the_table(page):
    table = pd.read_csv(page / "results.csv")
    assert len(table[table.metric == "rmse"]) == 4 * SPLITS - 1 and (table.status == "failed").sum() == 2


def test_ranks_are_over_splits_where_data_sets_are_few():
    ranking = rankings(RESULTS)[f"regression, {SPLITS} splits of 1 data set"]
    assert ranking.blocks == SPLITS and ranking.methods[int(ranking.ranks.argmin())] == "good"
    assert ranking.ranks[ranking.methods.index("bad")] == 4  # also where it failed


def test_bands_show_every_method_with_the_reference():
    figure = pictures.bands(RESULTS, "line", "reference")
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles == ["reference (the reference)", "good", "alike", "bad"]
    dashed = [sum(line.get_color() == pictures.ORANGE for line in ax.lines) for ax in figure.axes]
    assert dashed == [0, 2, 2, 2]
    with pytest.raises(DataError, match="kept its functions"):
        pictures.bands(RESULTS, "labels")


def test_bars_of_the_rank_diagram_join_what_cannot_be_told_apart():
    values = (
        np.arange(30)[:, None] * 0
        + np.array([3.0, 2.9, 1.0])
        + np.random.default_rng(0).normal(0, 0.1, (30, 3))
    )
    ranking = rank(values, ["a", "b", "c"], True)
    ax = pictures.rank_diagram(ranking, "log_likelihood")
    bars = [line.get_xdata() for line in ax.lines if line.get_color() == pictures.ORANGE]
    joined = sorted(bars, key=lambda xs: xs[1] - xs[0])[
        :-1
    ]  # the longest shows the critical difference itself
    assert abs(ranking.ranks[0] - ranking.ranks[1]) > ranking.critical_difference or len(joined) == 1
    assert not any(low <= ranking.ranks[2] <= high for low, high in joined)


def test_a_hopeless_method_does_not_flatten_the_others():
    ax = pictures.cost_quality(RESULTS, "line")
    bottom, _ = ax.get_ylim()
    values = RESULTS.means("log_likelihood", "line")
    assert values["bad"][0] < bottom < values["alike"][0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(label.startswith("bad: ") and label.endswith(", below") for label in labels)
    assert not ax.texts and len(ax.containers) == 3  # named beside the picture, and no error bar crosses it


# ---- the terminal ----------------------------------------------------------------------------------


@pytest.fixture
def run(terminal, monkeypatch, tmp_path):
    """`fspace compare` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(terminal, "compare")


@pytest.fixture
def houses(tmp_path):
    rng = np.random.default_rng(0)
    size, city = rng.uniform(20, 200, 60), rng.choice(["Oxford", "Rome"], 60)
    frame = pd.DataFrame(
        {"size": size, "city": city, "price": 3 * size + 50 * (city == "Rome") + rng.normal(0, 5, 60)}
    )
    frame.to_csv(tmp_path / "houses.csv", index=False)


COMPARE = [
    "houses.csv",
    "--target",
    "price",
    "--categorical",
    "city",
    "--methods",
    "linear,gp-rbf",
    "--jobs",
    1,
]


def test_a_file_is_compared_and_gone_on_with(run, houses, tmp_path):
    status, out, err = run(*COMPARE, "--splits", 2, "--out", "there")
    assert status == 0 and err == "" and out.splitlines()[-1].endswith("Open there/report.html")
    assert "houses: " in out and (tmp_path / "there" / "houses-calibration.png").exists()
    lines = (tmp_path / "there" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 4
    status, out, _ = run(*COMPARE, "--splits", 3, "--out", "there", "--json")
    assert status == 0 and json.loads(out)["fits"] == 6
    assert (tmp_path / "there" / "cells.jsonl").read_text().splitlines()[:4] == lines


@pytest.mark.parametrize(
    "args, words",
    [
        (["--methods", "lineal"], ["lineal", "linear", "gp-rbf"]),
        (["--target", "price"], ["--target", "DATA"]),
        (["houses.csv"], ["--target"]),
        (["houses.csv", "--target", "prize"], ["prize", "price"]),
        (["houses.csv", "--target", "city"], ["city"]),
        (["houses.csv", "--target", "price"], ["--categorical city"]),
        (["--splits", "0"], ["--splits 0"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--budget", "0"], ["--budget 0"]),
        (["--task", "regresion"], ["--task regresion"]),
        (["--out", "houses.csv"], ["that is a file"]),
        (["--out", "."], ["no comparison"]),
        (["--seed", "-1"], ["--seed -1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(run, houses, args, words):
    status, out, err = run(*args)
    assert status == 2 and out == "" and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_hmc_is_the_reference_only_where_it_ended_and_its_chains_agree():
    """Draws of a sampler that the budget cut are no reference; the exact limit then is."""
    rows = [
        {"method": name, "status": status, "functions": {"probe_mean": []}}
        for name, status in (("HMC", "ok"), ("HMC", "stopped"), ("wide network", "ok"))
    ]
    assert command._reference(Results(rows, "")) == "wide network"
    assert command._reference(Results(rows[::2], "")) == "HMC"
    assert command._reference(Results(rows[:2], "")) is None
    for rhat, reference in ((1.02, "HMC"), (1.2, "wide network"), (math.nan, "wide network")):
        rows[0]["chains"] = {"rhat": rhat, "ess": 500.0}
        assert command._reference(Results(rows[::2], "")) == reference


def test_rates_that_have_no_direction_are_refused():
    with pytest.raises(OptionError, match="neither high nor low"):
        pictures.cost_quality(RESULTS, "line", "coverage_90")


def test_the_page_on_comparing_runs(tmp_path, monkeypatch, capsys):
    """The Python of docs/compare.md as it stands, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "compare.md", "exec"), {})
    said = capsys.readouterr().out
    assert "diabetes: " in said and (tmp_path / "diabetes-study" / "report.html").exists()
    assert "log_evidence" in said  # of a network by itself


# ---- scores that are infinite, or on other splits --------------------------------------------------


def changed(**scores):
    """RESULTS on the first data set, with some methods' log-likelihoods of its splits given (None: failed)."""
    rows = []
    for row in RESULTS.rows:
        if row["dataset"] != "line":
            continue
        value = scores.get(row["method"], {}).get(row["split"], row["scores"].get("log_likelihood"))
        row = {**row, "scores": {**row["scores"], "log_likelihood": value}}
        rows.append({**row, "status": "failed", "scores": {}} if value is None else row)
    return Results(rows, "b", {}, RESULTS.spaces)


def test_a_method_without_any_probability_does_not_take_the_report_with_it(tmp_path):
    """Hours of fits would be without a page for one prediction that was too sure."""
    for sure in (["bad"], ["bad", "alike"], ["reference", "good", "alike", "bad"]):
        results = changed(**{name: {1: -math.inf} for name in sure})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report(tmp_path, results, reference="reference")
        text = "\n".join(findings(results))
        assert all(f"{name} gave what happened no probability" in text for name in sure) and "nan" not in text


def test_methods_on_other_splits_are_not_compared():
    failed = dict.fromkeys(range(4))
    apart = changed(good={2: None, 3: None}, reference={0: None, 1: None}, alike=failed, bad=failed)
    text = "\n".join(findings(apart))
    assert "was measured on other splits" in text and "nan" not in text
    better = changed(
        good={0: 9.0, 1: None, 2: None, 3: None}, reference={0: 9.5, 1: 0.0, 2: 0.0, 3: 0.0},
        alike=failed, bad=failed,
    )  # fmt: skip
    assert (
        "reference has 0.5" in (said := findings(better)[0]) and "more on the splits that both have" in said
    )


def test_pictures_of_names_that_look_alike_are_kept_apart(tmp_path):
    rows = [{**row, "dataset": name} for name in ("a b", "a-b") for row in changed().rows]
    write_report(tmp_path, Results(rows, "b", {}, RESULTS.spaces))
    assert (tmp_path / "a-b-cost.png").exists() and (tmp_path / "a-b-cost-2.png").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        write_report(tmp_path / "file", RESULTS)
