"""What every model refuses, and what survives a killed process."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import fspace.inference.amortized as amortized
from fspace.errors import DataError, DeviceError, FspaceError, NotFittedError, OptionError
from fspace.inference.amortized.model import MODELS, load

QUIET = {"epochs": 2, "progress": False}
T = np.arange(8.0)
PAIRS = ("GPPriorVAE", "TopicsOverTime")
SERIES = ("VRNN", "CausalVAE", "SwitchingLinear", "GPStateSpace")
KILLED = """
import sys
import numpy as np
from fspace.inference.amortized import VAE
x, epochs = np.random.default_rng(0).random((60, 4)), int(sys.argv[1])
model = VAE(2, device="cpu").fit(x, epochs=epochs, patience=10**6, progress=False, checkpoint="run.ckpt")
model.save("x.amortized")
"""


def fitted(name, values, labels=None):
    """A model fitted on values, in the form in which it takes data."""
    model = getattr(amortized, name)(device="cpu")
    if name in PAIRS:
        values = (T, values) if name == "GPPriorVAE" else (values, T)
    elif name in SERIES:
        values = [values] * 3
    if name in ("SemiSupervisedVAE", "VAEKernelGP"):
        return model.fit(values, [0.0, 1.0] * 4, **QUIET)
    return model.fit(values, **QUIET)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "values",
    [
        np.full((8, 2), "a"),
        [[1.0, 2.0], [1.0]] * 4,
        np.ones((8, 2)) + 1j,
        np.ones((8, 0)),
        np.full((8, 2), 1e200),
        np.full((8, 2), np.inf),
        np.array([[{}, {}]] * 8, dtype=object),
    ],
    ids=["text", "ragged", "complex", "no columns", "huge", "infinite", "objects"],
)
def test_what_are_no_numbers(name, values):
    with pytest.raises(DataError) as told:
        fitted(name, values)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", MODELS)
def test_what_makes_no_sense_as_options_or_before_a_fit(name):
    kind = getattr(amortized, name)
    option = "topics" if name == "TopicsOverTime" else "latents"
    for value in (0, -1, True):
        with pytest.raises(OptionError, match=option):
            kind(**{option: value})
    model = kind(device="cpu")
    for ask in (lambda: model.sample(2), lambda: model.encode([np.ones((8, 2))]), lambda: model.save("x")):
        with pytest.raises(NotFittedError, match="not fitted"):
            ask()


def test_tensors_with_a_gradient_and_whole_numbers_are_data():
    x = np.arange(40).reshape(10, 4) % 2
    want = amortized.VAE(2, device="cpu").fit(x.astype(float), **QUIET).log_likelihood(x, 10)
    for same in (
        x,
        x.astype(np.uint8),
        x.astype(bool),
        x.tolist(),
        torch.tensor(x * 1.0, requires_grad=True),
    ):
        assert torch.equal(amortized.VAE(2, device="cpu").fit(same, **QUIET).log_likelihood(x, 10), want)


def test_rows_that_are_all_the_same(recwarn):
    x = np.tile([1.0, 3.0], (12, 1))
    model = amortized.MixtureVAE(2, 4, likelihood="gaussian", device="cpu").fit(x, **QUIET)
    assert (model.reconstruct(x) - torch.tensor(x)).abs().max() < 2 and not recwarn.list
    np.testing.assert_allclose(model.clusters(x).sum(1), 1.0, rtol=1e-5)


def test_a_diverged_model_is_saved_and_a_device_that_is_not_there_is_no_damage(tmp_path):
    x, model = np.random.default_rng(0).random((40, 4)), amortized.VAE(2, device="cpu")
    with pytest.raises(FspaceError, match="diverged"):
        model.fit(x, learning_rate=1e30, **QUIET)
    again = load(model.save(tmp_path / "x.amortized"), "cpu")
    assert again.history_ == model.history_ and bool(again.log_likelihood(x, 10).isfinite().all())
    with pytest.raises(DeviceError):
        load(tmp_path / "x.amortized", "tpu")


def test_a_checkpoint_is_of_one_model_and_its_labels(tmp_path):
    x, y, path = np.random.default_rng(0).random((20, 4)), np.arange(20.0), str(tmp_path / "c")
    amortized.VAE(2, device="cpu").fit(x, checkpoint=path, **QUIET)
    with pytest.raises(FspaceError, match="another run .objective='elbo', not 'iwae'"):
        amortized.VAE(2, objective="iwae", device="cpu").fit(x, checkpoint=path, **QUIET)
    path += "2"
    amortized.VAEKernelGP(2, device="cpu").fit(x, y, checkpoint=path, **QUIET)
    with pytest.raises(FspaceError, match="other data"):
        amortized.VAEKernelGP(2, device="cpu").fit(x, y[::-1].copy(), checkpoint=path, **QUIET)


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL in the middle: the same call ends where a run that nobody killed does."""
    command = lambda epochs: [sys.executable, "-c", KILLED, str(epochs)]  # noqa: E731
    process = subprocess.Popen(command(10**6), cwd=tmp_path)
    while not (tmp_path / "run.ckpt").exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with zipfile.ZipFile(tmp_path / "run.ckpt") as archive:
        done = len(json.loads(archive.read("run.json"))["history"]["held_out"])
    assert not (tmp_path / "x.amortized").exists()
    subprocess.run(command(done + 3), cwd=tmp_path, check=True)
    x = np.random.default_rng(0).random((60, 4))
    whole = amortized.VAE(2, device="cpu").fit(x, epochs=done + 3, patience=10**6, progress=False)
    again = load(tmp_path / "x.amortized", "cpu")
    assert again.history_ == whole.history_
    assert torch.equal(again.log_likelihood(x, 10), whole.log_likelihood(x, 10))
