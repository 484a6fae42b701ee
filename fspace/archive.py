"""One file of JSON and safetensors: what saved models and checkpoints lie in. Nothing in it can run code."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from fspace.errors import ModelFileError


def write_archive(path: Path, stem: str, header: str, tensors: Mapping[str, Tensor], called: str) -> None:
    """Write JSON text as `stem`.json and tensors as `stem`.safetensors, in full or not at all.

    called: what messages call the file. Raises ModelFileError where it cannot be written.
    """
    content = write_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    part = path.with_name(f".{uuid.uuid4().hex[:8]}.part")  # a name of its own: two may save to one path
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(f"{stem}.json", header)
            archive.writestr(f"{stem}.safetensors", content)
        os.replace(part, path)
    except OSError as error:
        raise ModelFileError(f"{called} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_archive(path: str | Path, stem: str, foreign: str) -> tuple[Any, dict[str, Tensor]]:
    """The JSON and the tensors of a file. Raises ModelFileError where there is none, or with the words `foreign`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(f"{stem}.json")), read_tensors(archive.read(f"{stem}.safetensors"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file.") from error
    except Exception as error:  # zipfile, json and safetensors each raise their own kinds for damaged bytes
        raise ModelFileError(f"{foreign} ({error}).") from error
