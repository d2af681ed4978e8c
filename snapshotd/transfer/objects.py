"""
Finds what is asked for, and holds what is to be held: a tool that reads for minutes must not lose what it reads.

Rule 1: a hold ends with its connection, however that ends; one that is silent for the idle timeout is ended.
Rule 2: at most so many connections hold at a time: they are never cut for others, and others want to be served too.
Rule 3: what is held can be read over any connection, also when its owner has given it up. What its owner has comes
        first: it may have been rotten, and be there again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Final, Protocol

from snapshotd.arena.keys import KeyId, describe, key_id
from snapshotd.errors import SnapshotdError
from snapshotd.transfer import wire
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["HELD_MAX", "Holding", "Lookup", "Objects", "Refusal", "Servable"]

HELD_MAX: Final = 4096
"""Objects that one connection may hold: far more than there are ranks on a node."""

_log: Final = logging.getLogger(__name__)


class Servable(Protocol):
    """What the server needs of an object: an arena's slots and parity files have it, tests have their own."""

    @property
    def view(self) -> memoryview:
        """All of its bytes."""

    @property
    def file_bytes(self) -> int:
        """How many."""

    @property
    def digests(self) -> bytes | None:
        """Chunk digests; None while the object is not sealed."""

    @property
    def root(self) -> str:
        """Root digest."""


Lookup = Callable[[ObjectKey], AbstractContextManager[Servable | None]]


class Refusal(SnapshotdError):
    """A request that is answered with a no; the connection goes on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True, eq=False)
class _Held:
    """An object under lease, for whoever holds it and for those who read it at the moment."""

    obj: Servable
    lease: ExitStack
    num_users: int = 1


class Objects:
    """
    The objects of a server; safe to use from many threads.

    Args:
        lookup: finds an object and leases it for the length of its block; None for what is not here.
        holders_max: so many connections may hold something.
    """

    def __init__(self, lookup: Lookup, *, holders_max: int) -> None:
        self._lookup = lookup
        self._holders_max = holders_max
        self._lock = threading.Lock()
        self._num_holders = 0
        self._held: dict[KeyId, list[_Held]] = {}

    @contextlib.contextmanager
    def leased(self, key: ObjectKey) -> Iterator[Servable]:
        """Yield a sealed object that stays until the end of the block; Refusal when it is not here."""
        with ExitStack() as lease:
            obj = self._find(key, lease)
            if obj is None:
                held = self._share(key)
                lease.callback(self._let_go, key, held)
                obj = held.obj
            yield obj

    def _find(self, key: ObjectKey, lease: ExitStack) -> Servable | None:
        try:
            obj = lease.enter_context(self._lookup(key))
        except SnapshotdError as error:
            raise Refusal(error.code, str(error)) from error
        except Exception as error:
            _log.exception("lookup failed")
            raise Refusal("INTERNAL", f"the lookup of {describe(key)} failed") from error
        return None if obj is None or obj.digests is None else obj

    def _share(self, key: ObjectKey) -> _Held:
        with self._lock:
            held = self._held.get(key_id(key))
            if not held:
                raise _missing(key)
            held[-1].num_users += 1
            return held[-1]

    def _hold(self, key: ObjectKey, *, first: bool) -> _Held:
        """For a connection that holds nothing yet (``first``), or something already."""
        with ExitStack() as lease:
            obj = self._find(key, lease)
            if obj is None:
                raise _missing(key)
            with self._lock:
                if first and self._num_holders >= self._holders_max:
                    raise Refusal(
                        wire.PeerBusy.code,
                        f"{self._num_holders} connections hold snapshots here already, and that is the most that may",
                    )
                self._num_holders += first
                held = _Held(obj, lease.pop_all())
                self._held.setdefault(key_id(key), []).append(held)
                return held

    def _let_go(self, key: ObjectKey, held: _Held) -> None:
        with self._lock:
            held.num_users -= 1
            if held.num_users:
                return
            others = self._held[key_id(key)]
            others.remove(held)
            if not others:
                del self._held[key_id(key)]
        held.lease.close()

    def _leave(self) -> None:
        with self._lock:
            self._num_holders -= 1


class Holding:
    """What one connection holds, true if it is anything; for the thread of the connection."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._held: dict[KeyId, tuple[ObjectKey, _Held]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def add(self, key: ObjectKey) -> Servable:
        """Hold an object, and return it; nothing changes for one that is held already. Refusal when it may not be."""
        name = key_id(key)
        if name not in self._held:
            if len(self._held) >= HELD_MAX:
                raise Refusal("INVALID_ARGUMENT", f"one connection holds at most {HELD_MAX} objects")
            self._held[name] = key, self._objects._hold(key, first=not self._held)
        return self._held[name][1].obj

    def close(self) -> None:
        """Let go of everything."""
        if self._held:
            self._objects._leave()
        while self._held:
            self._objects._let_go(*self._held.popitem()[1])


def _missing(key: ObjectKey) -> Refusal:
    return Refusal("NOT_FOUND", f"{describe(key)} is not sealed here")
