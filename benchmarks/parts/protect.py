"""Protect: a large state on four daemons, from its seals to the commit of its parity, against the floors of that."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from snapshotd.erasure import Codec, load_codec

from .. import Row, Run, Sample
from ..owner import PIECE_BYTES, RANGE
from ..played import Company
from ..processes import wait_for

GOAL = 7

_NODES, _K = 4, 3
_CHUNK_BYTES = 256 * 1024
_CORES = 2
_SHARE = 2 * _NODES * (1 + 1 / _K) + 3
"""What all of it needs of tmpfs, in states: two generations with parity on each node, and the floors' memory."""


def rows(run: Run) -> Iterator[Row]:
    size = min(run.size(), int(shutil.disk_usage(run.directory).free * 0.9 / _SHARE)) // (8 << 20) * (8 << 20)
    floors = _Floors(run, size)
    budget = f"{int(size * 2 * (1 + 1 / _K) * 1.02) + (16 << 20)}"
    cluster = run.cluster(_NODES, budget=budget)
    with Company(cluster, size) as company, ThreadPoolExecutor(_CORES) as pool:
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: Sample(company.step()),
            "digest": lambda: floors.digest(pool),
            "send": lambda: floors.send(pool),
            "encode": lambda: floors.encode(pool),
        }
        found = run.rounds(ways, rounds=7, within_s=60.0, pids=[*cluster.pids, floors.owner])
    ours = found["ours"]
    parts = {name: found[name] * _NODES for name in ("digest", "send", "encode")}
    floor = parts["digest"] + parts["send"] + parts["encode"]
    nbytes = _NODES * size
    text = ", ".join(f"{name} {one.median:.2f} s" for name, one in parts.items())
    yield Row.cost(
        f"seals to protected commit, {_NODES} nodes with {size / 1e9:.2f} GB each, m = 1",
        ours,
        floor,
        at_most=1.3,
        against=f"digest + send + encode on {_CORES} cores",
        nbytes=nbytes,
        text=text,
    )


class _Floors:
    """The same work for one node's bytes by plain loops, on as many threads as there are cores."""

    def __init__(self, run: Run, size: int) -> None:
        self._source = run.memory(size)
        self._target = run.memory(size, fill=False)
        self._parity = run.memory(size // _K, fill=False)
        self._codec: Codec = load_codec()[0]
        file = run.directory / "addresses"
        module = f"{__package__.rpartition('.')[0]}.owner"
        child = run.start("owner", ["-m", module, str(run.directory / "memory-0"), str(file)])
        text = wait_for(
            lambda: file.read_text(encoding="ascii") if file.exists() else "", "the owner", 60.0, of=[child]
        )
        self.owner = child.pid
        port = json.loads(text)["floor-plain"]
        self._socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(_CORES)]
        run.finally_do(lambda: [sock.close() for sock in self._socks])

    def digest(self, pool: ThreadPoolExecutor) -> None:
        def one(begin: int, end: int) -> None:
            for at in range(begin, end, _CHUNK_BYTES):
                xxhash.xxh3_64_intdigest(self._source[at : min(at + _CHUNK_BYTES, end)])

        _on_all(pool, one, self._halves(self._source.nbytes))

    def send(self, pool: ThreadPoolExecutor) -> None:
        def one(index: int, begin: int, end: int) -> None:
            sock = self._socks[index]
            sock.sendall(RANGE.pack(begin, end))
            while begin < end:
                begin += sock.recv_into(self._target[begin : min(begin + PIECE_BYTES, end)])

        halves = self._halves(self._source.nbytes)
        _on_all(pool, one, [(index, *half) for index, half in enumerate(halves)])

    def encode(self, pool: ThreadPoolExecutor) -> None:
        unit = self._parity.nbytes
        units = [self._source[i * unit : (i + 1) * unit] for i in range(_K)]

        def one(begin: int, end: int) -> None:
            for at in range(begin, end, PIECE_BYTES):
                stop = min(at + PIECE_BYTES, end)
                self._codec.encode_row(_K, 1, 0, [part[at:stop] for part in units], self._parity[at:stop])

        _on_all(pool, one, self._halves(unit))

    @staticmethod
    def _halves(nbytes: int) -> list[tuple[int, int]]:
        ends = [nbytes * i // _CORES // _CHUNK_BYTES * _CHUNK_BYTES for i in range(1, _CORES)] + [nbytes]
        return list(zip([0, *ends[:-1]], ends, strict=True))


def _on_all(pool: ThreadPoolExecutor, work: Callable[..., None], items: Sequence[Sequence[int]]) -> None:
    for future in [pool.submit(work, *item) for item in items]:
        future.result()
