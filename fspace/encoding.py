"""What `fspace encode` does: a file to an amortised model, latents, reconstructions, log-likelihoods and a report."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from fspace.canvas import array
from fspace.datasets import write_table
from fspace.encoding_data import Material, read_material, same_file
from fspace.encoding_scores import measured
from fspace.errors import DataError, NumericalError, OptionError
from fspace.folders import (
    AMORTIZED,
    LATENTS,
    LOG_LIKELIHOOD,
    METRICS,
    RECONSTRUCTIONS,
    REPORT,
    RESULTS,
    choose_folder,
    publish,
    unfinished,
)
from fspace.inference.amortized.model import MODELS, AmortizedModel
from fspace.predictive_base import check_seed
from fspace.progress import progress
from fspace.runs import to_json

NAMES = {
    "vae": "VAE",
    "mixture": "MixtureVAE",
    "draw": "DRAW",
    "vrnn": "VRNN",
    "causal": "CausalVAE",
    "switching": "SwitchingLinear",
    "gp-states": "GPStateSpace",
    "gp-prior": "GPPriorVAE",
}
SERIES = "series: a table with --series or --time"
TAKES = {  # kinds of data, and how to say so
    "vae": (("rows", "images"), "rows of a table, or images"),
    "mixture": (("rows", "images"), "rows of a table, or images"),
    "draw": (("images",), "images"),
    "vrnn": (("series",), SERIES),
    "causal": (("series",), SERIES),
    "switching": (("series",), SERIES),
    "gp-states": (("series",), SERIES),
    "gp-prior": (("series",), f"{SERIES}, or images as the frames of one"),
}
SAMPLES = {  # behind a log-likelihood; particles of a filter
    "vae": 500, "mixture": 500, "draw": 50, "vrnn": 64, "causal": 64, "switching": 64, "gp-states": 64,
    "gp-prior": 50,
}  # fmt: skip
STEPS = 15  # in a pass over the data, at least, where they are as many
SEVERAL = ("vrnn", "causal")  # which learn from several series
FILTERS = ("vrnn", "switching", "gp-states")  # whose likelihood is that of particles
STEPWISE = (*FILTERS, "causal")  # without gaps in a series; judged by nats per step
GROUPS = {"mixture": "cluster", "switching": "state"}  # what their discrete latent is called
AT_ONCE = {"rows": 1000, "images": 1000, "series": 16}


@dataclass
class EncodeRun:
    """One `fspace encode`: where the data come from, what is fitted, where the results go."""

    data: str | None = None
    model: str | None = None
    series: str | None = None
    time: str | None = None
    label: str | None = None
    drop: Sequence[str] = ()
    test_fraction: float = 0.1
    out: str | None = None
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the model
    plan: dict[str, Any] = field(default_factory=dict)  # of its training


@dataclass
class Encoded:
    """What the model says: means [n, l] and reconstruction of every row, image or step; log_likelihood and bounds of
    every unit (series where there are such), nats; for filters ess along each series; for q of functions, bands of the
    latents of the first series (t, lower, upper); groups: the most probable cluster or state [n]."""

    means: Float[np.ndarray, "n l"]
    reconstruction: Float[np.ndarray, "n *row"]
    log_likelihood: Float[np.ndarray, " u"]
    pareto_k: Float[np.ndarray, " u"] | None = None
    bounds: dict[str, NDArray] = field(default_factory=dict)
    ess: list[NDArray] | None = None
    groups: NDArray | None = None
    bands: tuple[NDArray, NDArray, NDArray] | None = None


def encode_data(run: EncodeRun, quiet: bool = False) -> dict[str, Any]:
    """Fit a model with latents and write everything; returns what metrics.json holds, with the files' paths.

    Raises a FspaceError before the fit for whatever can be known to be wrong by then. After Ctrl-C in the fit all is
    written about its best state so far, and "interrupted" is true.
    """
    if run.model is not None and run.model not in NAMES:
        raise OptionError(f"--model {run.model} does not exist; choose one of {', '.join(NAMES)}.")
    if not 0 <= run.test_fraction < 1:
        raise OptionError(f"--test-fraction {run.test_fraction} must be at least 0 and below 1.")
    seed = check_seed(run.plan.get("seed", 0))
    folder = choose_folder(run.out, run.overwrite)
    if same_file(run.data, folder, RESULTS):
        raise OptionError(f"--out {folder}: the results would replace {run.data}, which they are made from.")
    material = read_material(
        run.data, run.series, run.time, run.label, run.drop,
        gaps=run.model not in STEPWISE, scaled=run.options.get("likelihood") != "categorical",
    )  # fmt: skip
    name = run.model or _usual(material)
    if name == "gp-prior" and material.kind == "images":
        material = material.as_frames()
    train, test = _split(material.units, run.test_fraction, seed)
    model = _made(name, material, train, run.options)
    plan = _plan(name, len(train)) | {k: v for k, v in run.plan.items() if v is not None}
    part = unfinished(folder)
    try:
        started = time.perf_counter()
        try:
            model.fit(_data(name, material, train), progress=not quiet, **plan)
        except (
            NumericalError
        ) as error:  # what was learnt before is not lost, unless it would replace other results
            if run.overwrite or not hasattr(model, "history_") or not model.history_.held_out:
                raise
            model.save(part / AMORTIZED)
            raise NumericalError(f"{error} The best state before that is {folder / AMORTIZED}.") from error
        seconds = time.perf_counter() - started
        if model.history_.stopped == "interrupted":
            warnings.warn("Interrupted; the best state so far is kept.", stacklevel=2)
        with progress("encoding and writing the results", not quiet):
            results = _write(part, run, name, model, material, train, test, seconds)
    finally:  # whatever was written is kept, also where a later file failed
        folder = publish(part, folder, run.out, run.overwrite)
    results["files"] = {
        Path(item).stem if item != AMORTIZED else "model": str(folder / item)
        for item in RESULTS
        if (folder / item).exists()
    }
    return results


# ---- data and model --------------------------------------------------------------------------------


def _usual(material: Material) -> str:
    """The model for data of this kind: one series has nothing to hold out but frames."""
    if material.kind != "series":
        return "vae"
    gaps = bool(np.isnan(material.values).any())
    return "gp-prior" if gaps or material.units == 1 else "vrnn"


def _split(n: int, fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Units to fit and units held out, each in order; of fewer than three none is held out."""
    held = min(round(n * fraction), max(n - 2, 0))
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def _made(name: str, material: Material, train: NDArray, options: dict[str, Any]) -> AmortizedModel:
    """The model with the options given; those that are not fit the data."""
    kinds, words = TAKES[name]
    if material.kind not in kinds:
        raise DataError(f"--model {name} takes {words}; {material.source} holds {material.kind}.")
    if name in SEVERAL and len(train) < 2:
        raise DataError(
            f"--model {name} learns from at least two series, of which some are held out to tell when to stop. Use "
            "--model gp-prior, or name the column that tells series apart (--series)."
        )
    kind = getattr(import_module(MODELS[NAMES[name]]), NAMES[name])
    known = inspect.signature(kind).parameters
    given = {option: value for option, value in options.items() if value is not None}
    if "particles" in known and "samples" in given:
        given["particles"] = given.pop("samples")
    for option in given:
        if option not in known:
            there = ", ".join(f"--{o}" for o in options if o in known)
            raise OptionError(f"--{option} is no option of --model {name}, which has {there}.")
    if "likelihood" in known:
        given.setdefault("likelihood", _likelihood(name, material))
    if name in ("vae", "mixture") and material.kind == "rows":
        given.setdefault("latents", min(16, max(1, material.values.shape[1] // 2)))
    if name == "vae":
        single = given["latent"] == "gaussian" if "latent" in given else True
        one = given.get("objective", "elbo" if single else "concrete") in (
            "elbo",
            "stl",
            "concrete",
            "rebar",
            "relax",
        )
        given.setdefault("samples", 1 if one else 5)
    return kind(**given)


def _plan(name: str, units: int) -> dict[str, Any]:
    """How to train: few rows or series would make few steps in a pass over them."""
    if name == "gp-prior":
        return {"learning_rate": 1e-2, "epochs": 600, "patience": 100}
    if name in ("switching", "gp-states"):
        return {"learning_rate": 2e-2, "epochs": 60, "batch_size": 8}
    rate = {"learning_rate": 3e-3} if name in SEVERAL or units < 1000 else {}
    return rate | {"batch_size": min(100, max(8, units // STEPS))}


def _likelihood(name: str, material: Material) -> str:
    """Bernoulli for bits, and for images with values from 0 to 1; else Gaussian."""
    values = material.values[~np.isnan(material.values)]
    bits = bool(((values == 0) | (values == 1)).all())
    grey = values.min() >= 0 and values.max() <= 1 and material.values.ndim == 4
    return "bernoulli" if bits or grey else "gaussian"


def _data(name: str, material: Material, units: NDArray) -> Any:
    """Some units as the model takes them."""
    if material.kind != "series":
        return material.values[units].astype(np.float32)
    parts = [material.parts[k] for k in units]
    if name in STEPWISE:
        return [material.flat[rows] for rows in parts]
    assert material.times is not None
    return [(material.times[rows], material.values[rows]) for rows in parts]


# ---- what the model says ---------------------------------------------------------------------------


def encoded(name: str, model: Any, material: Material) -> Encoded:
    """What a fitted model says about all data, some units at a time."""
    groups = np.split(
        np.arange(material.units), range(AT_ONCE[material.kind], material.units, AT_ONCE[material.kind])
    )
    found = [_ENCODERS[name](name, model, material, units) for units in groups]
    whole = {
        key: _joined([part[key] for part in found]) for key in found[0] if key not in ("bounds", "bands")
    }
    if material.kind == "series":  # back to the order of the table
        order = np.argsort(np.concatenate(material.parts))
        for key in {"means", "reconstruction", "groups"} & set(whole):
            whole[key] = whole[key][order]
    whole["reconstruction"] = whole["reconstruction"].reshape(material.values.shape)
    bounds = {key: np.concatenate([part["bounds"][key] for part in found]) for key in found[0]["bounds"]}
    return Encoded(**whole, bounds=bounds, bands=found[0].get("bands"))


def _joined(parts: list[Any]) -> Any:
    return sum(parts, []) if isinstance(parts[0], list) else np.concatenate(parts)


def _rows(name: str, model: Any, material: Material, units: NDArray) -> dict[str, Any]:
    data = _data(name, material, units)
    reconstruction = array(model.reconstruct(data))
    if model.likelihood == "categorical":
        reconstruction = reconstruction.argmax(-1)
    measured = model.evaluate(data, SAMPLES[name])
    groups = {"groups": array(model.clusters(data)).argmax(-1)} if name == "mixture" else {}
    return groups | {
        "means": array(model.latent_means(data)).astype(np.float64),
        "reconstruction": reconstruction.astype(np.float64),
        "log_likelihood": array(measured.log_likelihood),
        "pareto_k": array(measured.pareto_k),
        "bounds": {key: array(value).astype(np.float64) for key, value in model.bounds(data).items()},
    }


def _filtered(name: str, model: Any, material: Material, units: NDArray) -> dict[str, Any]:
    data = _data(name, material, units)
    bounds = {
        key: array(value).astype(np.float64) for key, value in model.bounds(data, SAMPLES[name]).items()
    }
    states = model.states(data) if name == "switching" else []
    groups = {"groups": np.concatenate([array(s) for s in states])} if states else {}
    return groups | {
        "means": np.concatenate([array(z) for z in model.encode(data)]).astype(np.float64),
        "reconstruction": np.concatenate([array(x) for x in model.reconstruct(data)]).astype(np.float64),
        "log_likelihood": bounds["fivo"],
        "bounds": bounds,
        "ess": [array(ess) for ess in model.effective_sample_size(data, SAMPLES[name])],
    }


def _convolved(name: str, model: Any, material: Material, units: NDArray) -> dict[str, Any]:
    data = _data(name, material, units)
    bounds = {
        key: array(value).astype(np.float64) for key, value in model.bounds(data, SAMPLES[name]).items()
    }
    return {
        "means": np.concatenate([array(q.mean) for q in model.encode(data)]).astype(np.float64),
        "reconstruction": np.concatenate([array(x) for x in model.reconstruct(data)]).astype(np.float64),
        "log_likelihood": bounds["iwae"],
        "bounds": bounds,
    }


def _functions(name: str, model: Any, material: Material, units: NDArray) -> dict[str, Any]:
    data = _data(name, material, units)
    latents = [q.latent(t) for q, (t, _) in zip(model.encode(data), data)]
    lower, upper = latents[0].interval(0.9)
    return {
        "means": np.concatenate([array(f.mean) for f in latents]),
        "reconstruction": np.concatenate([array(x) for x in model.reconstruct(data)]),
        "log_likelihood": array(model.log_likelihood(data, SAMPLES[name])),
        "bounds": {},
        "bands": (data[0][0], array(lower), array(upper)),
    }


_ENCODERS = dict.fromkeys(("vae", "mixture", "draw"), _rows) | dict.fromkeys(FILTERS, _filtered) | {
    "causal": _convolved, "gp-prior": _functions
}  # fmt: skip


# ---- what is written -------------------------------------------------------------------------------


def _write(
    part: Path,
    run: EncodeRun,
    name: str,
    model: Any,
    material: Material,
    train: NDArray,
    test: NDArray,
    seconds: float,
) -> dict[str, Any]:
    """Encode with the fitted model and write its files, the model first."""
    from fspace.encoding_report import write_encoding_report

    model.save(part / AMORTIZED)
    with torch.no_grad():
        said = encoded(name, model, material)
    names = [f"z{i}" for i in range(said.means.shape[1])]
    latents = pd.concat([_keys(material, run), pd.DataFrame(said.means, columns=names)], axis=1)
    if said.groups is not None:
        latents[GROUPS[name]] = said.groups
    write_table(latents, part / f"{LATENTS}.{material.ending}")
    if material.names:
        table = pd.concat(
            [_keys(material, run), pd.DataFrame(said.reconstruction, columns=material.names)], axis=1
        )
        write_table(table, part / f"{RECONSTRUCTIONS}.{material.ending}")
    else:
        np.save(part / f"{RECONSTRUCTIONS}.npy", said.reconstruction, allow_pickle=False)
    write_table(_likelihoods(run, material, said, test), part / f"{LOG_LIKELIHOOD}.{material.ending}")
    results = measured(name, model, material, said, train, test, seconds, SAMPLES[name])
    (part / METRICS).write_text(to_json(results) + "\n", encoding="utf-8")
    write_encoding_report(part / REPORT, name, model, material, said, results, test if len(test) else train)
    return results


def _keys(material: Material, run: EncodeRun) -> pd.DataFrame:
    """What tells a row of the results: its number, and its series and time where it has such."""
    keys: dict[str, Any] = {"row": np.arange(len(material.values))}
    if material.series is not None:
        keys[run.series or "series"] = material.series
    if run.time is not None:
        keys[run.time] = material.times
    return pd.DataFrame(keys)


def _likelihoods(run: EncodeRun, material: Material, said: Encoded, test: NDArray) -> pd.DataFrame:
    held = np.isin(np.arange(material.units), test)
    columns: dict[str, Any] = {"row": np.arange(material.units)}
    if material.kind == "series":
        first = [rows[0] for rows in material.parts]
        columns = {"series": np.arange(len(first))} if material.series is None else {}
        columns |= {} if material.series is None else {run.series or "series": material.series[first]}
        columns["steps"] = [len(rows) for rows in material.parts]
    columns |= {"held_out": held, "log_likelihood": said.log_likelihood}
    columns |= {} if said.pareto_k is None else {"pareto_k": said.pareto_k}
    return pd.DataFrame(columns | said.bounds)
