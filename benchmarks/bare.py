"""
What a snapshot of each step cannot do without: one background copy, fenced, and one digest of its bytes.

`python -m benchmarks.bare FILE SOCKET NICE` hashes FILE, mapped, each time a byte comes over SOCKET, and answers.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from snapshotd.mapping import map_file, map_new_file

from .cluster import clean_environment
from .processes import Child, die_with_parent, wait_for

__all__ = ["BareCopy", "BareHash", "Pairs", "bare_slot"]

Pairs: TypeAlias = list[tuple[Any, Any]]
"""(target, source) arrays."""

_CHUNK_BYTES = 256 * 1024
_NICE = 5
"""What the daemon runs at."""


class BareCopy:
    """One thread that copies prepared pairs of arrays when told to, and then calls `done`."""

    def __init__(self, pairs: Pairs, done: Any = None) -> None:
        self._pairs = pairs
        self._done = done
        self._begin, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="bare-copy", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self._begin.release()

    def fence(self) -> None:
        self._end.acquire()

    def close(self) -> None:
        self._stopping = True
        self._begin.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._begin.acquire()
            if self._stopping:
                return
            for target, source in self._pairs:
                np.copyto(target, source)
            self._end.release()
            if self._done is not None:
                self._done()


class BareHash:
    """A process that hashes the file at ``path`` when told to, and yields as much as the daemon does."""

    def __init__(self, home: Path, path: Path) -> None:
        address = home / "hasher"
        arguments = ["-m", __name__, str(path), str(address), str(_NICE)]
        self._child = Child("hasher", arguments, home / "hasher.log", env=clean_environment())
        self._link = socket.socket(socket.AF_UNIX)
        try:
            wait_for(address.exists, "the hasher", 30.0, of=[self._child])
            self._link.connect(str(address))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def begin(self) -> None:
        self._link.sendall(b".")

    def wait(self) -> None:
        self._link.recv(1)

    def close(self) -> None:
        self._link.close()
        self._child.end()


def bare_slot(home: Path, tensors: Sequence[torch.Tensor]) -> tuple[Pairs, Path, int]:
    """A warm file in tmpfs that the tensors fit into: (target, source) arrays, its path and its size."""
    sources = [tensor.view(torch.int32).numpy() for tensor in tensors]
    nbytes = sum(source.nbytes for source in sources)
    path = home / "bare"
    with path.open("w+b") as file:
        slot = np.frombuffer(map_new_file(file.fileno(), nbytes), dtype=np.uint8)
    pairs, position = [], 0
    for source in sources:
        end = position + source.nbytes
        pairs.append((slot[position:end].view(np.int32).reshape(source.shape), source))
        position = end
    return pairs, path, nbytes


def _hash(path: str, address: str, niceness: str) -> None:
    die_with_parent()
    os.nice(int(niceness))
    with open(path, "r+b") as file:
        view = map_file(file.fileno(), os.path.getsize(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(1)
        link, _ = listener.accept()
    while link.recv(1):
        for begin in range(0, view.nbytes, _CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(view[begin : begin + _CHUNK_BYTES])
        link.sendall(b".")


if __name__ == "__main__":
    _hash(*sys.argv[1:])
