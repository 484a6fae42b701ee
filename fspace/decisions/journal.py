"""Files that lose nothing when the process is killed: a journal of lines, and a state that is replaced whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from fspace.errors import ModelFileError, OptionError


class Journal:
    """JSON lines that are on the disk when `append` returns. A last line without its end was never told, and is cut."""

    def __init__(self, path: str | os.PathLike[str]):
        if not isinstance(path, str | os.PathLike):
            raise OptionError(f"{path!r} is no name of a file.")
        self.path = Path(path)
        self.entries: list[Any] = []
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self.entries = [json.loads(line) for line in whole.splitlines()]
            self._file = self.path.open("ab", buffering=0)
            if len(whole) < len(content):
                self._file.truncate(len(whole))
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"{str(self.path)!r} is no journal that can be gone on with: {error}"
            ) from error

    def append(self, *entries: Any) -> None:
        """Write entries and wait until the disk has them. Raises ModelFileError; then the disk has none of them."""
        content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise ModelFileError(f"{str(self.path)!r} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """JSON to a file, whole or not at all; on the disk when this returns. Raises ModelFileError."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        folder = os.open(target.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ModelFileError(f"{str(target)!r} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_state(path: str | os.PathLike[str]) -> Any:
    """What `write_state` wrote. Raises ModelFileError for another or damaged file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{str(path)!r} is no state that can be gone on with: {error}") from error
