"""What all amortised models have in common: exports, options, files read in a new process, training that goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fspace.inference.amortized as amortized
from fspace.inference.amortized.model import MODELS, AmortizedModel

LOADED = """
import sys
import fspace.inference.amortized as amortized
names = dir(amortized)
assert "torch" not in sys.modules, "names alone import torch"
assert amortized.smc.filter and amortized.VAE.__name__ in names
"""


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_exported_and_keeps_its_options(name):
    kind = getattr(amortized, name)
    assert issubclass(kind, AmortizedModel) and kind.__module__ == MODELS[name] and name in amortized.__all__
    model = kind(latents=3, device="cpu") if name != "TopicsOverTime" else kind(topics=3, device="cpu")
    assert type(model)(**model.options()).options() == model.options()


def test_models_are_all_in_the_registry():
    exported = [getattr(amortized, name) for name in amortized.__all__]
    kinds = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, AmortizedModel)]
    assert {kind.__name__ for kind in kinds} - {"AmortizedModel"} == set(MODELS)


def test_names_are_imported_when_used():
    subprocess.run([sys.executable, "-c", LOADED], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = amortized.nothing


RNG = np.random.default_rng(0)
ROWS = (RNG.random((24, 6)) < 0.5).astype(np.float32)
IMAGES = (RNG.random((24, 1, 5, 5)) < 0.5).astype(np.float32)
BITS = [(RNG.random((n, 3)) < 0.5).astype(float) for n in (5, 7, 6, 8)]
SERIES = [RNG.standard_normal((n, 2)) for n in (8, 9, 8, 10)]
TIMED = [(np.arange(9.0), RNG.standard_normal((9, 4))) for _ in range(4)]
WORDS = (RNG.poisson(2.0, (24, 12)), np.arange(24.0))
SMALL = {  # constructor, what it is fitted on, what it is asked about
    "VAE": ({"latents": 2, "widths": (8,)}, (ROWS,), ROWS),
    "MixtureVAE": ({"latents": 2, "components": 2, "widths": (8,)}, (ROWS,), ROWS),
    "SemiSupervisedVAE": ({"latents": 2, "widths": (8,)}, (ROWS, ["a", "b", None] * 8), ROWS),
    "DRAW": ({"latents": 2, "hidden": 8, "steps": 2, "patch": 2}, (IMAGES,), IMAGES),
    "VRNN": ({"latents": 2, "hidden": 6}, (BITS,), BITS),
    "CausalVAE": ({"latents": 2, "channels": 4, "dilations": (1, 2)}, (BITS,), BITS),
    "SwitchingLinear": ({"components": 2, "particles": 3}, (SERIES,), SERIES),
    "GPPriorVAE": ({"latents": 2, "inducing": 5, "widths": (6,)}, (TIMED,), TIMED),
    "GPStateSpace": ({"latents": 2, "inducing": 5, "particles": 3, "hidden": 5}, (SERIES,), SERIES),
    "VAEKernelGP": ({"latents": 2, "widths": (6,)}, (ROWS, ROWS[:, 0] + 0.1), ROWS),
    "TopicsOverTime": ({"topics": 2, "inducing": 5, "widths": (6,), "samples": 2}, (WORDS,), WORDS),
}  # fmt: skip


def fitted(name, epochs, **plan):
    options, data, _ = SMALL[name]
    model = getattr(amortized, name)(**options, device="cpu")
    return model.fit(*data, epochs=epochs, batch_size=10, progress=False, **plan)


@pytest.fixture(scope="module")
def models():
    return {name: fitted(name, 4) for name in MODELS}


def likely(model, name):
    return model.log_likelihood(SMALL[name][2], 20, seed=1).double()


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_as_if_nothing_had_happened(models, name, tmp_path):
    path = str(tmp_path / "run.ckpt")
    early = fitted(name, 2, checkpoint=path)
    again = fitted(name, 4, checkpoint=path)
    assert again.history_ == models[name].history_ and len(early.history_.train) == 2
    torch.testing.assert_close(likely(again, name), likely(models[name], name), rtol=1e-6, atol=1e-6)


NEW_PROCESS = """
import json, sys
import torch
from test_front import SMALL, amortized, likely
found = {name: likely(amortized.load(f"{sys.argv[1]}/{name}.amortized", "cpu"), name).tolist() for name in SMALL}
print(json.dumps(found))
"""


def test_files_say_the_same_in_a_new_process(models, tmp_path):
    assert set(SMALL) == set(MODELS)
    for name, model in models.items():
        model.save(tmp_path / f"{name}.amortized")
    command = [sys.executable, "-c", NEW_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    for name, values in json.loads(done.stdout.splitlines()[-1]).items():
        torch.testing.assert_close(
            torch.tensor(values).double(), likely(models[name], name), rtol=1e-5, atol=1e-5
        )


def test_the_page_names_every_model_and_its_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[3] / "docs" / "amortised_models.md").read_text()
    assert all(f"`{name}" in text for name in MODELS)
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "amortised_models.md", "exec"), space)
    assert torch.equal(space["again"].encode(space["images"]).mean, space["q"].mean)
    truth = np.sin(6 * space["t"][10:15])
    assert np.abs(space["filled"][10:15].numpy() - truth[:, None]).max() < 0.5
    assert space["lower"].shape == (40, 1) and all(len(f) == 40 for f in space["draws"])
