"""What every test shares: shapes checked while the tests run, seeds, devices and the data folder."""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

# Before fspace is first imported: shapes (`Float[Tensor, "n d"]`) and types are then checked at every call.
# FSPACE_CHECK_SHAPES=0 turns it off, to see whether a failure is the check's or the code's.
if os.environ.get("FSPACE_CHECK_SHAPES", "1") != "0":
    from jaxtyping import install_import_hook

    install_import_hook("fspace", "beartype.beartype")

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

NO_CUDA = "needs a CUDA device, and torch sees none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for a test whatever ran before it."""
    np.random.seed(0)  # noqa: NPY002  libraries under comparison draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line: (exit status, stdout, stderr)."""
    from fspace import cli

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["fspace", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture(scope="session")
def fspace_data() -> Path:
    """The folder of published data sets, from the variable FSPACE_DATA."""
    folder = os.environ.get("FSPACE_DATA")
    if not folder:
        pytest.skip("needs the published data sets: set FSPACE_DATA to the folder that holds uci/")
    path = Path(folder)
    if not (path / "uci").is_dir():
        pytest.skip(f"FSPACE_DATA is {folder}, which holds no folder uci/")
    return path


@pytest.fixture(autouse=True, scope="session")
def python_handles_interrupts():
    """Also where the tests run in the background of a shell, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
