"""What the terminal's commands do: a file to a folder of results, a model to predictions."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fspace.canvas import column_of
from fspace.columns import suggest
from fspace.data import TableEncoder, check_target, load_diabetes_table, read_table, split_target, write_table
from fspace.errors import DataError, OptionError
from fspace.estimators import GAUSSIAN, LIKELIHOODS, GPClassifier, GPRegressor
from fspace.fitting import GPEstimator
from fspace.folders import (
    METRICS,
    MODEL,
    PREDICTIONS,
    REPORT,
    choose_folder,
    model_file,
    publish,
    unfinished,
)
from fspace.inference.likelihoods import NAMED
from fspace.predictive_base import check_seed
from fspace.progress import progress
from fspace.report import write_report
from fspace.scores import baseline_scores, class_baseline_scores, class_scores, regression_scores
from fspace.streams import PartWriter, read_parts
from fspace.targets import check_labels, check_support

TASKS = ("regression", "classification")
CHUNK = 20_000  # rows read, predicted and written at a time, so that memory does not grow with the table


@dataclass
class FitRun:
    """One `fspace fit`: where the data come from, what is fitted, where the results go."""

    data: str | None = None
    targets: Sequence[str] = ()
    task: str = "regression"
    categorical: Sequence[str] = ()
    drop: Sequence[str] = ()
    test_fraction: float = 0.2
    out: str | None = None
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the estimator


def fit_table(run: FitRun, quiet: bool = False) -> dict[str, Any]:
    """Fit, measure and write everything; returns what metrics.json holds, with the files' paths.

    Raises a FspaceError before the fit for whatever can be known to be wrong by then. After Ctrl-C in the fit all is
    written about its best state so far, and "interrupted" is true.
    """
    if run.task not in TASKS:
        raise OptionError(f"task={run.task!r} does not exist; choose one of {', '.join(TASKS)}.")
    if not 0 <= run.test_fraction < 1:
        raise OptionError(f"--test-fraction {run.test_fraction} must be at least 0 and below 1.")
    seed = check_seed(run.options.get("seed", 0))
    folder = choose_folder(run.out, run.overwrite)
    if run.data is not None and Path(run.data).resolve() in [
        (folder / name).resolve() for name in (MODEL, METRICS, PREDICTIONS, REPORT)
    ]:
        raise OptionError(f"--out {folder}: the results would replace {run.data}, which they are made from.")
    inputs, target, source = load_columns(run)
    classes: np.ndarray | None = None
    if run.task == "classification":
        if target.shape[1] > 1:
            raise OptionError("A classification has one --target; fit several classes of labels one by one.")
        for option in ("inference", "likelihood", "outputs"):
            if run.options.get(option, "auto") not in ("auto", "independent"):
                raise OptionError(f"--{option} is for regressions; leave it out with --task classification.")
        classes, y = check_labels(target.iloc[:, 0], len(target))
    else:
        y = target_numbers(target)
        likelihood = str(run.options.get("likelihood", "auto"))
        if likelihood in LIKELIHOODS and likelihood in NAMED:
            check_support(y.reshape(len(y), -1), NAMED[likelihood](), y.ndim == 1)
    _note_identifiers(inputs)
    # over all rows, so that a bad cell is named by its row in the file, not by its row in the training part
    TableEncoder(missing=str(run.options.get("missing", "error"))).fit(inputs)
    train, test = _split(len(inputs), run.test_fraction, seed, None if classes is None else y)
    estimator = GPRegressor if classes is None else GPClassifier
    own = {k: v for k, v in run.options.items() if k in estimator().get_params()}
    model = estimator(categories=list(run.categorical) or None, progress=False if quiet else "auto", **own)
    part = unfinished(folder)
    try:
        started = time.perf_counter()
        model.fit(inputs.iloc[train], (target.iloc[:, 0] if target.shape[1] == 1 else target).iloc[train])
        seconds = time.perf_counter() - started
        with progress("measuring and writing the results", not quiet):
            results = _write(part, run, model, seconds, inputs, y, target, source, train, test)
    finally:  # whatever was written is kept, also where a later file failed
        folder = publish(part, folder, run.out, run.overwrite)
    results["files"] = {
        kind: str(folder / name)
        for kind, name in (
            ("model", MODEL),
            ("metrics", METRICS),
            ("predictions", PREDICTIONS),
            ("report", REPORT),
        )
        if (folder / name).exists()
    }
    return results


def _write(
    part: Path,
    run: FitRun,
    model: GPEstimator,
    seconds: float,
    inputs: pd.DataFrame,
    y: np.ndarray,
    target: pd.DataFrame,
    source: str,
    train: np.ndarray,
    test: np.ndarray,
) -> dict[str, Any]:
    """Measure the fitted model and write its files, the model first."""
    model.save(part / MODEL)
    names = [str(name) for name in target.columns]
    results: dict[str, Any] = {
        "data": source,
        "task": run.task,
        "targets": names,
        "rows": {"train": len(train), "test": len(test)},
        "metrics": {},
        "baseline": {},
        "kernel": model.choice_["chosen"],
        "choice": model.choice_["scores"],
        "weights": model.choice_["weights"],
        "log_evidence": float(model.log_evidence_),
        "seconds": round(seconds, 3),
        "interrupted": model.interrupted_,
        "options": {"test_fraction": run.test_fraction, **_options(model, run)},
        "versions": _versions(),
    }
    predictive = None
    if isinstance(model, GPClassifier):
        y = _positions(model, target)
    if len(test):
        with torch.no_grad():
            predictive = model.predictive(inputs.iloc[test])
            if isinstance(model, GPClassifier):
                _require_known(y, test, target)
                results["metrics"][names[0]] = class_scores(y[test], predictive)
                count = len(model.classes_)
                results["baseline"][names[0]] = class_baseline_scores(y[test], y[train], count)
            else:
                for k, name in enumerate(names):
                    results["metrics"][name] = regression_scores(y[test], predictive, output=k)
                    results["baseline"][name] = baseline_scores(
                        y[test], y[train], output=k, counts=predictive.counts
                    )
            table = _columns(model, predictive, names)
        observed = {f"observed{_suffix(name, names)}": target[name].to_numpy()[test] for name in names}
        table = pd.concat([pd.DataFrame({"row": test, **observed}), table], axis=1)
        write_table(table, part / PREDICTIONS)
    (part / METRICS).write_text(to_json(results) + "\n", encoding="utf-8")
    write_report(
        part / REPORT,
        model,
        inputs.iloc[test] if len(test) else None,
        y[test] if len(test) else None,
        predictive=predictive,
        X_train=inputs.iloc[train],
        y_train=y[train],
        targets=names,
        facts={
            "data": source,
            "predicts with": describe_choice(model.choice_["weights"]) + describe_likelihood(results),
            "seconds to fit": f"{seconds:.1f}",
        },
    )
    return results


def predict_table(
    model: str, data: str, out: str, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Predictions of a saved model for each row of a file, written to another; returns a summary.

    Columns are taken by name, in whatever order they stand; others are left out, and the summary says which.
    """
    target_file = Path(out)
    try:
        taken = target_file.exists()
    except OSError as error:
        raise OptionError(f"{out!r} cannot be written ({error.strerror}).") from error
    if taken and not overwrite:
        raise OptionError(f"{out!r} exists; give another name, or --overwrite to replace it.")
    if taken and target_file.resolve() in (Path(data).resolve(), Path(model).resolve()):
        raise OptionError(f"{out!r} is what the predictions are made from; give another name.")
    if not target_file.name.lower().endswith((".csv", ".tsv", ".parquet", ".pq")):
        raise OptionError(f"{out!r}: write to a name that ends in .csv or .parquet.")
    fitted = load_model(model)
    encoder, names = fitted.encoder_, fitted.target_names_
    known = encoder.feature_names if hasattr(encoder, "feature_names_in_") else None
    text = [
        name
        for name, levels in zip(encoder.feature_names, encoder.levels, strict=False)
        if levels and all(isinstance(level, str) for level in levels)
    ]
    notes: list[str] = []
    rows = 0
    partial = target_file.with_name(f".{os.getpid()}.{target_file.name}")
    try:
        with progress("predicting", not quiet) as tell, PartWriter(partial) as writer:
            for part in read_parts(data, CHUNK, text):
                if known is not None:
                    extra = [name for name in part.columns if name not in known]
                    if extra and rows == 0:
                        notes.append(f"Left out, not used by the model: {', '.join(extra)}")
                    part = part[[name for name in known if name in part.columns]]
                with torch.no_grad():
                    x = torch.tensor(encoder.transform(part, rows), dtype=torch.float64)
                    writer.write(_columns(fitted, fitted.posterior_.observed(x), names))
                rows += len(part)
                tell(done=rows)
        os.replace(partial, target_file)
    except OSError as error:
        raise OptionError(f"{out!r} cannot be written ({error.strerror}).") from error
    finally:  # a table that is refused half-way leaves nothing behind
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    kinds = (
        "predicted, probabilities, entropy, mutual_information"
        if isinstance(fitted, GPClassifier)
        else "mean, std, lower_90, upper_90"
    )
    return {"rows": rows, "out": str(target_file), "targets": names, "notes": notes, "columns": kinds}


