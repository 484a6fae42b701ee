"""Where the server's table lives: one SQLite file, or memory. What a transaction has written is durable."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fspace.errors import ServerError

APPLICATION = 0x66737061  # "fspa", so that another program's database is not taken for ours
SCHEMA = """
CREATE TABLE bases (
    id TEXT PRIMARY KEY, content BLOB, hash TEXT, state TEXT NOT NULL, opened REAL NOT NULL
) STRICT;
CREATE TABLE sites (
    basis_id TEXT NOT NULL, site_id TEXT NOT NULL, incarnation TEXT NOT NULL, version INTEGER NOT NULL,
    row_count INTEGER NOT NULL, sent_hash TEXT NOT NULL, step REAL NOT NULL, indefinite INTEGER NOT NULL,
    content BLOB NOT NULL, hash TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (basis_id, site_id)
) STRICT;
CREATE TABLE incarnations (
    site_id TEXT NOT NULL, incarnation TEXT NOT NULL, ordinal INTEGER NOT NULL, removed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (site_id, incarnation)
) STRICT;
CREATE TABLE evidence (
    at REAL NOT NULL, basis_id TEXT NOT NULL, sites INTEGER NOT NULL, rows INTEGER NOT NULL, value REAL NOT NULL
) STRICT;
CREATE TABLE attachments (name TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT;
"""


class BasisRow(NamedTuple):
    """One basis as it is stored; state is open, serving or closed."""

    id: str
    content: bytes | None
    hash: str | None
    state: str
    opened: float


class SiteRow(NamedTuple):
    """One site as it is stored. sent_hash is of what was sent, hash of what is kept, `step` of the way to it."""

    basis_id: str
    site_id: str
    incarnation: str
    version: int
    row_count: int
    sent_hash: str
    step: float
    indefinite: int
    content: bytes
    hash: str
    at: float


SITE_COLUMNS = ", ".join(SiteRow._fields)


class Store:
    """The server's tables. path: a file, made where there is none; None keeps all in memory.

    Only one process can have a file open. Raises ServerError for a file that is damaged, of another program or in use.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        name = ":memory:" if self.path is None else str(self.path)
        try:
            self._db = sqlite3.connect(name, timeout=2.0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        try:
            self._open()
        except BaseException as error:
            self._db.close()
            # sqlite3 decodes some messages about a damaged file, with bytes of the file in them
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise self._trouble(error) from error
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # acknowledged means on the disk
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0 and application == 0:
            with self.transaction():
                for statement in SCHEMA.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
            return
        if application != APPLICATION:
            raise ServerError(f"{self.path} is a database of another program; name another file.")
        problems = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problems != "ok":
            raise ServerError(
                f"{self.path} is damaged ({problems}); nothing was read from it. Restore the file from a copy, or "
                "start with a new one and let the workers send their sites again."
            )

    def _trouble(self, error: sqlite3.Error | UnicodeDecodeError) -> ServerError:
        text = str(error)
        if "locked" in text or "busy" in text:
            return ServerError(f"{self.path} is in use by another process; stop that one first.")
        unread = isinstance(error, UnicodeDecodeError)
        if unread or "malformed" in text or "not a database" in text or "corrupt" in text:
            return ServerError(
                f"{self.path} is damaged or no database ({text}); nothing was read from it. Restore the file from a "
                "copy, or start with a new one and let the workers send their sites again."
            )
        return ServerError(f"{self.path or 'The store in memory'} cannot be used ({text}).")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is kept, durably, or nothing is. Raises ServerError where it cannot be kept."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._trouble(error) from error

    def bases(self) -> list[BasisRow]:
        """All bases, in the order they came."""
        return [BasisRow(*row) for row in self._all("SELECT * FROM bases ORDER BY rowid")]

    def write_basis(self, row: BasisRow) -> None:
        """Add a basis."""
        self._db.execute("INSERT INTO bases VALUES (?, ?, ?, ?, ?)", row)

    def set_state(self, basis_id: str, state: str) -> None:
        """Mark a basis as open, serving or closed; the sites of a closed one go."""
        self._db.execute("UPDATE bases SET state = ? WHERE id = ?", (state, basis_id))
        if state == "closed":
            self._db.execute("DELETE FROM sites WHERE basis_id = ?", (basis_id,))

    def site(self, basis_id: str, site_id: str) -> SiteRow | None:
        """One site, or None."""
        rows = self._all(
            f"SELECT {SITE_COLUMNS} FROM sites WHERE basis_id = ? AND site_id = ?", (basis_id, site_id)
        )
        return SiteRow(*rows[0]) if rows else None

    def sites(self, basis_id: str) -> Iterator[SiteRow]:
        """All sites of a basis, one at a time, by name."""
        for (name,) in self._all(
            "SELECT site_id FROM sites WHERE basis_id = ? ORDER BY site_id", (basis_id,)
        ):
            row = self.site(basis_id, name)
            assert row is not None
            yield row

    def site_names(self, basis_id: str) -> list[tuple[str, str, int, int, float, float]]:
        """Of every site of a basis: name, incarnation, version, count, step and when it was put."""
        return self._all(
            "SELECT site_id, incarnation, version, row_count, step, at FROM sites WHERE basis_id = ? ORDER BY site_id",
            (basis_id,),
        )

    def indefinite(self, basis_id: str) -> int:
        """How many sites of a basis are not positive semi-definite."""
        return self._all("SELECT count(*) FROM sites WHERE basis_id = ? AND indefinite", (basis_id,))[0][0]

    def write_site(self, row: SiteRow) -> None:
        """Put a site in place of what has its name."""
        marks = ", ".join("?" * len(row))
        self._db.execute(f"INSERT OR REPLACE INTO sites ({SITE_COLUMNS}) VALUES ({marks})", row)

    def delete_site(self, site_id: str) -> None:
        """Delete a site of every basis."""
        self._db.execute("DELETE FROM sites WHERE site_id = ?", (site_id,))

    def incarnations(self, site_id: str) -> list[tuple[str, int]]:
        """Incarnations of a site, oldest first, and whether each was removed."""
        return self._all(
            "SELECT incarnation, removed FROM incarnations WHERE site_id = ? ORDER BY ordinal", (site_id,)
        )

    def write_incarnation(self, site_id: str, incarnation: str) -> None:
        """Add an incarnation after those that are known."""
        self._db.execute(
            "INSERT INTO incarnations (site_id, incarnation, ordinal) VALUES (?, ?, "
            "(SELECT count(*) FROM incarnations WHERE site_id = ?))",
            (site_id, incarnation, site_id),
        )

    def bury(self, site_id: str) -> None:
        """Mark all incarnations of a site as removed."""
        self._db.execute("UPDATE incarnations SET removed = 1 WHERE site_id = ?", (site_id,))

    def write_evidence(self, at: float, basis_id: str, sites: int, rows: int, value: float) -> None:
        """Note the log evidence at a time."""
        self._db.execute("INSERT INTO evidence VALUES (?, ?, ?, ?, ?)", (at, basis_id, sites, rows, value))

    def evidence(self, most: int) -> list[tuple[float, str, int, int, float]]:
        """The last notes of the log evidence, oldest first: time, basis, sites, rows, nats."""
        return self._all("SELECT * FROM evidence ORDER BY rowid DESC LIMIT ?", (most,))[::-1]

    def attach(self, name: str, content: bytes) -> None:
        """Keep bytes beside the tables (the model file that a posterior is written back into)."""
        self._db.execute("INSERT OR REPLACE INTO attachments VALUES (?, ?)", (name, content))

    def attachment(self, name: str) -> bytes | None:
        """Bytes that were attached, or None."""
        rows = self._all("SELECT content FROM attachments WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _all(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple]:  # type: ignore[type-arg]
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._trouble(error) from error
