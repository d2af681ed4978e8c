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
from typing import Any

import numpy as np
import xxhash

from snapshotd.mapping import map_file

from .processes import die_with_parent

__all__ = ["BareCopy"]

_CHUNK_BYTES = 256 * 1024


class BareCopy:
    """One thread that copies prepared pairs of arrays when told to, and then calls `done`."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]], done: Any = None) -> None:
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