def load_model(path: str) -> Any:
    """The estimator in a file, or in a folder that `fspace fit` wrote. Raises ModelFileError."""
    from fspace.saving import load

    return load(model_file(path))


def describe_likelihood(results: dict[str, Any]) -> str:
    """What the kernels are for, where that is not Gaussian noise: ", for poisson observations"."""
    likelihood = results["options"].get("likelihood", "auto")
    return "" if likelihood in GAUSSIAN else f", for {likelihood} observations"


def describe_choice(weights: dict[str, float]) -> str:
    """The kernels that predict, the heaviest first, with their shares where there are several."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return "; ".join(name if len(ordered) == 1 else f"{name} ({weight:.0%})" for name, weight in ordered)


def to_json(results: dict[str, Any]) -> str:
    """Indented JSON; what is not a finite number becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(results), indent=2, allow_nan=False, ensure_ascii=False)


# ---- the table ---------------------------------------------------------------------------------


def load_columns(run: FitRun) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Inputs, targets, and where they come from. Categories know the levels of the whole file."""
    if run.data is None:
        table, source = load_diabetes_table(), "scikit-learn's diabetes table"
        targets = list(run.targets) or ["progression"]
    else:
        table, source = read_table(run.data), str(run.data)
        targets = list(run.targets)
    names = list(table.columns)
    if not targets:
        raise OptionError(f"Say which column to predict: --target COLUMN.{suggest('', names)}")
    for option, columns in (("--drop", run.drop), ("--categorical", run.categorical)):
        for column in columns:
            if column not in names:
                several = column.split(",")
                cure = (
                    " Give the option once for each: "
                    + " ".join(f"{option} {name}" for name in several)
                    + "."
                    if len(several) > 1 and set(several) <= set(names)
                    else suggest(column, names)
                )
                raise DataError(f"{option} {column}: the table has no such column.{cure}")
            if column in targets:
                raise OptionError(f"{option} {column}: that column is the target.")
    table = table.drop(columns=[name for name in run.drop if name not in targets])
    for column in run.categorical:
        if column in table.columns:
            table[column] = table[column].astype("category")
    inputs, target = split_target(table, list(dict.fromkeys(targets)))
    return inputs, target, source


def _note_identifiers(inputs: pd.DataFrame) -> None:
    """Says so where a column looks like row numbers: a model would learn from them what no new row can have."""
    for name, column in inputs.items():
        named = re.fullmatch(r"(?i)unnamed: \d+|index|row|nr|no|key|(.*[ _-])?id", str(name))
        if named and column.dtype.kind in "iu" and column.is_unique:
            warnings.warn(
                f"Column {name!r} looks like an identifier; if it is one, leave it out: "
                f"--drop {shlex.quote(str(name))}.",
                stacklevel=2,
            )


def _split(
    n: int, fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows held out, each in the table's order. labels [n]: classes, of which both parts hold the same
    shares, so that a small part held out is no other mixture than what was fitted."""
    if fraction == 0:
        return np.arange(n), np.arange(0)
    if n < 3:
        raise DataError(
            f"The table has {n} row{'s' * (n > 1)}: too few to fit on some and measure on others. Get more"
            + (", or fit both without measuring: --test-fraction 0." if n == 2 else ".")
        )
    held = min(max(1, round(n * fraction)), n - 2)
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:  # class by class, and of these every so many-th row
        order = order[np.argsort(labels[order], kind="stable")]
        taken = ((np.arange(held) + 0.5) * n / held).astype(int)
        order = np.concatenate([order[taken], np.delete(order, taken)])
    return np.sort(order[held:]), np.sort(order[:held])


