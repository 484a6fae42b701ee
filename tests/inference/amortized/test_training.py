"""The training loop: best state, patience, interruption and going on, on a model whose answer is known."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from fspace.errors import DataError, ModelFileError, NumericalError, OptionError
from fspace.inference.amortized.training import Plan, Step, Trainable, plan_of, train

QUIET = {"progress": False}


class Mean(Trainable):
    """A Gaussian with unknown mean and noise in its objective, so that the generator matters."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.mean, self.noise, self.after = nn.Parameter(torch.zeros(2)), noise, None

    def _bound(self, x):
        return -0.5 * (x - self.mean).square().sum(-1) - 1.8378770664

    def step(self, rows, generator):
        (x,) = rows
        bound = self._bound(x + self.noise * torch.randn(x.shape, generator=generator))
        if self.after is not None:
            self.after()
        return Step(bound.detach(), [(bound.mean(), [self.mean])])

    def score(self, rows, generator):
        return self._bound(rows[0])


def data(n=200):
    return (torch.randn(n, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([1.0, -2.0]),)


def test_finds_the_mean_and_stops_by_patience():
    model, rows = Mean(), data(2000)  # 200 are held out: their mean is within 0.15 by two standard errors
    history = train(model, rows, Plan(epochs=500, learning_rate=0.05, patience=10, **QUIET))
    assert history.stopped == "patience"
    assert history.held_out[history.best_epoch] == max(history.held_out)
    assert (model.mean - rows[0].mean(0)).abs().max() < 0.15
    kept = model.score(rows, None).mean()
    model.mean.data += 0.5  # the twin: a state further off is worse
    assert model.score(rows, None).mean() < kept


def test_same_seed_same_run():
    first, again, other = Mean(), Mean(), Mean()
    plan = dict(epochs=5, **QUIET)
    assert train(first, data(), Plan(**plan)) == train(again, data(), Plan(**plan))
    assert torch.equal(first.mean, again.mean)
    train(other, data(), Plan(seed=1, **plan))
    assert not torch.equal(first.mean, other.mean)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, rows = Mean(), data()
    expected = train(whole, rows, Plan(epochs=12, **QUIET))
    path = str(tmp_path / "run.zip")
    model, steps = Mean(), []

    def press():
        steps.append(1)
        if len(steps) == 13:  # within a pass
            os.kill(os.getpid(), signal.SIGINT)

    model.after = press
    assert train(model, rows, Plan(epochs=12, checkpoint=path, **QUIET)).stopped == "interrupted"
    again = Mean()
    found = train(again, rows, Plan(epochs=12, checkpoint=path, **QUIET))
    assert found == expected
    assert torch.equal(again.mean, whole.mean)
    assert 0 < len(steps) < 24


def test_checkpoints_of_other_runs_and_damaged_ones(tmp_path):
    path = tmp_path / "run.zip"
    train(Mean(), data(), Plan(epochs=2, checkpoint=str(path), **QUIET))
    with pytest.raises(ModelFileError, match="another run"):
        train(Mean(), data(), Plan(epochs=2, seed=3, checkpoint=str(path), **QUIET))
    with pytest.raises(ModelFileError, match="other data"):  # of the same shape
        train(Mean(), (data()[0] + 1e-6,), Plan(epochs=2, checkpoint=str(path), **QUIET))
    other = Mean()
    other.options = lambda: {"beta": 4.0}
    with pytest.raises(ModelFileError, match="beta=None, not 4.0"):
        train(other, data(), Plan(epochs=2, checkpoint=str(path), **QUIET))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="damaged"):
        train(Mean(), data(), Plan(epochs=2, checkpoint=str(path), **QUIET))
    with pytest.raises(ModelFileError, match="cannot be written"):
        train(Mean(), data(), Plan(epochs=2, checkpoint=str(Path(tmp_path, "no", "run.zip")), **QUIET))


def test_nan_is_told_and_the_best_state_kept():
    model, rows = Mean(), data()
    steps = []

    def spoil():
        steps.append(1)
        if len(steps) == 6:
            model.mean.data.fill_(float("nan"))

    model.after = spoil
    with pytest.raises(NumericalError, match="diverged in pass 2.*Lower the learning rate"):
        train(model, rows, Plan(epochs=20, batch_size=50, **QUIET))
    assert model.history_.stopped == "diverged" and len(model.history_.held_out) == 1
    assert bool(model.mean.isfinite().all()) and bool((model.mean != 0).any())


def test_only_divergence_is_called_so():
    """An error of the first step is about what was given; one of torch is about training if parameters are lost."""
    for spoilt, after, kind, words in (
        (True, 3, NumericalError, "diverged"),
        (False, 3, RuntimeError, "^torch"),
        (False, 1, DataError, "^given"),
        (False, 3, NumericalError, "diverged in pass 1: given"),
    ):
        model, steps = Mean(), []

        def fail(model=model, steps=steps, after=after, spoilt=spoilt, words=words):
            steps.append(1)
            if len(steps) == after:
                if spoilt:
                    model.mean.data.fill_(float("nan"))
                raise DataError("given") if "given" in words else RuntimeError("torch")

        model.after = fail
        with pytest.raises(kind, match=words):
            train(model, data(), Plan(epochs=20, batch_size=20, **QUIET))
        assert bool(model.mean.isfinite().all())


def test_bad_plans_and_too_few_rows():
    for name in ("epochs", "batch_size", "patience"):
        with pytest.raises(OptionError, match=name):
            Plan(**{name: 0})
        with pytest.raises(OptionError, match="whole number"):
            plan_of({name: True})
    for name in ("learning_rate", "held_out", "clip"):
        with pytest.raises(OptionError, match=name):
            Plan(**{name: 0.0})
    for name, value in (("learning_rate", float("nan")), ("held_out", float("nan")), ("seed", -1)):
        with pytest.raises(OptionError, match=name):
            plan_of({name: value})
    with pytest.raises(DataError, match="at least 2 rows"):
        train(Mean(), data(1), Plan(**QUIET))
