"""
Finds what is asked for, and holds what is to be held: a tool that reads for minutes must not lose what it reads.

Rule 1: a hold ends with its connection, however that ends; one that is silent for the idle timeout is ended.
Rule 2: at most so many connections hold at a time: they are never cut for others, and others want to be served too.
Rule 3: what is held can be read over any connection, also when its owner has given it up. What its owner has comes
        first: it may have been rotten, and be there again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from snapshotd.arena.keys import KeyId, describe, key_id
from snapshotd.errors import SnapshotdError
from snapshotd.transfer import wire
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["HELD_MAX", "Holding", "Leased", "Lookup", "Objects", "Refusal", "Servable", "Wait"]

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


class Leased(Protocol):
    """The right to read an object until it is closed: an arena's leases are such."""

    @property
    def obj(self) -> Servable: ...

    def close(self) -> None: ...


Lookup = Callable[[ObjectKey], "Leased | None"]
Wait = Callable[[ObjectKey, float], None]


class Refusal(SnapshotdError):
    """A request that is answered with a no; the connection goes on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True, eq=False)
class _Held:
    """An object under lease, for whoever holds it and for those who read it at the moment."""

    key: ObjectKey
    lease: Leased
    num_users: int = 1


class Objects:
    """
    The objects of a server; safe to use from many threads.

    Args:
        lookup: finds an object and leases it; None for what is not here.
        wait: returns when an object is sealed here, or after so many seconds.
        holders_max: so many connections may hold something.
    """

    def __init__(self, lookup: Lookup, *, wait: Wait, holders_max: int) -> None:
        self._lookup = lookup
        self._wait = wait
        self._holders_max = holders_max
        self._lock = threading.Lock()
        self._num_holders = 0
        self._held: dict[KeyId, list[_Held]] = {}

    def lease(self, key: ObjectKey, wait_s: float = 0.0) -> Leased:
        """
        Return the right to read a sealed object until it is closed; Refusal when it is not here, and does not come
        within ``wait_s``.
        """
        found = self._find(key)
        if found is None and wait_s > 0:
            self._wait(key, wait_s)
            found = self._find(key)
        return found or _Share(self, key)

    def _find(self, key: ObjectKey) -> Leased | None:
        try:
            lease = self._lookup(key)
        except SnapshotdError as error:
            raise Refusal(error.code, str(error)) from error
        except Exception as error:
            _log.exception("lookup failed")
            raise Refusal("INTERNAL", f"the lookup of {describe(key)} failed") from error
        if lease is None or lease.obj.digests is not None:
            return lease
        lease.close()
        return None

    def _share(self, key: ObjectKey) -> _Held:
        with self._lock:
            held = self._held.get(key_id(key))
            if not held:
                raise _missing(key)
            held[-1].num_users += 1
            return held[-1]

    def _hold(self, key: ObjectKey, *, first: bool) -> _Held:
        """For a connection that holds nothing yet (``first``), or something already."""
        lease = self._find(key)
        if lease is None:
            raise _missing(key)
        with self._lock:
            if not first or self._num_holders < self._holders_max:
                self._num_holders += first
                held = _Held(key, lease)
                self._held.setdefault(key_id(key), []).append(held)
                return held
        lease.close()
        raise Refusal(
            wire.PeerBusy.code,
            f"{self._num_holders} connections hold snapshots here already, and that is the most that may",
        )

    def _let_go(self, held: _Held) -> None:
        with self._lock:
            held.num_users -= 1
            if held.num_users:
                return
            others = self._held[key_id(held.key)]
            others.remove(held)
            if not others:
                del self._held[key_id(held.key)]
        held.lease.close()

    def _leave(self) -> None:
        with self._lock:
            self._num_holders -= 1


class _Share:
    """The right to read what somebody else holds."""

    def __init__(self, objects: Objects, key: ObjectKey) -> None:
        self._objects = objects
        self._held = objects._share(key)

    @property
    def obj(self) -> Servable:
        return self._held.lease.obj

    def close(self) -> None:
        self._objects._let_go(self._held)


class Holding:
    """What one connection holds, true if it is anything; for the thread of the connection."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._held: dict[KeyId, _Held] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def add(self, key: ObjectKey) -> Servable:
        """Hold an object, and return it; nothing changes for one that is held already. Refusal when it may not be."""
        name = key_id(key)
        if name not in self._held:
            if len(self._held) >= HELD_MAX:
                raise Refusal("INVALID_ARGUMENT", f"one connection holds at most {HELD_MAX} objects")
            self._held[name] = self._objects._hold(key, first=not self._held)
        return self._held[name].lease.obj

    def close(self) -> None:
        """Let go of everything."""
        if self._held:
            self._objects._leave()
        while self._held:
            self._objects._let_go(self._held.popitem()[1])


def _missing(key: ObjectKey) -> Refusal:
    return Refusal("NOT_FOUND", f"{describe(key)} is not sealed here")