def _columns(model: GPEstimator, predictive: Any, names: Sequence[str]) -> pd.DataFrame:
    """mean, std, lower_90 and upper_90 of each output; or the predicted class, the probability of each, and what part
    of the doubt is about the function (mutual information, nats)."""
    if isinstance(model, GPClassifier):
        probs = predictive.probs.cpu().numpy()
        shares = {f"p_{label}": probs[:, k] for k, label in enumerate(model.classes_.tolist())}
        doubt = {"entropy": predictive.entropy, "mutual_information": predictive.mutual_information}
        numbers = {name: value.cpu().numpy() for name, value in doubt.items()}
        return pd.DataFrame({"predicted": model.classes_[probs.argmax(axis=1)], **shares, **numbers})
    lower, upper = predictive.interval(0.9)
    columns = {}
    for k, name in enumerate(names):
        values = (
            ("mean", predictive.mean),
            ("std", predictive.stddev),
            ("lower_90", lower),
            ("upper_90", upper),
        )
        for kind, value in values:
            columns[f"{kind}{_suffix(name, names)}"] = column_of(value, k)
    return pd.DataFrame(columns)


def _options(model: GPEstimator, run: FitRun) -> dict[str, Any]:
    """The options given that this kind of model has."""
    return {name: value for name, value in run.options.items() if name in model.get_params()}


