"""The progress bar: on a terminal and after a while, nowhere else."""

import threading
import time

import numpy as np
import pytest

import fspace
from fspace import progress as module
from fspace.progress import progress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, for rich, with little patience."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(module, "PATIENCE", 0.05)


def slow(show=True):
    with progress("fitting", show) as tell:
        tell(stage="matern", loss=1.25)
        time.sleep(0.4)
        tell(stage="deep 1", loss=0.5, held_out=-0.75)
        time.sleep(0.3)


def test_stage_and_latest_figure_are_shown_on_a_terminal(terminal, capfd):
    slow()
    out, err = capfd.readouterr()
    assert out == ""
    assert "fitting: matern" in err and "loss 1.25" in err
    assert "fitting: deep 1" in err and "held-out score -0.75" in err
    assert err.endswith("\x1b[2K")  # the bar is wiped away at the end


def test_rows_done_of_a_known_total(terminal, capfd):
    with progress("predicting") as tell:
        tell(done=1500, total=3000)
        time.sleep(0.3)
    assert "1,500 rows" in capfd.readouterr().err


def test_what_is_quick_shows_nothing(terminal, capfd, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 5.0)
    with progress("fitting") as tell:
        tell(stage="matern", loss=1.0)
    assert capfd.readouterr() == ("", "")


def test_silence_without_a_terminal_on_request_and_in_threads(capfd, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    slow()
    monkeypatch.setenv("FORCE_COLOR", "1")
    slow(show=False)
    worker = threading.Thread(target=slow)
    worker.start()
    worker.join()
    assert capfd.readouterr() == ("", "")


def test_the_bar_goes_when_the_work_fails(terminal, capfd):
    with pytest.raises(KeyboardInterrupt), progress("fitting"):
        time.sleep(0.2)
        raise KeyboardInterrupt
    threads = [thread.name for thread in threading.enumerate()]
    time.sleep(0.3)
    after = capfd.readouterr().err
    assert "\x1b[?25h" in after, threads  # the cursor is back
    time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_fit_moves_the_bar(terminal, capfd, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    x = np.random.default_rng(0).standard_normal((300, 2))
    fspace.GPRegressor(kernel="matern").fit(x, x[:, 0])
    assert "loss" in capfd.readouterr().err
    fspace.GPRegressor(kernel="matern", progress=False).fit(x, x[:, 0])
    assert capfd.readouterr().err == ""
