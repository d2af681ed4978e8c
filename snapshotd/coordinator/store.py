"""
What the coordinator must never forget, in SQLite.

One row per (job, key). A `sync` write is on the disk when `apply` returns; the others survive the
death of the process (WAL), not of the machine, which is enough for what the daemons can tell again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from snapshotd.coordinator.events import Delete, Put
from snapshotd.errors import FormatError, UsageError

__all__ = ["Store"]

_SCHEMA_VERSION = 1
KV_PREFIX = "kv/"


class Store:
    """
    The durable rows of all jobs; opened by one coordinator at a time.

    Raises UsageError when the directory cannot be used or another coordinator has it, FormatError when the file is not
    ours.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "coordinator.sqlite"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            os.close(descriptor)
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=2.0)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS rows (job TEXT, key TEXT, value TEXT NOT NULL, PRIMARY KEY (job, key))"
            )
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA_VERSION):
                raise FormatError(f"{self.path} has schema version {version}, this coordinator knows {_SCHEMA_VERSION}")
            self._db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            self._db.execute("COMMIT")
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be made or opened ({error.strerror}); name a directory of ours with --state"
            ) from error
        except sqlite3.OperationalError as error:
            raise UsageError(
                f"{self.path} cannot be opened ({error}); is another coordinator running with --state {directory}?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise FormatError(
                f"{self.path} is not a coordinator's store ({error}); move it away to begin anew"
            ) from error
        self._sync: bool | None = None

    def remembered(self) -> Iterator[tuple[str, str, str]]:
        """All rows (job, key, value) but the launchers' key-value space."""
        for job, key, value in self._db.execute("SELECT job, key, value FROM rows ORDER BY job, key"):
            if not key.startswith(KV_PREFIX):
                yield job, key, value

    def apply(self, changes: Iterable[Put | Delete]) -> None:
        """Make the changes durable, all or nothing, before it returns."""
        changes = tuple(changes)
        if not changes:
            return
        self._set_sync(any(isinstance(change, Put) and change.sync for change in changes))
        if len(changes) == 1:
            self._make(changes[0])  # a statement is a transaction
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                self._make(change)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def key_values(self, job: str, prefix: str) -> dict[str, str]:
        """The rows of a job whose key starts with the prefix, prefix included."""
        rows = self._db.execute(
            "SELECT key, value FROM rows WHERE job = ? AND substr(key, 1, ?) = ?", (job, len(prefix), prefix)
        )
        return dict(rows.fetchall())

    def delete_prefix(self, job: str, prefix: str, *, but: str) -> None:
        """Delete a job's rows under `prefix`, except those under `but`."""
        self._set_sync(False)
        self._db.execute(
            "DELETE FROM rows WHERE job = ? AND substr(key, 1, ?) = ? AND substr(key, 1, ?) != ?",
            (job, len(prefix), prefix, len(but), but),
        )

    def close(self) -> None:
        self._db.close()

    def _make(self, change: Put | Delete) -> None:
        if isinstance(change, Put):
            self._db.execute(
                "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (job, key) DO UPDATE SET value = excluded.value",
                (change.job, change.key, change.value),
            )
        elif change.key is None:
            self._db.execute("DELETE FROM rows WHERE job = ?", (change.job,))
        else:
            self._db.execute("DELETE FROM rows WHERE job = ? AND key = ?", (change.job, change.key))

    def _set_sync(self, sync: bool) -> None:
        if sync != self._sync:
            self._db.execute("PRAGMA synchronous=FULL" if sync else "PRAGMA synchronous=NORMAL")
            self._sync = sync
