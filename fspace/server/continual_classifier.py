"""Classification task after task: the scikit-learn front of `learn_task`."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.basis import Basis
from fspace.inference.dirichlet import DirichletLikelihood
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import OffsetLikelihood
from fspace.kernels.deep import DeepKernel, embed, embedded_kernel
from fspace.predictive_base import as_tensor
from fspace.saving import classes_from_json, classes_to_json
from fspace.server.continual import TaskLearned, Tasks, learn_onto
from fspace.server.core import PosteriorServer, unit_scaling
from fspace.targets import label_values

ROWS = 4096  # whose class probabilities are computed at once
VARIANCE = 5.0  # of the functions, which a label wants to be 6.6 higher for its class than for the others
PAIRS = 1000  # rows of the first task between which distances are taken, at most


class ContinualClassifier(ClassifierMixin, BaseEstimator):
    """Gaussian process classification that learns task after task; classes come with the tasks.

    Of a task stay its site and those of its rows that are inducing inputs (without their labels).

    server: where tasks are kept (None: in memory). With a `PosteriorServer` on a file, which must hold nothing else,
        another process goes on where this one ended.
    kernel: a gpytorch kernel, which sees columns as they are, or a `DeepKernel` of features that were learned
        elsewhere; it is held fixed. None: the RBF kernel whose lengthscale is the median distance between rows of the
        first task.
    inducing: most inducing inputs; rows of every task join them, and the best explained are dropped.
    discount: what older tasks say is multiplied by it when a task comes: below 1, they fade (drift).

    Labels are Gaussian observations of one function a class (`DirichletLikelihood`): on inducing inputs that stay, the
    posterior is that of all rows together, whatever the order of the tasks. One more function stands for all classes
    that are yet to come; such a class starts from what older tasks say of it, which is that they do not hold it.

    After learn: classes_, tasks_ (rows of every task), learned_ (what became of the last one, a `TaskLearned`).
    """

    def __init__(self, server: Any = None, kernel: Any = None, inducing: Any = 500, discount: Any = 1.0):
        self.server = server
        self.kernel = kernel
        self.inducing = inducing
        self.discount = discount

    def learn(self, X: Any, y: Any, task: Any) -> ContinualClassifier:
        """Learn a task from X [n, d] (or images, sequences) and labels y [n]; the rows are not needed again.

        Raises a FspaceError for data, options and names that cannot be used; nothing has then changed.
        """
        if self.inducing is None:
            raise OptionError("inducing=None: give the most inducing inputs there may be, a whole number.")
        first = not self.server_.forms()
        x = self._rows(X)
        values = label_values(y, len(x))
        tasks, labels, of_task = (self._first if first else self._known)(x, np.unique(values))
        functions = {label: k for k, label in enumerate(labels.tolist())}
        targets = torch.tensor([functions[label] for label in values.tolist()], dtype=torch.float64)
        rest = {name: classes for name, classes in of_task.items() if name != task}

        def note(basis: Basis) -> None:
            """Which function is of which class."""
            about: dict[str, Any] = {"row": list(x.shape[1:]), "labels": classes_to_json(labels)}
            classes = {**rest, task: np.unique(values)}
            about["tasks"] = {name: classes_to_json(some) for name, some in classes.items()}
            self.server_.attach(f"classes of {basis.id}", json.dumps(about).encode())

        self.learned_: TaskLearned = learn_onto(
            self.server_, tasks, x, targets, task, self.inducing, self.discount, note
        )
        return self

    def _first(self, x: Tensor, classes: np.ndarray) -> tuple[Tasks, np.ndarray, dict[str, np.ndarray]]:
        """No task yet, on one inducing input."""
        if self.kernel is None and x.ndim > 2:
            raise OptionError(
                "kernel=None is for tables [n, d]; pass a DeepKernel whose extractor reads such rows."
            )
        if not isinstance(self.kernel, Kernel | None):
            raise OptionError(f"kernel is a {type(self.kernel).__name__}; pass a gpytorch kernel, or None.")
        kernel = _median_kernel(x) if self.kernel is None else copy.deepcopy(self.kernel)
        if not isinstance(kernel, DeepKernel):  # whose network may have another dtype
            kernel = kernel.double()
        kernel.eval().requires_grad_(False)
        with torch.no_grad():
            z = embed(kernel, x)
        start = z[greedy_variance(embedded_kernel(kernel), z, 1)]
        basis = Basis(kernel, start, _likelihood(len(classes)))
        return Tasks(basis, unit_scaling(basis), {}), classes, {}

    def _known(self, x: Tensor, classes: np.ndarray) -> tuple[Tasks, np.ndarray, dict[str, np.ndarray]]:
        """The tasks so far, with functions for new classes: copies of the one that stands for all that may come."""
        tasks = Tasks.on(self.server_)
        labels, of_task, _ = self._about()
        if _kind(labels) != _kind(classes):
            raise DataError(
                f"y holds labels such as {classes.tolist()[0]!r}, those of earlier tasks are such as "
                f"{labels.tolist()[0]!r}; make them alike."
            )
        new = [label for label in classes.tolist() if label not in labels.tolist()]
        if not new:
            return tasks, labels, of_task
        some = len(labels)
        index = [*range(some), *[some] * len(new), some]
        basis = replace(tasks.basis, likelihood=_likelihood(some + len(new)))
        sites = {
            name: replace(
                site,
                basis_id=basis.id,
                precision=site.precision[index],
                shift=site.shift[index],
                log_scale=site.log_scale[index],
            )
            for name, site in tasks.sites.items()
        }
        labels = np.concatenate([labels, classes[np.isin(classes, new)]])
        return Tasks(basis, unit_scaling(basis), sites), labels, of_task

    def forget(self, task: Any) -> ContinualClassifier:
        """Take a task out: what is left is what learning the others on these inducing inputs gives, exactly.

        Not undone is what does not stand in sites: inducing inputs are rows and may be the task's own, what other tasks
        lost where inducing inputs were dropped for it stays lost, and the first task set the default kernel. It is no
        certified unlearning. Raises OptionError for a task that is not there.
        """
        if task not in self.tasks_:
            raise OptionError(f"There is no task {task!r}; there are {', '.join(self.tasks_) or 'none'}.")
        self.server_.remove(task)
        return self

    @property
    def server_(self) -> PosteriorServer:
        """The server that keeps the tasks. Raises OptionError for what is none."""
        if not isinstance(self.server, PosteriorServer | None):
            raise OptionError(f"server is a {type(self.server).__name__}; pass a PosteriorServer, or None.")
        if self.server is not None:
            return self.server
        if not hasattr(self, "_own"):
            self._own = PosteriorServer()
        return self._own

    @property
    def tasks_(self) -> dict[str, int]:
        """Rows of every task, in the order in which they were learned."""
        if not self.server_.forms():
            return {}
        rows = {about["site_id"]: about["rows"] for about in self.server_.status()["bases"][0]["sites"]}
        return {name: rows[name] for name in self._about()[1] if name in rows}

    @property
    def classes_(self) -> np.ndarray:
        """The classes of all tasks, sorted. Raises NotFittedError before the first task."""
        tasks = self.tasks_
        if not tasks:
            raise NotFittedError("This ContinualClassifier has learned no task; call learn first.")
        of_task = self._about()[1]
        return np.unique(np.concatenate([of_task[name] for name in tasks]))

    @torch.no_grad()
    def predict_proba(self, X: Any, task: Any = None) -> np.ndarray:
        """Probabilities [n, c] of the classes, in the order of classes_.

        task: where it is known which task the rows are of, only its classes are possible. Raises NotFittedError before
        the first task, OptionError for a task that is not there, DataError for rows that do not fit.
        """
        classes, tasks = self.classes_, self.tasks_
        if task is not None and task not in tasks:
            raise OptionError(f"There is no task {task!r}; there are {', '.join(tasks)}.")
        labels, of_task, _ = self._about()
        possible = classes if task is None else of_task[task]
        functions = [labels.tolist().index(label) for label in possible.tolist()]
        x, posterior = self._rows(X), self.server_.posterior()
        found = torch.cat([posterior.observed(part).probs[:, functions] for part in x.split(ROWS)])
        probs = np.zeros((len(x), len(classes)))
        probs[:, np.searchsorted(classes, possible)] = (found / found.sum(1, keepdim=True)).cpu().numpy()
        return probs

    def predict(self, X: Any, task: Any = None) -> np.ndarray:
        """The most probable class of every row; task as in `predict_proba`."""
        return self.classes_[self.predict_proba(X, task).argmax(axis=1)]

    def _about(self) -> tuple[np.ndarray, dict[str, np.ndarray], list[int]]:
        """The class of every function, the classes of every task that was ever learned, and the shape of a row."""
        serving = next(iter(self.server_.forms()))
        content = self.server_.attachment(f"classes of {serving}")
        if content is None:
            raise OptionError("The server was not made by a ContinualClassifier; pass another one.")
        about = json.loads(content)
        of_task = {name: classes_from_json(saved) for name, saved in about["tasks"].items()}
        return classes_from_json(about["labels"]), of_task, about["row"]

    def _rows(self, X: Any) -> Tensor:
        """X in float64. Raises DataError for what is not finite or of another shape than rows of the first task."""
        x = as_tensor(X, None, "X").to(torch.float64)
        if x.ndim < 2 or 0 in x.shape:
            raise DataError(f"X must have shape [n, d], none of them 0; it has {list(x.shape)}.")
        bad = ~x.reshape(len(x), -1).isfinite().all(1)
        if bool(bad.any()):
            raise DataError(
                f"X holds NaN or infinite values (row {int(bad.nonzero()[0])}); remove such rows."
            )
        row = self._about()[2] if self.server_.forms() else list(x.shape[1:])
        if list(x.shape[1:]) != row:
            raise DataError(
                f"X has rows of shape {list(x.shape[1:])}; those of the first task were of {row}."
            )
        return x


def _likelihood(classes: int) -> OffsetLikelihood:
    """Of so many classes and of all that may come, around what is observed of a class that a row is not of."""
    inner = DirichletLikelihood(classes + 1)
    offset = torch.full((classes + 1,), inner.unlabelled, dtype=torch.float64)
    return OffsetLikelihood(inner, offset).requires_grad_(False)


def _median_kernel(x: Tensor) -> ScaleKernel:
    some = x[:: -(-len(x) // PAIRS)]
    kernel = ScaleKernel(RBFKernel()).double()
    median = torch.pdist(some).median() if len(some) > 1 else torch.tensor(0.0)
    kernel.base_kernel.lengthscale = median if median > 0 else 1.0
    kernel.outputscale = VARIANCE
    return kernel


def _kind(labels: np.ndarray) -> str:
    """Labels of one kind can stand beside each other."""
    return {"i": "number", "u": "number", "f": "number", "U": "text", "S": "text"}.get(
        labels.dtype.kind, labels.dtype.kind
    )
