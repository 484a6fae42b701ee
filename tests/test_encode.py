"""`fspace encode` as a person meets it: what is written, that it is what the model says, and what is refused."""

import json
import os
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy.stats import norm
from sklearn.decomposition import PCA

from fspace import encoding_plots, encoding_report
from fspace.canvas import BLUE, PALE
from fspace.data import read_table, write_table
from fspace.encoding_scores import alone
from fspace.inference.amortized import training
from fspace.inference.amortized.model import load

FILES = [
    "latents.csv",
    "log_likelihood.csv",
    "metrics.json",
    "model.amortized",
    "reconstructions.csv",
    "report.html",
]
QUICK = ["--epochs", 2, "--device", "cpu"]


@pytest.fixture
def full_run(terminal, monkeypatch, tmp_path):
    """`fspace encode` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(terminal, "encode")


@pytest.fixture
def run(full_run, monkeypatch):
    """The same with a stub of a report, for its pictures take seconds."""
    stub = lambda path, *_: path.write_text("stub")  # noqa: E731
    monkeypatch.setattr(encoding_report, "write_encoding_report", stub)
    return full_run


def flowers(n=60, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(n)
    columns = {f"c{k}": (k - 1.5) * z + 0.3 * rng.standard_normal(n) + k for k in range(4)}
    return pd.DataFrame({"kind": np.where(z > 0, "tall", "short"), **columns})


def waves(count=5, seed=0):
    """Series of different lengths, their rows in disorder."""
    rng = np.random.default_rng(seed)
    parts = []
    for k in range(count):
        t = np.arange(6 + k)
        a = np.sin(0.6 * t + k) + 0.1 * rng.standard_normal(len(t))
        parts.append(pd.DataFrame({"who": f"s{k}", "hour": t * 0.5, "a": a, "b": a**2}))
    return pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)


def refused(result, *words):
    status, out, err = result
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err


# ---- what is written -------------------------------------------------------------------------------


def test_rows_of_a_table_and_what_is_written_about_them(full_run, tmp_path):
    write_table(flowers(), tmp_path / "flowers.csv")
    status, out, _ = full_run("flowers.csv", "--label", "kind", "--latents", 2, "--out", "r", *QUICK)
    assert status == 0 and out.rstrip().endswith("open r/report.html")
    assert sorted(os.listdir("r")) == FILES
    model, x = load("r/model.amortized"), flowers().drop(columns="kind").to_numpy(dtype=np.float32)
    latents, made = read_table("r/latents.csv"), read_table("r/reconstructions.csv")
    np.testing.assert_allclose(latents[["z0", "z1"]], model.latent_means(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made[["c0", "c1", "c2", "c3"]], model.reconstruct(x), rtol=1e-4, atol=1e-5)

    # the scores are those of the files, of 6 rows held out and 54 fitted
    likely, metrics = read_table("r/log_likelihood.csv"), json.loads(open("r/metrics.json").read())
    held = likely["held_out"].to_numpy()
    assert metrics["units"] == {"fitted": 54, "held out": 6} and held.sum() == 6
    scores = metrics["scores"]["held out"]
    assert scores["log_likelihood"] == pytest.approx(likely["log_likelihood"][held].mean())
    error = made[["c0", "c1", "c2", "c3"]].to_numpy() - x
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(error[held] ** 2)), rel=1e-5)
    simple = norm(x[~held].mean(0), x[~held].std(0)).logpdf(x).sum(1)
    assert scores["columns_alone"] == pytest.approx(simple[held].mean(), rel=1e-5)
    np.testing.assert_allclose(likely["log_likelihood"], model.log_likelihood(x, 4000), atol=0.3)
    variances = latents[["z0", "z1"]].to_numpy().var(axis=0)
    assert metrics["active_units"] == (variances > 0.01).sum()

    page = open("r/report.html").read()
    assert page.count("data:image/png") == 5 and not re.search(r"(src|href)='?\"?http", page)
    for words in ("2 latents", "flowers.csv", "columns by themselves", "latents are active"):
        assert words in page


def test_bits_are_reported_with_their_hard_and_their_relaxed_bound(full_run, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", (rng.random((30, 4, 4)) < 0.5).astype(np.uint8) * 255)
    options = ["--latent", "bits", "--latents", 3, "--objective", "vimco"]
    assert full_run("x.npy", *options, "--out", "r", *QUICK)[0] == 0
    metrics = json.loads(open("r/metrics.json").read())
    for scores in metrics["scores"].values():
        assert set(scores["bounds"]) == {"elbo", "relaxed"}
    page = open("r/report.html").read()
    assert "ELBO (hard latents)" in page and "relaxed bound (no bound of this model)" in page
    assert np.load("r/reconstructions.npy").shape == (30, 1, 4, 4)  # divided by 255: values 0 and 1
    assert metrics["options"]["likelihood"] == "bernoulli" and "255" in metrics["notes"][0]


def test_numbers_of_8_bits_keep_their_range(run, tmp_path):
    rng = np.random.default_rng(0)
    grey, mask, kinds = (
        rng.integers(0, 17, (30, 3, 3)),
        rng.integers(0, 2, (30, 3, 3)),
        rng.integers(0, 4, (30, 5)),
    )
    for name, x in (("grey", grey), ("mask", mask), ("kinds", kinds)):
        np.save(tmp_path / f"{name}.npy", x.astype(np.uint8))
    said = {}
    for name, options in (("grey", []), ("mask", []), ("kinds", ["--likelihood", "categorical"])):
        assert run(f"{name}.npy", *options, "--latents", 1, "--out", name, *QUICK)[0] == 0
        said[name] = json.loads(open(f"{name}/metrics.json").read())
    assert "largest, 16" in said["grey"]["notes"][0]
    assert said["mask"]["notes"] == [] and said["mask"]["options"]["likelihood"] == "bernoulli"
    means = np.load("grey/reconstructions.npy").mean(), np.load("mask/reconstructions.npy").mean()
    np.testing.assert_allclose(means, [grey.mean() / 16, mask.mean()], atol=0.05)
    assert set(np.unique(read_table("kinds/reconstructions.csv").drop(columns="row"))) <= {0, 1, 2, 3}


def test_without_data_digits_are_encoded_and_draw_draws_them(run, monkeypatch):
    from fspace import encoding, encoding_data

    images, labels = encoding_data.load_digits_images()
    monkeypatch.setattr(encoding_data, "load_digits_images", lambda: (images[:40], labels[:40]))
    monkeypatch.setitem(encoding.SAMPLES, "draw", 30)
    status, out, _ = run("--model", "draw", "--latents", 2, "--json", *QUICK)
    assert status == 0
    results = json.loads(out)
    assert results["latents"] == 20 and results["kind"] == "images"  # two at each of ten steps
    assert "no densities" in results["notes"][0]
    assert np.load("fspace-out/reconstructions.npy").shape == (40, 1, 8, 8)


def test_series_are_put_in_order_and_answers_are_in_that_of_the_table(full_run, tmp_path):
    table = waves()
    write_table(table, tmp_path / "waves.parquet")
    arguments = ["waves.parquet", "--series", "who", "--time", "hour", "--latents", 2, "--out", "r"]
    assert full_run(*arguments, *QUICK)[0] == 0
    latents, likely = read_table("r/latents.parquet"), read_table("r/log_likelihood.parquet")
    assert latents["who"].tolist() == table["who"].tolist()
    assert latents["hour"].tolist() == table["hour"].tolist()
    model, names = load("r/model.amortized"), list(dict.fromkeys(table["who"]))
    assert likely["who"].tolist() == names and likely["steps"].sum() == len(table)
    series = [table[table["who"] == name].sort_values("hour") for name in names]
    data = [part[["a", "b"]].to_numpy() for part in series]
    for part, z, x in zip(series, model.encode(data), model.reconstruct(data)):
        np.testing.assert_allclose(latents[["z0", "z1"]].loc[part.index], z, atol=1e-4)
        made = read_table("r/reconstructions.parquet")[["a", "b"]].loc[part.index]
        np.testing.assert_allclose(made, x, atol=1e-4)
    np.testing.assert_allclose(likely["log_likelihood"], model.log_likelihood(data, 64), rtol=1e-5)
    page = open("r/report.html").read()
    assert "effective sample size" in page or "particles count" in page
    assert "FIVO bound" in page and page.count("data:image/png") == 6


def test_causal_convolutions_take_series_too(run, tmp_path):
    write_table(waves(), tmp_path / "waves.csv")
    arguments = [
        "waves.csv",
        "--series",
        "who",
        "--time",
        "hour",
        "--model",
        "causal",
        "--latents",
        2,
        *QUICK,
    ]
    assert run(*arguments)[0] == 0
    model, latents = load("fspace-out/model.amortized"), read_table("fspace-out/latents.csv")
    first = waves().query("who == 's0'").sort_values("hour")
    q = model.encode(first[["a", "b"]].to_numpy())
    np.testing.assert_allclose(latents[["z0", "z1"]].loc[first.index], q.mean, atol=1e-4)
    scores = json.loads(open("fspace-out/metrics.json").read())["scores"]["fitted"]
    assert set(scores["bounds"]) == {"elbo", "iwae"}


def test_clusters_are_told_of_every_row(full_run, tmp_path):
    write_table(flowers(), tmp_path / "flowers.csv")
    arguments = ["flowers.csv", "--label", "kind", "--model", "mixture", "--components", 2, "--latents", 1]
    assert full_run(*arguments, "--epochs", 30, "--device", "cpu", "--out", "r")[0] == 0
    latents, model = read_table("r/latents.csv"), load("r/model.amortized")
    x = flowers().drop(columns="kind").to_numpy(dtype=np.float32)
    assert (latents["cluster"] == model.clusters(x).argmax(1).numpy()).all()
    assert "mixture prior" in open("r/report.html").read()


@pytest.mark.parametrize(("name", "group"), [("switching", ["state"]), ("gp-states", [])])
def test_states_of_series(full_run, tmp_path, name, group):
    """Answers are in the order of the table, whose rows are in disorder, and are those of the model."""
    write_table(waves(), tmp_path / "waves.csv")
    arguments = ["waves.csv", "--series", "who", "--time", "hour", "--model", name, "--samples", 4]
    extra = ["--components", 2] if group else []  # states are sampled: both bounds are told all the same
    assert full_run(*arguments, *extra, "--out", "r", *QUICK)[0] == 0
    model, latents = load("r/model.amortized"), read_table("r/latents.csv")
    assert list(latents) == ["row", "who", "hour", "z0", "z1", *group]
    parts = [waves().query(f"who == 's{k}'").sort_values("hour") for k in range(5)]
    order = list(dict.fromkeys(waves()["who"]))
    data = [parts[int(who[1:])] for who in order]
    numbers = [part[["a", "b"]].to_numpy() for part in data]
    for part, z, ess in zip(data, model.encode(numbers), model.effective_sample_size(numbers, 64)):
        assert ess.shape == (len(part),) and bool((ess >= 1 - 1e-6).all()) and bool((ess <= 64 + 1e-6).all())
        np.testing.assert_allclose(latents[["z0", "z1"]].loc[part.index], z, atol=1e-8)
    if group:
        found = np.concatenate([s.numpy() for s in model.states(numbers)])
        told = np.concatenate([latents["state"].loc[part.index] for part in data])
        assert (found == told).all()
    bounds = json.loads(open("r/metrics.json").read())["scores"]["fitted"]["bounds"]
    assert set(bounds) == ({"fivo", "relaxed"} if group else {"fivo"})
    page = open("r/report.html").read()
    assert ("relaxed bound (no bound of this model)" in page) == bool(group)
    assert "particles count" in page and "64 particles per series" in page


def test_gaps_of_a_series_are_filled_by_a_gp_prior(full_run, tmp_path):
    t = np.linspace(0, 6, 30)
    table = pd.DataFrame({"t": t, "a": np.sin(t), "b": np.cos(t)})
    table.loc[10:13, ["a", "b"]] = np.nan
    write_table(table, tmp_path / "gaps.csv")
    assert full_run("gaps.csv", "--time", "t", "--epochs", 60, "--device", "cpu", "--out", "r")[0] == 0
    metrics, made = json.loads(open("r/metrics.json").read()), read_table("r/reconstructions.csv")
    assert metrics["model"] == "gp-prior" and list(metrics["scores"]) == ["fitted"]
    assert made.notna().all().all() and list(made) == ["row", "t", "a", "b"]
    assert np.abs(made["a"] - np.sin(t)).max() < 0.5
    assert "none was held out" in open("r/report.html").read()


def test_images_are_the_frames_of_one_series_to_a_gp_prior(run, tmp_path):
    np.save(tmp_path / "film.npy", np.random.default_rng(0).random((12, 3, 3)))
    assert run("film.npy", "--model", "gp-prior", "--out", "r", *QUICK)[0] == 0
    assert np.load("r/reconstructions.npy").shape == (12, 1, 3, 3)
    assert json.loads(open("r/metrics.json").read())["rows"] == 12


# ---- earlier results, Ctrl-C -----------------------------------------------------------------------


def test_earlier_results_are_never_lost_in_silence(run, tmp_path):
    write_table(flowers(), tmp_path / "flowers.csv")
    command = ["flowers.csv", "--drop", "kind", *QUICK]
    assert run(*command)[0] == 0
    first = open("fspace-out/latents.csv").read()
    assert run(*command, "--seed", 1)[1].rstrip().endswith("open fspace-out-2/report.html")
    refused(run(*command, "--out", "fspace-out"), "--overwrite")
    assert open("fspace-out/latents.csv").read() == first != open("fspace-out-2/latents.csv").read()
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 4, 4)))
    assert run("x.npy", "--out", "fspace-out", "--overwrite", *QUICK)[0] == 0
    assert not os.path.exists("fspace-out/reconstructions.csv")  # of the earlier run
    refused(run("fspace-out/latents.csv", "--out", "fspace-out", "--overwrite"), "which they are made from")


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_the_best_state_and_writes_everything(full_run, tmp_path, monkeypatch, after):
    write_table(flowers(), tmp_path / "flowers.csv")
    epoch, done = training._epoch, []

    def stop(*args):
        done.append(1)
        if len(done) > after:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(training, "_epoch", stop)
    status, out, err = full_run("flowers.csv", "--drop", "kind", "--out", "r", "--device", "cpu")
    assert status == 130 and "best state so far is kept" in err and out.rstrip().endswith("r/report.html")
    assert sorted(os.listdir("r")) == FILES
    metrics = json.loads(open("r/metrics.json").read())
    assert metrics["interrupted"] is True and len(metrics["history"]["held_out"]) == after
    assert "interrupted" in open("r/report.html").read()
    assert load("r/model.amortized").history_.stopped == "interrupted"


@pytest.mark.parametrize("overwrite", [False, True])
def test_divergence_keeps_what_was_learnt_before_and_earlier_results(run, tmp_path, monkeypatch, overwrite):
    write_table(flowers(), tmp_path / "flowers.csv")
    command = ["flowers.csv", "--drop", "kind", "--out", "r", *QUICK]
    if overwrite:
        assert run(*command)[0] == 0
        earlier = open("r/latents.csv").read()
    epoch, done = training._epoch, []

    def spoil(run, *args):
        done.append(1)
        if len(done) == 2:
            run.model.encoder.layers[0].weight.data.fill_(float("nan"))
        return epoch(run, *args)

    monkeypatch.setattr(training, "_epoch", spoil)
    result = run(*command, *(["--overwrite"] if overwrite else []))
    refused(result, "diverged in pass 2", "Lower the learning rate")
    if overwrite:
        assert sorted(os.listdir("r")) == FILES and open("r/latents.csv").read() == earlier
    else:
        assert "best state before that is r/model.amortized" in result[2] and os.listdir("r") == [
            "model.amortized"
        ]
        model = load("r/model.amortized")
        assert model.history_.stopped == "diverged" and len(model.history_.held_out) == 1
        assert all(bool(p.isfinite().all()) for p in model.parameters())


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["flowers.csv", "--model", "gan"],
            ["--model gan", "vae, mixture, draw, vrnn, causal, switching, gp-states"],
        ),
        (["flowers.csv"], ["'kind' holds text", "row 0", "--drop kind", "--label kind"]),
        (["flowers.csv", "--label", "kid"], ["--label kid", "Did you mean 'kind'"]),
        (["flower.csv"], ["no file 'flower.csv'"]),
        (["gap.csv"], ["Row 7, column 'c1'", "NaN"]),
        (["flowers.csv", "--label", "kind", "--model", "draw"], ["--model draw takes images"]),
        (["flowers.csv", "--label", "kind", "--model", "vrnn"], ["--model vrnn takes series"]),
        (["x.npy", "--model", "vrnn"], ["--model vrnn takes series", "holds images"]),
        (["waves.csv", "--series", "who", "--time", "hour", "--model", "vae"], ["--model vae takes rows"]),
        (["waves.csv", "--time", "hour", "--drop", "who"], ["have the same time", "--series"]),
        (["one.csv", "--time", "hour", "--drop", "who", "--model", "vrnn"], ["at least two series"]),
        (["x.npy", "--time", "t"], ["--time t", "no columns"]),
        (["objects.npy"], ["Python objects are not read"]),
        (["cut.npy"], ["no whole .npy array"]),
        (["flat.npy"], ["[5]", "[n, h, w]"]),
        (["hole.npy"], ["Row 3", "NaN"]),
        (["empty.csv", "--time", "hour"], ["Column 'a'", "no value", "--drop a"]),
        (["dates.csv", "--time", "day"], ["--time day", "2020-01-01", "times are numbers"]),
        (["x.npy", "--learning-rate", "1e30"], ["diverged in pass 1", "Lower the learning rate (1e+30)"]),
        (["x.npy", "--objective", "vimco"], ["--objective vimco", "gaussian latents"]),
        (["x.npy", "--latent", "cubes"], ["--latent cubes"]),
        (["x.npy", "--network", "conv"], ["cannot be halved"]),
        (["x.npy", "--model", "draw", "--network", "conv"], ["--network is no option of --model draw"]),
        (["flowers.csv", "--drop", "kind", "--likelihood", "bernoulli"], ["--likelihood bernoulli", "row 0"]),
        (["x.npy", "--test-fraction", "1.5"], ["1.5"]),
        (["x.npy", "--epochs", "0"], ["epochs"]),
        (["x.npy", "--out", "full"], ["--out full", "--overwrite"]),
    ],
)
def test_refusals_are_one_line(run, tmp_path, arguments, words):
    write_table(flowers(), tmp_path / "flowers.csv")
    gap = flowers().drop(columns="kind")
    gap.loc[7, "c1"] = np.nan
    write_table(gap, tmp_path / "gap.csv")
    write_table(waves(), tmp_path / "waves.csv")
    write_table(waves(1), tmp_path / "one.csv")
    write_table(pd.DataFrame({"hour": [0.0, 1.0], "a": [np.nan] * 2}), tmp_path / "empty.csv")
    write_table(pd.DataFrame({"day": ["2020-01-01", "2020-01-02"], "a": [1.0, 2.0]}), tmp_path / "dates.csv")
    rng = np.random.default_rng(0)
    x = rng.random((10, 5, 5))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "flat.npy", x[:5, 0, 0])
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-100])
    x[3, 1, 1] = np.nan
    np.save(tmp_path / "hole.npy", x)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    refused(run(*arguments), *words)
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "full") == ["notes.txt"]


# ---- numbers and pictures --------------------------------------------------------------------------


def test_columns_by_themselves():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, [1.0, 2.0], (50, 2))
    assert alone(x, x, "gaussian") == pytest.approx(norm(x.mean(0), x.std(0)).logpdf(x).sum(1))
    gap = x.copy()
    gap[4, 0] = np.nan
    kept = np.delete(x[:, 0], 4)
    each = (
        norm(kept.mean(), kept.std()).logpdf(gap[:, 0]),
        norm(x[:, 1].mean(), x[:, 1].std()).logpdf(x[:, 1]),
    )
    assert alone(gap, gap, "gaussian") == pytest.approx(np.nan_to_num(each[0]) + each[1])
    bits = np.array([[1.0], [1.0], [1.0], [0.0]])  # half a count is added to each
    assert alone(bits, bits, "bernoulli") == pytest.approx(np.log([0.7, 0.7, 0.7, 0.3]))
    assert alone(bits, bits, "categorical") == pytest.approx(np.log([0.7, 0.7, 0.7, 0.3]))


def test_what_the_pictures_show():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((40, 3)) * [3.0, 1.0, 0.05]
    places, share = encoding_plots.principal(z, z)
    pca = PCA(2).fit(z)
    np.testing.assert_allclose(np.abs(places), np.abs(pca.transform(z)), atol=1e-9)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_)
    ax = encoding_plots.active_units(z.var(axis=0), 0.01)
    assert [to_hex(bar.get_facecolor()) for bar in ax.patches] == [BLUE, BLUE, PALE]
    assert ax.get_title(loc="left").startswith("2 of 3")
    kinds = encoding_plots.latent_map(z, np.array(["a", "b"] * 20), "kind")
    assert [t.get_text() for t in kinds.get_legend().get_texts()] == ["a", "b"]
    some = np.where(np.arange(40) < 10, np.nan, np.arange(40) % 2)  # a label that not all rows have
    told = encoding_plots.latent_map(z, some, "kind")
    assert [t.get_text() for t in told.get_legend().get_texts()] == ["none", "0", "1"]
    assert [len(dots.get_offsets()) for dots in told.collections] == [10, 15, 15]
    few = encoding_plots.latent_map(
        z, np.repeat([-0.25, 0.5], 20), "log-likelihood"
    )  # of two series: no classes
    assert few.get_legend() is None and len(few.collections) == 1
    numbers = encoding_plots.latent_map(z[:, :1], np.linspace(0, 1, 40), "log-likelihood")  # one latent
    assert np.ptp(numbers.collections[0].get_offsets()[:, 1]) == 0
    ess = encoding_plots.ess_along([np.full(5, 8.0), np.full(3, 4.0)], 8)
    np.testing.assert_allclose(ess.lines[0].get_ydata(), [6, 6, 6, 8, 8])
    images = rng.random((4, 1, 3, 3))
    picture = encoding_plots.beside(images, 0 * images, columns=4).images[0].get_array()
    np.testing.assert_allclose(picture[:3, :3], images[0, 0])
    np.testing.assert_allclose(picture[4:7, :3], 0)
