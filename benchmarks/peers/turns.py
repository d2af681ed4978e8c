"""
Turns: processes that are compared measure one round each, one after the other, so that what else the machine does meets
them all. Each has a connection to the part; a byte lets it go on, a byte says that it has done.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..processes import BenchError, Child

__all__ = ["Alone", "InTurns", "Rounds", "Turns"]

_GO, _END = b"g", b"e"


class Rounds(Protocol):
    """What a process that measures asks."""

    def another(self, count: int) -> bool:
        """Whether to measure round ``count`` (round 0 does not count); returns when it is to begin."""


class Alone:
    """As many rounds as fit into ``within_s``, three at least while they do not take twice as long; all ranks agree."""

    def __init__(self, rounds: int, within_s: float, agreed: Callable[[bool], bool]) -> None:
        self._rounds, self._within_s, self._agreed = rounds, within_s, agreed
        self._began = 0.0

    def another(self, count: int) -> bool:
        if count == 1:
            self._began = time.monotonic()
        if count <= 1:
            return True
        if count > self._rounds:
            return False
        elapsed = time.monotonic() - self._began
        return not self._agreed(count > 3 and elapsed > self._within_s or elapsed > 2 * self._within_s)


class InTurns:
    """Rounds when the part says so."""

    def __init__(self, path: str, name: str) -> None:
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(path)
        self._link.sendall(f"{name}\n".encode())

    def another(self, count: int) -> bool:
        if count:
            self._link.sendall(b".")
        return self._link.recv(1) == _GO

    def close(self) -> None:
        self._link.close()


class Turns:
    """The part's side: a socket for the processes, and rounds of all of them."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._links: dict[str, socket.socket] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *error: object) -> None:
        for link in (self._listener, *self._links.values()):
            link.close()

    def gather(self, children: dict[str, Child], timeout_s: float) -> dict[str, str]:
        """Wait until each of these can begin; returns why some cannot, by name."""
        failed: dict[str, str] = {}
        self._listener.settimeout(0.1)
        deadline = time.monotonic() + timeout_s
        while waiting := children.keys() - self._links.keys() - failed.keys():
            with contextlib.suppress(TimeoutError):
                link, _ = self._listener.accept()
                self._links[_name(link, timeout_s)] = link
            for name in waiting - self._links.keys():
                if children[name].code is not None:
                    failed[name] = f"ended with code {children[name].code}: {children[name].last_words()}"
                elif time.monotonic() > deadline:
                    failed[name] = f"was not ready after {timeout_s:.0f} s"
        return failed

    def go_round(self, *, backwards: bool = False) -> dict[str, str]:
        """One round of each; returns why some ended, which have no further turn."""
        failed: dict[str, str] = {}
        for name in sorted(self._links, reverse=backwards):
            try:
                self._links[name].sendall(_GO)
                if self._links[name].recv(1) != b".":
                    raise BenchError("ended")
            except (OSError, BenchError) as error:
                failed[name] = str(error)
                self._links.pop(name).close()
        return failed

    def end(self) -> None:
        """No more rounds."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.sendall(_END)


def _name(link: socket.socket, timeout_s: float) -> str:
    link.settimeout(timeout_s)
    name = b""
    while not name.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            raise BenchError("a process that was to take turns ended")
        name += byte
    return name.decode().strip()
