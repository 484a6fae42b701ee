"""Training an amortised model by minibatches: a bound on held-out rows says when to stop, the best state stays, and a
checkpoint lets an interrupted run go on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fspace.archive import read_archive, write_archive
from fspace.errors import DataError, ModelFileError, NumericalError, OptionError
from fspace.inference.amortized import checks
from fspace.interrupts import interrupts
from fspace.predictive_base import check_seed
from fspace.progress import progress

Rows: TypeAlias = tuple[Tensor, ...]  # tensors of one length: what row i is, is at [i] of each


class Step(NamedTuple):
    """A bound on the log evidence of every row [B] (nats, no gradient asked of it), and what to ascend: pairs of a
    scalar and the parameters that follow its gradient."""

    bound: Float[Tensor, " b"]
    ascents: Sequence[tuple[Float[Tensor, ""], Sequence[nn.Parameter]]]


class Trainable(nn.Module):
    """A module that can be trained by `train`."""

    @abstractmethod
    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        """The objective on some rows."""

    @abstractmethod
    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        """The bound that held-out rows are judged by, of every row."""

    history_: History

    def options(self) -> dict[str, Any]:
        """What else must be the same for a run to go on from a checkpoint, as JSON."""
        return {}

    def begin(self, rows: Rows) -> None:
        """Called once with all training rows, before the first step."""


@dataclass(frozen=True)
class Plan:
    """How to train. patience: passes over the rows without a better held-out bound; held_out: share of the rows;
    checkpoint: a file that is written after every pass, and gone on from where it is there."""

    epochs: int = 200
    batch_size: int = 100
    learning_rate: float = 1e-3
    patience: int = 20
    held_out: float = 0.1
    clip: float = 100.0  # largest norm of a gradient
    seed: int = 0
    progress: bool = True
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            checks.count(getattr(self, name), name)
        for name in ("learning_rate", "clip"):
            if not _number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)!r} must be a positive number.")
        if not _number(self.held_out) or not 0 < self.held_out < 1:
            raise OptionError(f"held_out={self.held_out!r} must be between 0 and 1.")
        check_seed(self.seed)
        if self.checkpoint is not None and not isinstance(self.checkpoint, str | Path):
            raise OptionError(f"checkpoint={self.checkpoint!r} must be the path of a file.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plan_of(options: dict[str, Any]) -> Plan:
    """The plan of these options. Raises OptionError for one that there is not, or a value that makes no sense."""
    known = [option.name for option in fields(Plan)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"{unknown[0]!r} is no option of `fit`; `fit` takes {', '.join(known)}.")
    return Plan(**options)


@dataclass
class History:
    """What happened in every pass: the mean bound of training and of held-out rows (nats). stopped: why it ended:
    "patience", "epochs", "interrupted", "diverged"."""

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best_epoch: int = -1
    stopped: str = ""


def train(model: Trainable, rows: Rows, plan: Plan, judged: Rows | None = None) -> History:
    """Train in place; the state with the best held-out bound stays. Ctrl-C ends between two steps with that state.

    judged: rows to hold out (None: `plan.held_out` of the rows, at random).

    Raises DataError for fewer than two rows, NumericalError where training diverges (the best state so far is then in
    place, and what led there in history_), ModelFileError for a checkpoint of another run.
    """
    n, given = (
        len(rows[0]),
        (*rows, *(judged or ()), *model.buffers()),
    )  # buffers: labels, where a model has such
    generator = torch.Generator(device=rows[0].device).manual_seed(plan.seed)
    kept = rows
    if judged is None:
        if n < 2:
            raise DataError(f"There must be at least 2 rows to train on and to hold out; there is {n}.")
        order = torch.randperm(n, generator=generator, device=rows[0].device)
        held = max(1, min(n - 1, round(plan.held_out * n)))
        judged, kept = tuple(r[order[:held]] for r in rows), tuple(r[order[held:]] for r in rows)
    model.begin(kept)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, plan.learning_rate)
    run = _Run(model, optimiser, generator, plan, given)
    run.resume()
    model.history_ = run.history
    try:
        with interrupts() as held_back, progress("training", plan.progress) as tell:
            while run.more():
                run.history.train.append(_epoch(run, kept, parameters, held_back.check))
                run.judge(judged)
                tell(held_out=run.history.held_out[-1], done=len(run.history.train), total=plan.epochs)
                run.keep()
    except KeyboardInterrupt:
        run.stop("interrupted")
    except (ArithmeticError, RuntimeError, ValueError) as error:
        lost = not all(bool(p.isfinite().all()) for p in parameters)
        told = isinstance(error, DataError | OptionError | NumericalError)
        if not run.steps or not (
            lost or told
        ):  # where nothing has moved yet, the error is about what was given
            raise
        run.stop("diverged")
        raise NumericalError(
            f"Training diverged in pass {len(run.history.held_out) + 1}: {error} Lower the learning rate "
            f"({plan.learning_rate:g}) or scale the data."
        ) from error
    finally:
        run.restore()
        model.eval()
    return run.history


def hold_out(known: Bool[Tensor, " n"], plan: Plan) -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
    """Positions of rows to train on, and of rows to hold out: at random, rows without a label (known: who has one)
    before others, so that no label is lost where there are few. Raises DataError for fewer than two rows."""
    n = len(known)
    if n < 2:
        raise DataError(f"There must be at least 2 rows to train on and to hold out; there is {n}.")
    generator = torch.Generator(device=known.device).manual_seed(plan.seed)
    order = torch.randperm(n, generator=generator, device=known.device)
    order = order[known[order].long().argsort(stable=True)]
    held = max(1, min(n - 1, round(plan.held_out * n)))
    return order[held:], order[:held]


def _epoch(run: _Run, rows: Rows, parameters: list[nn.Parameter], check: Any) -> float:
    n, total = len(rows[0]), torch.zeros((), dtype=torch.float64, device=rows[0].device)
    run.model.train()
    order = torch.randperm(n, generator=run.generator, device=rows[0].device)
    for picked in order.split(run.plan.batch_size):
        check()
        step = run.model.step(tuple(r[picked] for r in rows), run.generator)
        run.optimiser.zero_grad(set_to_none=True)
        for k, (ascent, own) in enumerate(step.ascents):
            own = [p for p in own if p.requires_grad]
            grads = torch.autograd.grad(
                -ascent, own, retain_graph=k + 1 < len(step.ascents), allow_unused=True
            )
            for parameter, grad in zip(own, grads):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        torch.nn.utils.clip_grad_norm_(parameters, run.plan.clip)
        run.optimiser.step()
        run.steps += 1
        total += step.bound.detach().to(torch.float64).sum()
    return total.item() / n


class _Run:
    """What a run is made of, and how it is written down."""

    def __init__(self, model: Trainable, optimiser: Any, generator: torch.Generator, plan: Plan, rows: Rows):
        self.model, self.optimiser, self.generator, self.plan, self.rows = (
            model, optimiser, generator, plan, rows,
        )  # fmt: skip
        self.history, self.steps = History(), 0
        self.best = _copied(model.state_dict())
        self.about = self._about() if plan.checkpoint is not None else {}

    def more(self) -> bool:
        done, best = len(self.history.train), self.history.best_epoch
        if done >= self.plan.epochs:
            self.history.stopped = "epochs"
        elif done - 1 - best >= self.plan.patience:
            self.history.stopped = "patience"
        return not self.history.stopped

    def judge(self, rows: Rows) -> None:
        """The held-out bound, with the same random numbers every time."""
        self.model.eval()
        fixed = torch.Generator(device=rows[0].device).manual_seed(self.plan.seed)
        with torch.no_grad():
            parts = zip(*(r.split(self.plan.batch_size) for r in rows))
            score = (
                torch.cat([self.model.score(part, fixed) for part in parts]).to(torch.float64).mean().item()
            )
        if not math.isfinite(score):
            raise NumericalError(f"The held-out bound is {score}.")
        best = self.history.best_epoch
        if best < 0 or score > self.history.held_out[best]:
            self.history.best_epoch, self.best = len(self.history.held_out), _copied(self.model.state_dict())
        self.history.held_out.append(score)

    def stop(self, why: str) -> None:
        """End within a pass, which does not count."""
        self.history.train = self.history.train[: len(self.history.held_out)]
        self.history.stopped = why

    def restore(self) -> None:
        self.model.load_state_dict(self.best)

    def _about(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        free = ("epochs", "patience", "progress", "checkpoint")
        plan = {name: value for name, value in asdict(self.plan).items() if name not in free}
        options = {name: value for name, value in self.model.options().items() if name != "device"}
        about = {"class": type(self.model).__name__, "rows": len(self.rows[0])} | plan | options
        return json.loads(json.dumps(about | {"data": _digest(self.rows)}))

    def keep(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.plan.checkpoint is None:
            return
        tensors = {f"now.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        header = {"about": self.about, "history": asdict(self.history)}
        path = Path(self.plan.checkpoint)
        write_archive(path, "run", json.dumps(header), tensors, f"checkpoint={str(path)!r}")

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if self.plan.checkpoint is None or not Path(self.plan.checkpoint).exists():
            return
        path = self.plan.checkpoint
        foreign = f"checkpoint={str(path)!r} is no checkpoint, or damaged"
        header, tensors = read_archive(path, "run", foreign)
        theirs = header.get("about", {})
        other = [k for k, value in self.about.items() if theirs.get(k) != value]
        if other:
            words = [f"{k}={theirs.get(k)!r}, not {self.about[k]!r}" for k in other if k != "data"]
            raise ModelFileError(
                f"checkpoint={str(path)!r} is of another run ({', '.join(words) or 'other data'}); name another file, "
                "or remove it to start again."
            )
        part = lambda name: {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}  # noqa: E731
        try:
            self.model.load_state_dict(part("now."))
            self.best = part("best.")
            state = self.optimiser.state_dict()
            for name, value in part("optimiser.").items():
                i, _, key = name.partition(".")
                state["state"].setdefault(int(i), {})[key] = value
            self.optimiser.load_state_dict(state)
            self.generator.set_state(tensors["generator"])
            self.history = History(**header["history"])
            self.history.stopped = ""
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ModelFileError(f"checkpoint={str(path)!r} does not fit this model: {error}") from error


def _digest(rows: Rows) -> str:
    """Tells rows from others."""
    found = hashlib.sha256()
    for part in rows:
        found.update(f"{part.dtype} {list(part.shape)}".encode())
        found.update(part.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}
