"""The folder of results: where it is, and that no earlier results are lost."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from fspace.errors import OptionError

DEFAULT_OUT = "fspace-out"
MODEL, METRICS, PREDICTIONS, REPORT = "model.fspace", "metrics.json", "predictions.csv", "report.html"


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

    Raises OSError where it cannot be made.
    """
    prefix = f".{folder.name}.{platform.node()}."  # whether a run on another machine lives is not known here
    for other in folder.absolute().parent.iterdir():
        number = other.name.removeprefix(prefix)
        if other.name.startswith(prefix) and number.isdecimal() and not _lives(int(number)):
            shutil.rmtree(other, ignore_errors=True)
    part = folder.with_name(f"{prefix}{os.getpid()}")
    part.mkdir()
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
    """Move finished files to where they belong; another run may have taken the folder meanwhile."""
    if _taken(folder) and not overwrite:
        folder = _next_free(folder) if out is None else folder.with_name(f"{folder.name}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, METRICS, PREDICTIONS, REPORT):  # no file of an earlier run beside those of this one
        earlier = folder / name
        if earlier.is_dir():
            shutil.rmtree(earlier)
        elif earlier.exists():
            earlier.unlink()
    for item in part.iterdir():
        os.replace(item, folder / item.name)
    part.rmdir()
    return folder
