"""Saved models: the same predictions wherever they are read, and a clear refusal of everything else."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from torch import nn

import fspace
from fspace.errors import ModelFileError


@pytest.fixture(scope="module")
def wave():
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, (80, 2))
    return X, np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(80)


def same(a, b, X):
    """Mean and deviation agree to the last bit."""
    return np.array_equal(np.stack(a.predict(X, return_std=True)), np.stack(b.predict(X, return_std=True)))


@pytest.mark.parametrize("kernel", ["matern", "neural", "deep", ScaleKernel(RBFKernel())])
def test_saved_model_predicts_the_same_in_a_new_process(wave, kernel, tmp_path):
    X, y = wave
    model = fspace.GPRegressor(kernel=kernel, members=2).fit(X, y)
    model.save(tmp_path / "m.fspace")
    np.save(tmp_path / "x.npy", X)
    code = (
        "import sys, numpy as np, fspace; d = sys.argv[1]; "
        "p = fspace.load(d + '/m.fspace').predict(np.load(d + '/x.npy'), return_std=True); np.save(d + '/p.npy', p)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert np.array_equal(np.load(tmp_path / "p.npy"), np.stack(model.predict(X, return_std=True)))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 30),
    columns=st.integers(1, 4),
    outputs=st.integers(0, 3),
    kernel=st.sampled_from(["matern", "rbf", "neural"]),
    inference=st.sampled_from(["exact", "collapsed"]),
)
def test_whatever_is_saved_comes_back(tmp_path_factory, seed, rows, columns, outputs, kernel, inference):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-9, 10, columns)
    y = rng.standard_normal((rows, outputs) if outputs else rows)
    model = fspace.GPRegressor(kernel=kernel, inference=inference, inducing=8).fit(X, y)
    loaded = fspace.load(model.save(tmp_path_factory.mktemp("saved") / "m.fspace"))
    assert same(model, loaded, X)
    for name in ("log_evidence_", "history_", "choice_", "target_names_", "interrupted_", "n_features_in_"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert np.array_equal(loaded.relevance_, model.relevance_)
    draws = [m.posterior_.draw(2, 1)(torch.tensor(X)) for m in (model, loaded)]
    assert torch.equal(*draws)


def test_names_and_categories_come_back(wave, tmp_path):
    X, y = wave
    frame = pd.DataFrame(X, columns=["a", "b"]).assign(c=pd.Categorical(np.where(X[:, 0] > 0, "up", "down")))
    model = fspace.GPRegressor(kernel="matern").fit(frame, pd.DataFrame({"height": y, "width": 2 * y}))
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    assert loaded.target_names_ == ["height", "width"]
    assert list(loaded.feature_names_in_) == ["a", "b", "c"]
    assert same(model, loaded, frame)


def test_options_that_are_not_plain_python(wave, tmp_path):
    X, y = wave
    options = {"inducing": np.int64(5), "seed": np.int64(3), "device": torch.device("cpu")}
    model = fspace.GPRegressor(kernel="matern", **options).fit(X, y)
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    assert same(model, loaded, X)
    assert same(loaded, loaded.fit(X, y), X)  # the options of the file can be fitted with again


def fixed_lengthscale():
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2, lengthscale_prior=GammaPrior(3.0, 6.0)))
    kernel.base_kernel.lengthscale = 0.7
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    return kernel


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": ScaleKernel(RBFKernel(ard_num_dims=2))},
        {"kernel": fixed_lengthscale()},
        {"kernel": fspace.DeepKernel(nn.Linear(2, 2), MaternKernel())},
        {"kernel": "matern", "likelihood": GaussianLikelihood()},
        {"kernel": "matern", "likelihood": GaussianLikelihood(noise_prior=LogNormalPrior(-1.0, 0.1))},
    ],
)
def test_what_was_passed_in_comes_back_and_can_be_fitted_with(wave, options, tmp_path):
    X, y = wave
    model = fspace.GPRegressor(members=1, **options).fit(X, y)
    loaded = fspace.load(model.save(tmp_path / "m.fspace"))
    for name, passed in options.items():
        got = loaded.get_params()[name]
        assert type(got) is type(passed)
        if isinstance(passed, GaussianLikelihood):
            torch.testing.assert_close(got.noise, passed.noise)
            assert [str(prior) for *_, prior, _, _ in got.named_priors()] == [
                str(prior) for *_, prior, _, _ in passed.named_priors()
            ]
        elif isinstance(passed, nn.Module):
            for one, other in zip(passed.parameters(), got.parameters(), strict=True):
                torch.testing.assert_close(one, other, check_dtype=False)
                assert one.requires_grad == other.requires_grad
    for again in (clone(loaded), fspace.load(loaded.save(tmp_path / "again.fspace"))):
        np.testing.assert_allclose(again.fit(X, y).predict(X), model.predict(X), rtol=0, atol=1e-6)
    other = fspace.GPRegressor(kernel="auto", members=1).fit(X, y)  # what was fitted with before, in silence
    assert np.abs(other.predict(X) - model.predict(X)).max() > 1e-4


# ---- extractors of the user's own ----------------------------------------------------------------


class Waves(nn.Module):
    """A network that fspace has never heard of."""

    out_features = 3

    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(2, width)

    def forward(self, x):
        return torch.sin(self.linear(x))


@pytest.fixture(scope="module")
def own(wave, tmp_path_factory):
    kernel = fspace.DeepKernel(Waves().double(), MaternKernel())
    model = fspace.GPRegressor(kernel=kernel, members=2).fit(*wave)
    return model, model.save(tmp_path_factory.mktemp("own") / "m.fspace")


def test_a_module_of_the_users_own_is_handed_in(wave, own):
    model, path = own
    module = Waves()
    before = module.linear.weight.clone()
    loaded = fspace.load(path, modules={"extractor": module})
    assert same(model, loaded, wave[0])
    first, second = (m.basis.kernel.extractor.linear.weight for m in loaded.posterior_.members)
    assert not torch.equal(first, second)  # each member has its own weights
    assert torch.equal(module.linear.weight, before) and module.linear.weight.dtype == torch.float32


def test_without_the_module_the_error_says_what_to_pass(own):
    with pytest.raises(ModelFileError, match=r"(?s)Waves.*modules=\{'extractor': \.\.\.\}"):
        fspace.load(own[1])
    with pytest.raises(ModelFileError, match=r"(?s)do not fit modules=\{'extractor'.*size mismatch"):
        fspace.load(own[1], modules={"extractor": Waves(width=4)})


# ---- files that are not models -------------------------------------------------------------------


def test_damaged_and_foreign_files_are_refused(wave, tmp_path):
    path = fspace.GPRegressor(kernel="matern").fit(*wave).save(tmp_path / "m.fspace")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello", whole[:2000] + b"\0" * 64 + whole[2064:]):
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError):
            fspace.load(path)
    with pytest.raises(ModelFileError, match="no such file"):
        fspace.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: {**h, "format": 99}, "format 99"),
        (lambda h: {k: v for k, v in h.items() if k != "encoder"}, "damaged"),
        (lambda h: {**h, "members": [{**h["members"][0], "basis_id": "0"}]}, "differs from what was saved"),
        (
            lambda h: {**h, "members": [{**h["members"][0], "kernel": {"type": "os.system", "args": {}}}]},
            "os.system",
        ),
        (lambda h: [h], "damaged"),
        (lambda h: {**h, "members": []}, "damaged"),
        (lambda h: {**h, "encoder": {**h["encoder"], "columns": [{}, {}]}}, "damaged"),
    ],
)
def test_a_header_that_was_tampered_with(wave, tmp_path, change, words):
    path = fspace.GPRegressor(kernel="matern").fit(*wave).save(tmp_path / "m.fspace")
    with zipfile.ZipFile(path) as archive:
        header, tensors = json.loads(archive.read("model.json")), archive.read("model.safetensors")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", json.dumps(change(header)))
        archive.writestr("model.safetensors", tensors)
    with pytest.raises(ModelFileError, match=words):
        fspace.load(path)


def test_a_save_that_fails_leaves_the_earlier_file(wave, tmp_path, monkeypatch):
    model = fspace.GPRegressor(kernel="matern").fit(*wave)
    path = model.save(tmp_path / "m.fspace")
    monkeypatch.setattr("fspace.archive.write_tensors", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(path)
    assert same(model, fspace.load(path), wave[0])


def test_places_that_cannot_be_written_are_named_and_nothing_is_left_there(wave, tmp_path):
    model = fspace.GPRegressor(kernel="matern").fit(*wave)
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "no" / "m", tmp_path / "file" / "m", tmp_path / ("long" * 100), ""):
        with pytest.raises(ModelFileError, match="folder|cannot be written"):
            model.save(place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_process_killed_while_it_saves_leaves_the_earlier_file(wave, tmp_path):
    model = fspace.GPRegressor(kernel="matern").fit(*wave)
    path = model.save(tmp_path / "m.fspace")
    code = (
        "import os, signal, sys, zipfile, fspace\n"
        "model = fspace.load(sys.argv[1])\n"
        "write = zipfile.ZipFile.writestr\n"
        "def half(self, name, data):\n"
        "    write(self, name, data[: len(data) // 2]); self.fp.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "zipfile.ZipFile.writestr = half\n"
        "model.save(sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fspace.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert same(model, fspace.load(path), wave[0])
    model.save(path)  # what the killed process left does not stand in the way
    assert same(model, fspace.load(path), wave[0])


def test_two_threads_may_save_to_one_path(wave, tmp_path):
    models = [fspace.GPRegressor(kernel=kernel).fit(*wave) for kernel in ("matern", "rbf")]
    path = tmp_path / "m.fspace"
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            list(pool.map(lambda model: model.save(path), models))
            loaded = fspace.load(path)
            assert any(same(model, loaded, wave[0]) for model in models)
