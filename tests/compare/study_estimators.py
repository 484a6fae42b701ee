"""Estimators that do what a study must survive; in a module, so that they can go to other processes."""

import os
import signal
import time

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin


class Noisy(RegressorMixin, BaseEstimator):
    """Predicts the mean plus noise of its seed; `spread` is its standard deviation. calls: a file that counts fits."""

    def __init__(self, seed=0, spread=1.0, epochs=3, calls=None):
        self.seed, self.spread, self.epochs, self.calls = seed, spread, epochs, calls

    def fit(self, X, y):
        if self.calls:
            with open(self.calls, "a") as file:
                file.write("x")
        self.mean_ = float(np.mean(y))
        return self

    def predict(self, X, return_std=False):
        noise = 0.1 * np.random.default_rng(self.seed).normal(size=len(X))
        return self.mean_ + noise, np.full(len(X), float(self.spread))


class Broken(Noisy):
    """Raises."""

    def fit(self, X, y):
        raise RuntimeError("no\nway")


class NotFinite(Noisy):
    """Predicts NaN at one place."""

    def predict(self, X, return_std=False):
        mean, std = super().predict(X, True)
        mean[2] = np.nan
        return mean, std


class SaysSo(Noisy):
    """Says that it diverged."""

    diverged_ = "the loss became infinite in step 7"


class Slow(Noisy):
    """Never ends by itself; with `keep` it keeps its state when it is interrupted."""

    def __init__(self, seed=0, keep=True):
        super().__init__(seed)
        self.keep = keep

    def fit(self, X, y):
        super().fit(X, y)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if not self.keep:
                raise
            self.interrupted_ = True
        return self


class Dies(Noisy):
    """Takes its process with it."""

    def fit(self, X, y):
        os.kill(os.getpid(), signal.SIGKILL)


class PressesCtrlC(Noisy):
    """Somebody presses Ctrl-C while it fits."""

    def fit(self, X, y):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


class Silent(RegressorMixin, BaseEstimator):
    """Knows no uncertainty."""

    def fit(self, X, y):
        return self

    def predict(self, X):
        return np.zeros(len(X))


class Imports(Noisy):
    """Imports a module that takes longer than the budget, then never ends by itself."""

    def fit(self, X, y):
        import slow_to_import

        assert slow_to_import.WHOLE
        super().fit(X, y)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            self.interrupted_ = True
        return self


class Leaves(Noisy):
    """Calls sys.exit."""

    def fit(self, X, y):
        raise SystemExit("out of licences")


class Tells(Noisy):
    """Writes down its process, then takes long."""

    def __init__(self, file="", seed=0):
        super().__init__(seed)
        self.file = file

    def fit(self, X, y):
        with open(self.file, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
        return super().fit(X, y)
