"""
Floors of what protects a state: its digest, its way to another process and its parity, by plain loops on all cores.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from snapshotd.erasure import Codec, load_codec

from .owner import PIECE_BYTES, RANGE
from .processes import wait_for
from .run import Run

__all__ = ["CORES", "Floors"]

_CHUNK_BYTES = 256 * 1024
CORES = 2


class Floors:
    """
    The work for one node's ``size`` bytes, on as many threads as there are cores. ``k``: shards of a row of parity.

    Each method is a way for ``run.rounds(pids=[floors.owner])``.
    """

    def __init__(self, run: Run, size: int, k: int) -> None:
        self._k = k
        self._source = run.memory(size)
        self._target = run.memory(size, fill=False)
        self._parity = run.memory(size // k, fill=False)
        self._codec: Codec = load_codec()[0]
        file = run.directory / "addresses"
        module = f"{__package__}.owner"
        child = run.start("owner", ["-m", module, str(run.directory / "memory-0"), str(file)])
        text = wait_for(
            lambda: file.read_text(encoding="ascii") if file.exists() else "", "the owner", 60.0, of=[child]
        )
        self.owner = child.pid
        port = json.loads(text)["floor-plain"]
        self._socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(CORES)]
        self._pool = ThreadPoolExecutor(CORES)
        run.finally_do(self._close)

    def copy(self) -> None:
        """Into warm memory."""

        def one(begin: int, end: int) -> None:
            source, target = (np.frombuffer(view[begin:end], np.uint8) for view in (self._source, self._target))
            np.copyto(target, source)

        self._on_all(one, self._halves(self._source.nbytes))

    def digest(self) -> None:
        def one(begin: int, end: int) -> None:
            for at in range(begin, end, _CHUNK_BYTES):
                xxhash.xxh3_64_intdigest(self._source[at : min(at + _CHUNK_BYTES, end)])

        self._on_all(one, self._halves(self._source.nbytes))

    def send(self) -> None:
        def one(index: int, begin: int, end: int) -> None:
            sock = self._socks[index]
            sock.sendall(RANGE.pack(begin, end))
            while begin < end:
                begin += sock.recv_into(self._target[begin : min(begin + PIECE_BYTES, end)])

        halves = self._halves(self._source.nbytes)
        self._on_all(one, [(index, *half) for index, half in enumerate(halves)])

    def encode(self) -> None:
        unit = self._parity.nbytes
        units = [self._source[i * unit : (i + 1) * unit] for i in range(self._k)]

        def one(begin: int, end: int) -> None:
            for at in range(begin, end, PIECE_BYTES):
                stop = min(at + PIECE_BYTES, end)
                self._codec.encode_row(self._k, 1, 0, [part[at:stop] for part in units], self._parity[at:stop])

        self._on_all(one, self._halves(unit))

    @staticmethod
    def _halves(nbytes: int) -> list[tuple[int, int]]:
        ends = [nbytes * i // CORES // _CHUNK_BYTES * _CHUNK_BYTES for i in range(1, CORES)] + [nbytes]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _on_all(self, work: Callable[..., None], items: Sequence[Sequence[int]]) -> None:
        for future in [self._pool.submit(work, *item) for item in items]:
            future.result()

    def _close(self) -> None:
        self._pool.shutdown()
        for sock in self._socks:
            sock.close()
