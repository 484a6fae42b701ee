"""What every benchmark does: say which machine and versions, take turns, write the figures down."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("fspace", "torch", "gpytorch", "botorch", "numpy", "scipy", "scikit-learn")


def machine() -> dict[str, Any]:
    """The hardware and versions that a figure belongs to; no names of machines."""
    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": _memory_gib()}
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["python"] = platform.python_version()
    facts["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    facts["gpu"] = _gpu_name()
    facts["versions"] = {name: _version(name) for name in PACKAGES}
    facts["commit"] = commit()
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    return facts


def commit() -> str:
    """The commit that ran, with a plus sign where the package had changes that were not committed."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "fspace") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json`, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, allow_nan=True) + "\n")
    part.replace(path)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"written: {shown}")
    return path


def say(*parts: object) -> None:
    """Print at once, with the time of day: a benchmark is watched."""
    print(time.strftime("%H:%M:%S"), *parts, flush=True)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`["members=4", "kernel=deep"]` to keyword arguments; values are read as JSON where they are JSON."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found:
            raise SystemExit(f"--set takes NAME=VALUE, not {pair!r}")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError):
        return None


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
