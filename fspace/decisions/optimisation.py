"""Bayesian optimisation by ask and tell, with any posterior over functions as the model.

Between refits a new observation is one more site (`posterior.condition`): no kernel parameter moves. Whatever was told
is on the disk when `tell` returns, where a state file is given.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from botorch.utils.multi_objective.pareto import is_non_dominated
from jaxtyping import Bool, Float
from sklearn.base import clone
from torch import Tensor

from fspace.decisions.acquisitions import (
    ACQUISITIONS,
    Constraint,
    acquisition,
    candidates,
    fresh,
    fulfilled,
    search,
    thompson,
)
from fspace.decisions.journal import read_state, write_state
from fspace.decisions.models import named_model
from fspace.decisions.sources import MOST
from fspace.decisions.space import Space, parse_constraint
from fspace.errors import DataError, InfeasibleError, ModelFileError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import Categorical, check_count
from fspace.predictive_base import check_seed, check_whole

GOALS = {"maximize": 1.0, "minimize": -1.0}
FAILED = "Of an experiment that failed tell nothing; `drop` it."


class Tried(NamedTuple):
    """A configuration and what was observed there, by name of the outcome."""

    configuration: dict[str, Any]
    values: dict[str, float]


class Optimizer:
    """Proposes configurations (`ask`) and learns from what came of them (`tell`).

    space: a `Space`, or settings for one. objectives: "minimize" or "maximize" (of one outcome, "y"), or {"a":
    "minimize", "b": "maximize"} for one or several. constraints: linear, on the space ("x + z <= 1") or on outcomes
    ("heat <= 3", of an outcome that is measured too). model: "matern", "rbf", "neural" or "deep" (GPs), "ensemble",
    "laplace", "hmc" or another method of networks (`named_model`); an estimator of one outcome; or a function (z [n, d]
    in the unit cube, y [n]) -> FunctionPosterior. acquisition: "auto", or one of ACQUISITIONS. initial: random
    configurations before the model is asked (None: twice the settings, at least 4). refit: the model is fitted anew
    when this many times as many observations are there as at its last fit; in between it is conditioned, where it can
    be (networks are always fitted anew). state: a file to go on from, written at every ask and tell. Raises
    OptionError, InfeasibleError.
    """

    def __init__(
        self,
        space: Space | Mapping[str, Any],
        objectives: str | Mapping[str, str] = "minimize",
        constraints: Sequence[str] = (),
        model: Any = "matern",
        acquisition: str = "auto",
        initial: int | None = None,
        refit: float = 1.05,
        state: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ):
        if not isinstance(objectives, str | Mapping):
            raise OptionError(f"objectives={objectives!r}: give 'minimize', 'maximize' or {{outcome: goal}}.")
        self.goals = {"y": objectives} if isinstance(objectives, str) else dict(objectives)
        for name, goal in self.goals.items():
            if goal not in GOALS:
                raise OptionError(
                    f"objective {name!r}: {goal!r} is no goal; choose 'minimize' or 'maximize'."
                )
        if not self.goals:
            raise OptionError("There is no objective; give for example objectives='minimize'.")
        if not isinstance(refit, int | float) or not refit >= 1:
            raise OptionError(f"refit={refit!r} must be at least 1, which fits anew after every observation.")
        if acquisition != "auto" and acquisition not in ACQUISITIONS:
            raise OptionError(
                f"acquisition={acquisition!r} does not exist; choose 'auto' or one of {', '.join(ACQUISITIONS)}."
            )
        several = len(self.goals) > 1
        if (
            several
            and acquisition in ("qLogNEI", "qLogEI", "qUCB")
            or acquisition == "qLogNEHVI"
            and not several
        ):
            raise OptionError(
                f"acquisition={acquisition!r} does not fit {len(self.goals)} objectives; take 'auto'."
            )
        self.acquisition = ("qLogNEHVI" if several else "qLogNEI") if acquisition == "auto" else acquisition
        self.space, outcome_texts = _split(space, constraints)
        self.outcomes = list(self.goals)
        self.constraint_texts = outcome_texts
        for text in outcome_texts:
            self.outcomes += [name for name in parse_constraint(text)[0] if name not in self.outcomes]
        self.signs = torch.tensor(
            [GOALS[self.goals.get(name, "maximize")] for name in self.outcomes]
        ).double()
        self.constraints = [self._constraint(text) for text in outcome_texts]
        if self.constraints and acquisition == "qUCB":
            raise OptionError("acquisition='qUCB' knows no constraints on outcomes; take 'qLogNEI'.")
        self.refit, self.seed = float(refit), check_seed(seed)
        self.model = named_model(model, self.seed) if isinstance(model, str) else model
        if not hasattr(self.model, "get_params") and not callable(self.model) or isinstance(model, type):
            raise OptionError(
                f"model={model!r}: pass a name, an estimator, or a function of (z, y) that gives a posterior."
            )
        self.initial = (
            max(4, 2 * len(self.space.settings)) if initial is None else check_whole("initial", initial)
        )
        self.told: list[Tried] = []
        self.pending: list[dict[str, Any]] = []
        self.seconds: list[float] = []  # that each ask took
        self._asked = 0
        self._posteriors: list[FunctionPosterior] = []
        self._fitted_on = self._known = 0
        if state is not None and not isinstance(state, str | os.PathLike):
            raise OptionError(f"state={state!r} is no name of a file.")
        self.path = None if state is None else Path(state)
        if self.path is not None and self.path.exists():
            self._restore(read_state(self.path))

    def _constraint(self, text: str) -> Constraint:
        """(a, b) over the signed outcomes."""
        terms, bound = parse_constraint(text)
        a = torch.zeros(len(self.outcomes), dtype=torch.float64)
        for name, factor in terms.items():
            k = self.outcomes.index(name)
            a[k] = factor * self.signs[k]
        return a, bound

    def __repr__(self) -> str:
        """Goals, and how much was told: what a notebook shows of what `optimize` returned."""
        goals = ", ".join(f"{goal} {name}" for name, goal in self.goals.items())
        return (
            f"Optimizer({goals}; {len(self.told)} told, {len(self.pending)} pending; see best, pareto, told)"
        )

    # ---- ask and tell ---------------------------------------------------------------------------

    def ask(self, count: int = 1) -> list[dict[str, Any]]:
        """Configurations to try next, chosen together and beside what is pending. Raises InfeasibleError where fewer
        are left; then nothing is pending that was not."""
        started = time.perf_counter()
        pending, asked = list(self.pending), self._asked
        try:
            for _ in range(check_whole("count", count)):
                self.pending.append(self._propose())
                self._asked += 1
            self._save()
        except BaseException:  # an interrupt too: what nobody was given nobody will try
            self.pending, self._asked = pending, asked
            raise
        self.seconds.append(time.perf_counter() - started)
        return [dict(configuration) for configuration in self.pending[len(pending) :]]

    def tell(self, configurations: Any, values: Any) -> None:
        """What came of configurations (one, or a list), pending or not: a number (one outcome) or {outcome: number}.

        The same configuration may be told several times: observations are noisy. Raises DataError for NaN (use `drop`
        for an experiment that failed), other outcomes, or a configuration outside the space, ModelFileError where the
        state cannot be written; then nothing is taken in.
        """
        many = isinstance(configurations, list | tuple)
        rows = list(configurations) if many else [configurations]
        if many and (isinstance(values, Mapping | str) or not hasattr(values, "__len__")):
            raise DataError(f"There are {len(rows)} configurations; give as many results, not {values!r}.")
        results = list(values) if many else [values]
        if len(rows) != len(results) or not rows:
            raise DataError(f"There are {len(results)} results for {len(rows)} configurations.")
        observed = [self._values(i, result) for i, result in enumerate(results)]
        z = self.space.encode(rows)
        outside = ~self.space.feasible(z)
        if bool(outside.any()):
            raise DataError(
                f"Configuration {int(outside.nonzero()[0])} breaks {' or '.join(map(repr, self.space.constraints))}."
            )
        told, pending = list(self.told), list(self.pending)
        for row, result in zip(self.space.decode(z), observed, strict=True):
            self._settle(row)
            self.told.append(Tried(row, result))
        try:
            self._save()
        except ModelFileError:  # told again, it must not count twice
            self.told, self.pending = told, pending
            raise

    def drop(self, configuration: Mapping[str, Any]) -> None:
        """Take a configuration off the pending ones without a result: it failed, or nobody will try it."""
        if not self._settle(self.space.decode(self.space.encode([configuration]))[0]):
            raise DataError(f"{dict(configuration)} is not pending.")
        self._save()

    @property
    def best(self) -> Tried:
        """The best that was told, among those that fulfil the constraints. Raises InfeasibleError where none does,
        DataError where nothing was told, OptionError for several objectives (see `pareto`)."""
        self._require_one()
        y = self._feasible()
        return self.told[int(torch.where(fulfilled(y, self.constraints), y[:, 0], -math.inf).argmax())]

    @property
    def recommended(self) -> Tried:
        """The configuration, of those that were told, whose outcome the model expects to be best, among those that it
        expects to fulfil the constraints; with these expectations as values. Where outcomes are noisy, `best` is the
        luckiest one and this the better choice. Raises as `best` does."""
        self._require_one()
        self._require_told()
        x = self._data()[0]
        models = self.posteriors().values()
        y = torch.stack([model.latent(x).mean.double().reshape(len(x)) for model in models], 1)
        good = self._require_any(fulfilled(y, self.constraints), "is expected to fulfil")
        k = int(torch.where(good, y[:, 0], -math.inf).argmax())
        expected = (y[k] * self.signs).tolist()
        return Tried(self.told[k].configuration, dict(zip(self.outcomes, expected, strict=True)))

    @property
    def pareto(self) -> list[Tried]:
        """What was told, fulfils the constraints, and is not worse in all objectives than another."""
        y = self._feasible()
        good = fulfilled(y, self.constraints).nonzero()[:, 0]
        front = is_non_dominated(y[good][:, : len(self.goals)])
        return [self.told[i] for i in good[front].tolist()]

    def posteriors(self) -> dict[str, FunctionPosterior]:
        """The model of every outcome (of minus the outcome where it is minimised), over the unit cube."""
        self._update_model()
        return dict(zip(self.outcomes, self._posteriors, strict=True))

    # ---- what is behind it ----------------------------------------------------------------------

    def _propose(self) -> dict[str, Any]:
        seed = (self.seed + 104_729 * self._asked) % 2**32
        x, y = self._data()
        pending = self.space.encode(self.pending)
        if self._asked < self.initial or len(self.told) < 2:
            start = self.space.sample(self._asked + 1, self.seed)[self._asked :]
            known = torch.cat([x, pending])
            if len(known) and bool((torch.cdist(start, known) < 1e-9).any()):
                start = fresh(self.space, known, seed)[:1]
            return self.space.decode(start)[0]
        self._update_model()
        taken, many = torch.cat([x, pending]), len(self.goals)
        start = candidates(self.space, x, y, many, self.constraints, taken, seed)
        if self.acquisition == "thompson":
            row = thompson(self._posteriors, y, many, self.constraints, start, seed)
        else:
            function = acquisition(
                self.acquisition,
                self._posteriors,
                x,
                y,
                many,
                self.constraints,
                pending if len(pending) else None,
                seed=seed % 2**31,
            )
            row = search(function, self.space, start, taken, seed % 2**31)
        return self.space.decode(row[None])[0]

    def _update_model(self) -> None:
        """Fit anew where there is much more to learn from, else take in what is new."""
        x, y = self._data()
        if len(x) < 2:
            raise DataError(f"The model needs at least 2 observations; there are {len(x)}.")
        if (
            self._fitted_on == 0
            or len(x) >= max(self.refit * self._fitted_on, self._fitted_on + 1)
            and len(x) > self._known
        ):
            self._posteriors = [self._fit(x, y[:, k]) for k in range(y.shape[1])]
            self._fitted_on = len(x)
        elif len(x) > self._known:
            new = slice(self._known, len(x))
            try:
                self._posteriors = [p.condition(x[new], y[new, k]) for k, p in enumerate(self._posteriors)]
            except OptionError:  # networks take in nothing; they are trained again
                self._posteriors = [self._fit(x, y[:, k]) for k in range(y.shape[1])]
                self._fitted_on = len(x)
        self._known = len(x)

    def _fit(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> FunctionPosterior:
        if hasattr(self.model, "get_params"):
            fitted = getattr(clone(self.model).fit(x.numpy(), y.numpy()), "posterior_", None)
        else:
            fitted = self.model(x, y)
        if not isinstance(fitted, FunctionPosterior):
            raise OptionError(f"model={self.model!r} gave no posterior over functions, but {fitted!r}.")
        outputs = fitted.num_outputs
        if outputs != 1 or isinstance(fitted.observed(x[:1]), Categorical):
            what = "classes" if outputs == 1 else f"{outputs} outputs"
            raise OptionError(
                f"model={self.model!r} predicts {what}; every outcome needs a model of one number (several are "
                "modelled one by one)."
            )
        return fitted

    def _data(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n t"]]:
        """Encoded configurations, and outcomes with their signs."""
        x = self.space.encode([tried.configuration for tried in self.told])
        y = [[tried.values[name] for name in self.outcomes] for tried in self.told]
        return x, torch.tensor(y, dtype=torch.float64).reshape(-1, len(self.outcomes)) * self.signs

    def _feasible(self) -> Float[Tensor, "n t"]:
        self._require_told()
        y = self._data()[1]
        self._require_any(fulfilled(y, self.constraints), "fulfils")
        return y

    def _require_told(self) -> None:
        if not self.told:
            raise DataError("Nothing was told yet.")

    def _require_one(self) -> None:
        if len(self.goals) > 1:
            raise OptionError("There are several objectives, so no single best; see `pareto`.")

    def _require_any(self, good: Bool[Tensor, " n"], does: str) -> Bool[Tensor, " n"]:
        if not bool(good.any()):
            texts = " and ".join(map(repr, self.constraint_texts))
            raise InfeasibleError(f"None of {len(self.told)} configurations {does} {texts}.")
        return good

    def _values(self, i: int, result: Any) -> dict[str, float]:
        given = result if isinstance(result, Mapping) else {self.outcomes[0]: result}
        if set(given) != set(self.outcomes):
            raise DataError(
                f"Result {i} has {sorted(map(str, given))}, but the outcomes are {sorted(self.outcomes)}."
            )
        values = {}
        for name in self.outcomes:
            try:
                values[name] = float(given[name])
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"Result {i}: {name}={given[name]!r} is no number.") from error
            if abs(values[name]) > MOST and math.isfinite(values[name]):
                raise DataError(
                    f"Result {i}: {name} is {values[name]}, whose square overflows; take other units."
                )
            if not math.isfinite(values[name]):
                raise DataError(f"Result {i}: {name} is {values[name]}. {FAILED}")
        return values

    def _settle(self, row: dict[str, Any]) -> bool:
        for i, waiting in enumerate(self.pending):
            if torch.equal(self.space.encode([waiting]), self.space.encode([row])):
                del self.pending[i]
                return True
        return False

    def _description(self) -> dict[str, Any]:
        return {"space": self.space.state(), "goals": self.goals, "constraints": self.constraint_texts}

    def _save(self) -> None:
        if self.path is None:
            return
        told = [{"configuration": t.configuration, "values": t.values} for t in self.told]
        state = {
            "optimizer": 1,
            **self._description(),
            "asked": self._asked,
            "told": told,
            "pending": self.pending,
        }
        write_state(self.path, state)

    def _restore(self, state: Any) -> None:
        try:
            described = {name: state[name] for name in ("space", "goals", "constraints")}
            told = [Tried(dict(entry["configuration"]), dict(entry["values"])) for entry in state["told"]]
            pending, asked = [dict(row) for row in state["pending"]], int(state["asked"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{str(self.path)!r} is no state of an Optimizer ({error!r}).") from error
        if described != self._description():
            raise OptionError(
                f"{str(self.path)!r} is of another space, objectives or constraints; give those, or another file."
            )
        try:
            self.space.encode([*(tried.configuration for tried in told), *pending])
            [self._values(i, tried.values) for i, tried in enumerate(told)]
            self._asked = check_count(asked)
        except (DataError, OptionError) as error:
            raise ModelFileError(f"{str(self.path)!r} is damaged: {error}") from error
        self.told, self.pending = told, pending


def _split(space: Space | Mapping[str, Any], constraints: Sequence[str]) -> tuple[Space, list[str]]:
    """The space with the constraints that are on it, and those that are on outcomes."""
    if isinstance(constraints, str):
        raise OptionError(f"constraints={constraints!r} must be a list of texts.")
    if not isinstance(space, Space | Mapping):
        raise OptionError(f"space={space!r}: give a Space, or settings such as {{'x': (0.0, 1.0)}}.")
    settings = space.settings if isinstance(space, Space) else dict(space)
    of_space: list[str] = []
    of_outcomes: list[str] = []
    for text in constraints:
        names = set(parse_constraint(text)[0])
        if names & set(settings) and not names <= set(settings):
            raise OptionError(f"constraint {text!r} mixes settings and outcomes; write one of each.")
        (of_space if names & set(settings) else of_outcomes).append(text)
    if isinstance(space, Space):
        return (Space(space.settings, [*space.constraints, *of_space]) if of_space else space), of_outcomes
    return Space(settings, of_space), of_outcomes
