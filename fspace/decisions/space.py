"""What can be tried: named settings that are continuous, whole numbers or categories, and linear constraints on them.

Settings are encoded in the unit cube: numbers affinely, categories one-hot.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linprog
from torch import Tensor

from fspace.errors import DataError, InfeasibleError, OptionError
from fspace.predictive import check_count

MOST_TRIES = 2**17  # random points among which feasible ones are looked for
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(rf"\s*([+-]?)\s*(?:({NUMBER})\s*\*?\s*)?(?:([^\W\d]\w*)|`([^`]+)`)\s*")
BOUND = re.compile(rf"^(.*?)(<=|>=)\s*([+-]?{NUMBER})\s*$")


def parse_constraint(text: str) -> tuple[dict[str, float], float]:
    """ "2*a - b <= 3" as ({"a": 2, "b": -1}, 3); ">=" is turned around. A name that holds more than letters, digits
    and underscores is written between backticks: "`heat (C)` <= 3". Raises OptionError."""
    match = BOUND.match(text) if isinstance(text, str) else None
    if match is None:
        raise OptionError(f"constraint {text!r}: write it as a sum and a number, like '2*a - b <= 3'.")
    left, sign, right = match[1], -1.0 if match[2] == ">=" else 1.0, float(match[3])
    terms: dict[str, float] = {}
    at = 0
    while at < len(left):
        term = TERM.match(left, at)
        if term is None or (at and not term[1]):
            raise OptionError(
                f"constraint {text!r}: {left[at:].strip()!r} is not a number times a name; a name with spaces or signs "
                "is written between backticks, like '`heat (C)` <= 3'."
            )
        factor = float(term[2] or 1.0) * (-1.0 if term[1] == "-" else 1.0)
        name = term[3] or term[4]
        terms[name] = terms.get(name, 0.0) + sign * factor
        at = term.end()
    if not terms:
        raise OptionError(f"constraint {text!r} names nothing.")
    if not all(math.isfinite(number) for number in (right, *terms.values())):
        raise OptionError(f"constraint {text!r} has a number that is too large.")
    return terms, sign * right


class Space:
    """Settings by name: (low, high) is continuous, range(...) whole numbers in steps of 1, a list holds categories.

    constraints: linear, on numbers: ["a + b <= 1"]. Raises OptionError for what is none of these, InfeasibleError
    where no setting fulfils the constraints.
    """

    def __init__(self, settings: Mapping[str, Any], constraints: Sequence[str] = ()):
        if not isinstance(settings, Mapping) or not settings:
            raise OptionError("The space has no settings; give for example {'x': (0.0, 1.0)}.")
        self.settings = {str(name): _setting(str(name), value) for name, value in settings.items()}
        self.columns: dict[str, list[int]] = {}
        at = 0
        for name, setting in self.settings.items():
            width = len(setting) if isinstance(setting, list) else 1
            self.columns[name] = list(range(at, at + width))
            at += width
        self.width = at
        self.bounds = torch.tensor([[0.0] * at, [1.0] * at], dtype=torch.float64)
        self.constraints = list(constraints)
        self.inequalities = [self._linear(text) for text in self.constraints]
        self._require_feasible()

    def _linear(self, text: str) -> tuple[Float[Tensor, " d"], float]:
        """(a, b) with a'z <= b for encoded z."""
        terms, bound = parse_constraint(text)
        a = torch.zeros(self.width, dtype=torch.float64)
        for name, factor in terms.items():
            setting = self.settings.get(name)
            if setting is None or isinstance(setting, list):
                raise OptionError(f"constraint {text!r}: {name!r} is not a number of the space.")
            low, high = _ends(setting)
            a[self.columns[name][0]] = factor * (high - low)
            bound -= factor * low
        return a, bound

    def _require_feasible(self) -> None:
        if not self.inequalities:
            return
        a = torch.stack([a for a, _ in self.inequalities]).numpy()
        b = np.array([b for _, b in self.inequalities])
        found = linprog(np.zeros(self.width), A_ub=a, b_ub=b + 1e-12, bounds=[(0, 1)] * self.width)
        if found.status == 2:
            raise InfeasibleError(f"No setting fulfils {' and '.join(map(repr, self.constraints))}.")
        self.sample(1, 0)  # whole numbers may leave less room

    @property
    def discrete(self) -> list[str]:
        """Names of settings that are not continuous."""
        return [name for name, setting in self.settings.items() if not isinstance(setting, tuple)]

    def encode(self, configurations: Sequence[Mapping[str, Any]]) -> Float[Tensor, "n d"]:
        """Configurations in the unit cube. Raises DataError for other names, and for values outside the space."""
        z = torch.zeros(len(configurations), self.width, dtype=torch.float64)
        for i, configuration in enumerate(configurations):
            if not isinstance(configuration, Mapping):
                raise DataError(
                    f"Configuration {i} is a {type(configuration).__name__}; give {{setting: value}} for "
                    f"{sorted(self.settings)}."
                )
            if set(configuration) != set(self.settings):
                raise DataError(
                    f"Configuration {i} has {sorted(map(str, configuration))}, but the space {sorted(self.settings)}."
                )
            for name, setting in self.settings.items():
                value, columns = configuration[name], self.columns[name]
                if isinstance(setting, list):
                    if isinstance(value, np.ndarray | Tensor) or value not in setting:
                        raise DataError(f"Configuration {i}: {name}={value!r} is not one of {setting}.")
                    z[i, columns[setting.index(value)]] = 1.0
                    continue
                low, high = _ends(setting)
                try:
                    number = float(value)
                except (TypeError, ValueError, OverflowError) as error:
                    raise DataError(f"Configuration {i}: {name}={value!r} is no number.") from error
                slack = 1e-9 * (high - low)
                whole = not isinstance(setting, range) or number.is_integer()
                if not (low - slack <= number <= high + slack and whole):
                    kind = "whole numbers from" if isinstance(setting, range) else "numbers from"
                    raise DataError(
                        f"Configuration {i}: {name}={value!r} is outside the {kind} {setting[0]:g} to {setting[-1]:g}."
                    )
                z[i, columns[0]] = min(1.0, max(0.0, (number - low) / (high - low)))
        return z

    def decode(self, z: Float[Tensor, "n d"]) -> list[dict[str, Any]]:
        """Encoded rows as configurations: whole numbers rounded, the largest of a category's entries."""
        found = []
        for row in z.tolist():
            configuration: dict[str, Any] = {}
            for name, setting in self.settings.items():
                part = [row[c] for c in self.columns[name]]
                if isinstance(setting, list):
                    configuration[name] = setting[part.index(max(part))]
                    continue
                low, high = _ends(setting)
                value = low + part[0] * (high - low)
                configuration[name] = (
                    round(value) if isinstance(setting, range) else min(high, max(low, value))
                )
            found.append(configuration)
        return found

    def rounded(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The nearest encoded rows that are configurations."""
        return self.encode(self.decode(z))

    def feasible(self, z: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Which encoded rows fulfil the constraints."""
        good = torch.ones(len(z), dtype=torch.bool)
        for a, b in self.inequalities:
            good &= z @ a <= b + 1e-8
        return good

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d"]:
        """n encoded configurations that fulfil the constraints, from a scrambled Sobol sequence.

        Raises InfeasibleError where too few are found."""
        check_count(n)
        engine = torch.quasirandom.SobolEngine(len(self.settings), scramble=True, seed=seed)
        found, tried = torch.empty(0, self.width, dtype=torch.float64), 0
        while len(found) < n:
            if tried >= MOST_TRIES:
                raise InfeasibleError(
                    f"Of {tried:,} random settings {len(found)} fulfil {' and '.join(map(repr, self.constraints))}; no "
                    "setting may, or too small a part of the space. Narrow the ranges to where the constraints hold."
                )
            count = max(n, 64) if not tried else 4096
            tried += count
            z = self._place(engine.draw(count, dtype=torch.float64))
            found = torch.cat([found, z[self.feasible(z)]])
        return found[:n]

    def _place(self, u: Float[Tensor, "n s"]) -> Float[Tensor, "n d"]:
        """Uniform numbers, one a setting, as encoded configurations."""
        z = torch.zeros(len(u), self.width, dtype=torch.float64)
        for k, (name, setting) in enumerate(self.settings.items()):
            columns = self.columns[name]
            if isinstance(setting, tuple):
                z[:, columns[0]] = u[:, k]
                continue
            count = len(setting)
            level = (u[:, k] * count).long().clamp(max=count - 1)
            if isinstance(setting, range):
                z[:, columns[0]] = level.to(torch.float64) / (count - 1)
            else:
                z[torch.arange(len(u)), torch.tensor(columns)[level]] = 1.0
        return z

    def state(self) -> dict[str, Any]:
        """As JSON: both ends of "whole" and "between" belong to the space."""
        kinds = {}
        for name, s in self.settings.items():
            kinds[name] = (
                {"choices": s}
                if isinstance(s, list)
                else {"whole": [s[0], s[-1]]}
                if isinstance(s, range)
                else {"between": list(s)}
            )
        return {"settings": kinds, "constraints": self.constraints}

    @classmethod
    def from_state(cls, state: Any) -> Space:
        """The space of this `state()`. Raises OptionError where it is none."""
        try:
            settings = {name: _read(kind) for name, kind in state["settings"].items()}
            constraints = list(state.get("constraints", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(
                f"This describes no space ({error!r}). Write it as {{'settings': {{'x': {{'between': [0, 1]}}, 'n': "
                "{'whole': [1, 10]}, 'kind': {'choices': ['a', 'b']}}, 'constraints': ['x <= 0.9']}, ends included."
            ) from error
        return cls(settings, constraints)


def _read(described: Any) -> Any:
    """{"between": [0, 1]}, {"whole": [1, 10]} or {"choices": [...]} as a setting: of [1, 10] both ends."""
    ((kind, value),) = described.items()  # a second key would be ignored unseen
    if not isinstance(value, list):
        raise TypeError(f"{kind}: {value!r} is no list")
    if kind == "whole":
        first, last = value
        return range(first, last + 1)
    return {"choices": list, "between": tuple}[kind](value)


def _setting(name: str, value: Any) -> Any:
    if isinstance(value, range):
        if value.step != 1 or len(value) < 2:
            raise OptionError(f"{name}={value!r}: whole numbers are a range of at least two, in steps of 1.")
        return value
    if isinstance(value, list):
        if len(value) < 2 or len(set(map(str, value))) < len(value):
            raise OptionError(f"{name}={value!r}: categories are a list of at least two that differ.")
        value = [choice.item() if isinstance(choice, np.generic) else choice for choice in value]
        for choice in value:  # others would not be known again in a state file
            if not isinstance(choice, str | int | float | None) or choice != choice:
                raise OptionError(
                    f"{name}: category {choice!r} must be a text, a number, True, False or None."
                )
        return value
    if isinstance(value, tuple) and len(value) == 2:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            low, high = (float(v) for v in value if not isinstance(v, str))
            if math.isfinite(high - low) and low < high:
                return low, high
    raise OptionError(
        f"{name}={value!r}: give (low, high) for a number, range(low, high) for whole numbers, or a list of categories."
    )


def _ends(setting: Any) -> tuple[float, float]:
    return (float(setting[0]), float(setting[-1]))
