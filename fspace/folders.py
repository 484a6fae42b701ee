"""The folder of results: where it is, and that no earlier results are lost."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from fspace.errors import ModelFileError, OptionError

DEFAULT_OUT = "fspace-out"
MODEL, METRICS, PREDICTIONS, REPORT = "model.fspace", "metrics.json", "predictions.csv", "report.html"
AMORTIZED = "model.amortized"
LATENTS, RECONSTRUCTIONS, LOG_LIKELIHOOD = "latents", "reconstructions", "log_likelihood"  # with an ending
RESULTS = (MODEL, METRICS, PREDICTIONS, REPORT, AMORTIZED) + tuple(
    f"{name}.{ending}"
    for name in (LATENTS, RECONSTRUCTIONS, LOG_LIKELIHOOD)
    for ending in ("csv", "parquet", "npy")
)


def model_file(path: str) -> Path:
    """A saved model, named by its file (with or without its ending) or by the folder that `fspace fit` wrote. Raises
    ModelFileError where there is none."""
    file = Path(path)
    if file.is_dir() and (file / MODEL).exists():
        file = file / MODEL
    if not file.exists() and file.with_name(file.name + Path(MODEL).suffix).exists():
        file = file.with_name(file.name + Path(MODEL).suffix)
    if not file.exists():
        raise ModelFileError(
            f"There is no model {str(file)!r}; `fspace fit` writes one as {DEFAULT_OUT}/{MODEL}."
        )
    return file


def choose_folder(out: str | None, overwrite: bool) -> Path:
    """Where results go. Raises OptionError where that would lose earlier ones or cannot be written."""
    folder = Path(out if out is not None else DEFAULT_OUT)
    try:
        there = folder.exists()
    except OSError as error:
        raise OptionError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    if there and not folder.is_dir():
        raise OptionError(f"--out {folder}: that is a file; name a folder.")
    if _taken(folder) and not overwrite:
        if out is not None:
            raise OptionError(
                f"--out {folder}: there is something in it. Name another folder, or give --overwrite to "
                "replace the results in it."
            )
        folder = _next_free(folder)
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    if not os.access(parent, os.W_OK):
        raise OptionError(f"--out {folder}: {parent} cannot be written to.")
    return folder


def _taken(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _next_free(folder: Path) -> Path:
    number = 2
    while _taken(folder.with_name(f"{DEFAULT_OUT}-{number}")):
        number += 1
    return folder.with_name(f"{DEFAULT_OUT}-{number}")


def unfinished(folder: Path) -> Path:
    """A new, empty folder beside the other for the files of this run; those of runs that were killed are removed.

    Made before the fit, so that nobody waits for results that then have no place. Raises OptionError where that fails.
    """
    prefix = f".{folder.name}.{platform.node()}."  # whether a run on another machine lives is not known here
    part = folder.with_name(f"{prefix}{os.getpid()}")
    try:
        for other in folder.absolute().parent.iterdir():
            number = other.name.removeprefix(prefix)
            if other.name.startswith(prefix) and number.isdecimal() and not _lives(int(number)):
                shutil.rmtree(other, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise OptionError(f"--out {folder}: the folder cannot be made ({error.strerror}).") from error
    return part


def _lives(process: int) -> bool:
    """Whether there is another process of this number; True where nobody can tell."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # there, signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def publish(part: Path, folder: Path, out: str | None, overwrite: bool) -> Path:
    """Move finished files, if there are any, to where they belong; another run may have taken the folder meanwhile."""
    if not any(part.iterdir()):
        part.rmdir()
        return folder
    if _taken(folder) and not overwrite:
        folder = _next_free(folder) if out is None else folder.with_name(f"{folder.name}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # no file of an earlier run beside those of this one
        earlier = folder / name
        if earlier.is_dir():
            shutil.rmtree(earlier)
        elif earlier.exists():
            earlier.unlink()
    for item in part.iterdir():
        os.replace(item, folder / item.name)
    part.rmdir()
    return folder