def target_numbers(target: pd.DataFrame) -> np.ndarray:
    """Targets of a regression, [n] or [n, t]."""
    y = check_target(target)
    return y[:, 0] if y.shape[1] == 1 else y


def _positions(model: GPClassifier, target: pd.DataFrame) -> np.ndarray:
    """For every row the position of its label in the model's classes; -1 for a label that it has not seen."""
    at = {label: k for k, label in enumerate(model.classes_.tolist())}
    return np.array([at.get(label, -1) for label in np.asarray(target.iloc[:, 0]).tolist()])


def _require_known(y: np.ndarray, test: np.ndarray, target: pd.DataFrame) -> None:
    unseen = test[y[test] < 0]
    if len(unseen):
        label = target.iloc[[int(unseen[0])], 0].tolist()[0]  # a plain value, as the table has it
        raise DataError(
            f"The class {label!r} (row {unseen[0]}) is in the rows held out but not in those fitted: it is too rare to "
            "measure. Leave its rows out, take another --seed, or --test-fraction 0."
        )


def _suffix(name: str, names: Sequence[str]) -> str:
    return "" if len(names) == 1 else f"_{name}"


def _versions() -> dict[str, str]:
    import gpytorch

    import fspace

    return {
        "fspace": fspace.__version__,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "gpytorch": gpytorch.__version__,
        "numpy": np.__version__,
    }
