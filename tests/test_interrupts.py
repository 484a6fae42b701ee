"""Ctrl-C waits for the end of a step."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

import fspace
from fspace.inference import finish
from fspace.interrupts import interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_waits_until_asked_for_and_the_second_does_not():
    with interrupts() as held:
        press()
        assert held.waiting
        with pytest.raises(KeyboardInterrupt):
            held.check()
        held.check()  # once is enough
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_threads_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with interrupts() as held:
            press()
        assert seen == [1] and not held.waiting
    finally:
        signal.signal(signal.SIGINT, before)

    def inside():
        with interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen[1] is signal.default_int_handler


def data():
    X = np.random.default_rng(0).uniform(-3.0, 3.0, (120, 1))
    return X, np.sin(X[:, 0])


def test_gradients_are_on_after_an_interrupt_inside_no_grad(monkeypatch):
    X, y = data()
    chosen, calls = finish.inducing_inputs, []

    def slow(*args):
        calls.append(1)
        if len(calls) == 1:
            with torch.no_grad():
                press()
        return chosen(*args)

    monkeypatch.setattr(finish, "inducing_inputs", slow)
    with pytest.warns(UserWarning, match=r"Interrupted while fitting deep 2; .* kept \(deep 1, deep 2\)"):
        model = fspace.GPRegressor(kernel="deep", members=5).fit(X, y)
    assert torch.is_grad_enabled() and model.interrupted_
    assert np.isfinite(model.predict(X)).all()


def test_an_interrupt_in_the_last_steps_is_told(monkeypatch):
    X, y = data()
    finished = finish._freeze

    def late(*args):
        finished(*args)
        press()

    monkeypatch.setattr(finish, "_freeze", late)
    with pytest.warns(UserWarning, match="Interrupted while fitting the last steps"):
        model = fspace.GPRegressor(kernel="matern").fit(X, y)
    assert model.interrupted_ and model.score(X, y) > 0.9
