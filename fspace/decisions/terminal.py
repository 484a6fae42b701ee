"""What `fspace decide` does: tables in, a table of choices and a picture out."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fspace.columns import suggest
from fspace.data import read_table, write_table
from fspace.decisions import plots
from fspace.decisions.active import select
from fspace.decisions.optimisation import FAILED, Optimizer
from fspace.decisions.risks import CVaR, MeanVariance
from fspace.decisions.sources import rows_of
from fspace.decisions.space import Space
from fspace.decisions.utility import CostMatrix, Decision, Linear, Newsvendor, best_action
from fspace.errors import DataError, OptionError
from fspace.runs import CHUNK, load_model
from fspace.streams import read_parts

FAILED_ROW = "Remove the row of an experiment that failed; of one that is not done, leave all results empty."
SHOWN = 5000  # rows of the pool in a picture
UTILITIES = (
    'one of {"newsvendor": {"underage": 4, "overage": 1}}, '
    '{"costs": {"treat": {"ill": 0, "well": 1}, "wait": {"ill": 9, "well": 0}}}, '
    '{"payoff": {"amounts": [0, 1, 2], "aversion": 0.5}} (or "worst_share": 0.1, or neither)'
)


def rank(model: str, pool: str, k: int, criterion: str, out: str, seed: int, overwrite: bool) -> str:
    """Write the k rows of a pool to label next, best first, with their gain and row number; and a picture."""
    files = _files(out, overwrite, (pool, model))
    fitted = load_model(model)
    reference = None
    known = fitted.encoder_.feature_names
    if criterion == "nipv":  # the first rows stand for the pool
        reference = _inputs(fitted, next(iter(read_parts(pool, CHUNK))), known).head(256)
    shown: list[pd.DataFrame] = []

    def parts() -> Any:
        for part in read_parts(pool, CHUNK):
            inputs = _inputs(fitted, part, known)
            if sum(map(len, shown)) < SHOWN:
                shown.append(inputs.head(SHOWN))
            yield inputs

    found = select(fitted, parts(), k, criterion, reference, duplicates="drop", seed=seed)
    chosen = found.index.numpy()
    table = pd.concat([part[np.isin(part.index, chosen)] for part in _numbered(pool)]).loc[chosen]
    row, gain = (_free(name, table.columns) for name in ("row", "gain"))
    extra = {row: chosen, gain: found.gain.numpy()}
    write_table(pd.concat([pd.DataFrame(extra), table.reset_index(drop=True)], axis=1), files[0])
    background = rows_of(fitted, pd.concat(shown).head(SHOWN)).numpy()
    names = fitted.encoder_.feature_names_out
    pair = list(np.argsort(-fitted.relevance_, kind="stable")[:2]) if background.shape[1] > 1 else [0, 0]
    ax = _axes()
    plots.ranked(found.gain, background[:, pair], found.x.numpy()[:, pair], [names[i] for i in pair], ax=ax)
    ax.figure.savefig(files[1], dpi=110)
    renamed = "" if (row, gain) == ("row", "gain") else f" (their number is {row!r}, their gain {gain!r})"
    return f"{k} rows by {criterion} are in {files[0]}{renamed}; open {files[1]}"


def act(model: str, data: str, utility: str, out: str, samples: int, seed: int, overwrite: bool) -> str:
    """Write the best action of every row under a utility file, with its expected utility; and a picture."""
    files = _files(out, overwrite, (data, model, utility))
    fitted, table = load_model(model), read_table(data)
    inputs = _inputs(fitted, table, fitted.encoder_.feature_names)
    decision, labels = _decide(fitted, inputs, _json(utility), samples, seed)
    chosen = [labels[i] for i in decision.index.tolist()] if labels else np.asarray(decision.action)
    columns = {"action": chosen, "expected_utility": decision.value.numpy()}
    if labels and len(labels) > 1:
        columns |= {
            "better_than_next_by": decision.margin.numpy(),
            "standard_error": decision.margin_error.numpy(),
        }
    write_table(pd.DataFrame(columns), files[0])
    plots.actions(decision, labels, ax=(ax := _axes()))
    ax.figure.savefig(files[1], dpi=110)
    return f"{len(table):,} actions are in {files[0]}; open {files[1]}"


def propose(
    experiments: str,
    space: str,
    goals: Sequence[str],
    count: int,
    out: str,
    model: str,
    acquisition: str,
    seed: int,
    overwrite: bool,
) -> str:
    """Write the next experiments to make, after those of a table that have results; and a picture.

    Rows without results are pending: they are not proposed again.
    """
    files = _files(out, overwrite, (experiments, space))
    described = _json(space)
    if isinstance(described, dict):
        _require_keys(described, ("settings", "constraints"))
    of_space = Space.from_state(
        {"settings": described.get("settings", {}) if isinstance(described, dict) else None}
    )
    constraints = described.get("constraints", [])
    if not isinstance(constraints, list):
        raise OptionError(f'{space!r}: constraints must be a list, such as ["x <= 0.9"].')
    settings_too = [name for name in _goals(goals) if name in of_space.settings]
    if settings_too:
        raise OptionError(
            f"--goal {settings_too[0]} is a setting, which is chosen; name a column of results."
        )
    optimizer = Optimizer(of_space, _goals(goals), constraints, model, acquisition, seed=seed)
    if Path(experiments).exists():
        _tell_table(optimizer, read_table(experiments, least_rows=0), experiments)
    else:
        _require_a_new_name(optimizer, Path(experiments))
    optimizer._asked = len(optimizer.told) + len(optimizer.pending)
    proposals = optimizer.ask(count)
    write_table(pd.DataFrame(proposals), files[0])
    are = f"{count} experiment{' is' if count == 1 else 's are'} in {files[0]}"
    if not Path(experiments).exists():
        return f"There is no file {experiments!r}, so these are the first: {are}"
    if not optimizer.told:
        return f"No row of {experiments!r} has results: {are}"
    plots.convergence(optimizer, ax=(ax := _axes()))
    ax.figure.savefig(files[1], dpi=110)
    return f"{are}; open {files[1]}"


def _require_a_new_name(optimizer: Optimizer, experiments: Path) -> None:
    """Raises OptionError where a file of nearly this name, beside it, has the columns: results would be left out by a
    slip of the pen."""
    beside = [file.name for file in experiments.absolute().parent.glob("*") if file.is_file()]
    for name in difflib.get_close_matches(experiments.name, beside, n=5, cutoff=0.8):
        with contextlib.suppress(DataError):
            columns = set(next(iter(read_parts(experiments.with_name(name), 1))).columns)
            if columns >= {*optimizer.space.settings, *optimizer.outcomes}:
                raise OptionError(
                    f"There is no file {str(experiments)!r}, but {name!r} beside it has these settings and results. "
                    "Did you mean it? To begin anew, take a name that is less like it."
                )


def _tell_table(optimizer: Optimizer, table: pd.DataFrame, name: str) -> None:
    settings = list(optimizer.space.settings)
    missing = [column for column in (*settings, *optimizer.outcomes) if column not in table.columns]
    if missing:
        others = [str(column) for column in table.columns if column not in (*settings, *optimizer.outcomes)]
        near = suggest(missing[0], others) if others else ""
        raise DataError(
            f"{name!r} has no column {missing[0]!r}; it needs {', '.join((*settings, *optimizer.outcomes))}."
            f"{near if 'mean' in near else ''}"
        )
    for row, record in enumerate(table.to_dict("records")):
        configuration = {key: _plain(record[key], optimizer.space.settings[key]) for key in settings}
        values = {key: record[key] for key in optimizer.outcomes}
        try:
            if all(pd.isna(value) for value in values.values()):
                optimizer.pending += optimizer.space.decode(optimizer.space.encode([configuration]))
            else:
                optimizer.tell(configuration, values)
        except DataError as error:
            said = re.sub(r"^(Configuration|Result) 0:? ", "", str(error)).replace(FAILED, FAILED_ROW)
            raise DataError(f"{name!r}, row {row}: {said}") from error


def _plain(value: Any, setting: Any) -> Any:
    """A cell as the space has it: the category that is written so."""
    if isinstance(setting, list):
        return next((choice for choice in setting if str(choice) == str(value)), value)
    return value


def _decide(
    fitted: Any, inputs: Any, described: Any, samples: int, seed: int
) -> tuple[Decision, list[str] | None]:
    if not isinstance(described, dict) or len(described) != 1:
        raise OptionError(f"The utility file must be {UTILITIES}.")
    ((kind, about),) = described.items()
    try:
        if kind == "newsvendor":
            _require_keys(about, ("underage", "overage"))
            utility = Newsvendor(float(about["underage"]), float(about["overage"]))
            return best_action(fitted, inputs, None, utility, seed=seed), None
        if kind == "costs":
            if not hasattr(fitted, "classes_"):
                raise OptionError("costs are for classes, but this model predicts numbers.")
            classes = [str(label) for label in fitted.classes_]
            for row in about.values():
                _require_keys(row, classes)
            cost = [[float(row[label]) for label in classes] for row in about.values()]
            return best_action(fitted, inputs, None, CostMatrix(cost), seed=seed), list(about)
        if kind == "payoff":
            _require_keys(about, ("amounts", "aversion", "worst_share"))
            if "aversion" in about and "worst_share" in about:
                raise OptionError(
                    "The utility file has both an aversion and a worst_share; give one of them."
                )
            amounts = torch.tensor([float(a) for a in about["amounts"]], dtype=torch.float64)
            risk: Any = None
            if "aversion" in about:
                risk = MeanVariance(float(about["aversion"]))
            elif "worst_share" in about:
                risk = CVaR(float(about["worst_share"]))
            decision = best_action(fitted, inputs, amounts, Linear(), risk, samples, seed)
            return decision, [f"{a:g}" for a in amounts.tolist()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OptionError | DataError):
            raise
        raise OptionError(f"The utility file does not fit ({error!r}); it must be {UTILITIES}.") from error
    raise OptionError(f"There is no utility {kind!r}; the file must be {UTILITIES}.")


def _require_keys(given: Any, known: Sequence[str]) -> None:
    """A key that means nothing is a slip of the pen, and ignored it would change the decision unseen."""
    unknown = [key for key in given if key not in known]
    if unknown:
        raise OptionError(f"{unknown[0]!r} means nothing here.{suggest(str(unknown[0]), list(known))}")


def _goals(goals: Sequence[str]) -> dict[str, str]:
    """ "yield=maximize" by name of the outcome."""
    found: dict[str, str] = {}
    for goal in goals:
        name, _, direction = goal.rpartition("=") if "=" in goal else (goal, "", "")
        if name in found:
            raise OptionError(f"--goal {name} is given twice; give each goal once.")
        found[name] = direction or "minimize"
    if not found:
        raise OptionError(
            "Say what to make small or large: --goal COLUMN=minimize or --goal COLUMN=maximize."
        )
    return found


def _inputs(fitted: Any, table: pd.DataFrame, known: Sequence[str]) -> pd.DataFrame:
    """The columns of the fit, in its order; where one is missing the encoder says so."""
    if not hasattr(fitted.encoder_, "feature_names_in_"):
        return table
    return table[[name for name in known if name in table.columns]]


def _free(name: str, columns: pd.Index) -> str:
    """A name that no column has."""
    while name in columns:
        name += "_"
    return name


def _numbered(pool: str) -> Any:
    start = 0
    for part in read_parts(pool, CHUNK):
        part.index = pd.RangeIndex(start, start + len(part))
        start += len(part)
        yield part


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path!r} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path!r} is not JSON: {error}.") from error


def _files(out: str, overwrite: bool, sources: Sequence[str]) -> tuple[Path, Path]:
    """The table and the picture to write. Raises OptionError where something would be lost."""
    table = Path(out)
    if not table.name.lower().endswith((".csv", ".tsv", ".parquet", ".pq")):
        raise OptionError(f"{out!r}: write to a name that ends in .csv or .parquet.")
    picture = table.with_suffix(".png")
    if table.resolve() in [Path(source).resolve() for source in sources]:
        raise OptionError(f"{out!r} is what the decision is made from; give another name.")
    for file in (table, picture):
        if file.exists() and not overwrite:
            raise OptionError(f"{str(file)!r} exists; give another name, or --overwrite to replace it.")
    return table, picture


def _axes() -> Any:
    """Axes of a figure of their own, without pyplot and its windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()
