"""What all amortised models have in common: they are exported, files may name them, options are what was given."""

import subprocess
import sys

import pytest

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
