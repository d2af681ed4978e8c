"""
What protecting a step cannot do without, by bare processes: `python -m benchmarks.streams DIRECTORY RANK NODES NBYTES`
is one node of a parity group.

It serves NBYTES in warm tmpfs memory, and each time that it is told so it reads its share of every other node's, a
window of each in turn, as a daemon does that builds parity. Told to stream, it does nothing with them. Told to protect,
it hashes its own bytes first, then verifies each window, encodes it, and hashes the parity. Nobody commits it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from snapshotd.erasure import load_codec
from snapshotd.layout import CHUNK_BYTES, chunk_digests, verify
from snapshotd.mapping import map_new_file

from .owner import RANGE, serve_plainly
from .processes import wait_for
from .run import Run

__all__ = ["Group"]

_WINDOW_BYTES = 1 << 20
_STREAM, _PROTECT = b"s", b"p"
_WAIT_S = 60.0


class Group:
    """Nodes, each of which protects ``nbytes``. ``pids``: their processes."""

    def __init__(self, run: Run, nodes: int, nbytes: int) -> None:
        module = f"{__package__}.streams"
        home = run.directory / f"streams-{nodes}"
        home.mkdir()
        children = [
            run.start(f"streams-{nodes}-{rank}", ["-m", module, str(home), str(rank), str(nodes), str(nbytes)])
            for rank in range(nodes)
        ]
        self.pids = [child.pid for child in children]
        self._socks: list[socket.socket] = []
        for rank in range(nodes):
            path = home / f"{rank}.sock"
            wait_for(path.exists, "a bare node", _WAIT_S, of=children)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_WAIT_S)
            sock.connect(str(path))
            self._socks.append(sock)
        run.finally_do(self._close)

    def stream(self) -> None:
        """Each node reads what it would build its parity of."""
        self._tell(_STREAM)

    def protect(self) -> None:
        """Each node hashes what it has, and builds its parity."""
        self._tell(_PROTECT)

    def _tell(self, order: bytes) -> None:
        for sock in self._socks:
            sock.sendall(order)
        for sock in self._socks:
            if not sock.recv(1):
                raise ConnectionResetError("a bare node is gone")

    def _close(self) -> None:
        for sock in self._socks:
            sock.close()


@contextmanager
def _told(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        part = path.with_suffix(".part")
        listener.bind(str(part))
        listener.listen()
        os.rename(part, path)
        with listener.accept()[0] as sock:
            yield sock


def _connect(home: Path, rank: int, nodes: int) -> list[socket.socket]:
    """To the plain loops of all others, which have written their ports."""
    socks = []
    for other in range(nodes):
        path = home / f"{other}.port"
        deadline = time.monotonic() + _WAIT_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"node {other} does not serve")
            time.sleep(0.01)
        if other != rank:
            socks.append(socket.create_connection(("127.0.0.1", int(path.read_text(encoding="ascii")))))
    return socks


class _Node:
    """What one node has: its bytes, its parity, a connection to each other node, and room for a window of it."""

    def __init__(self, home: Path, rank: int, nodes: int, nbytes: int) -> None:
        self._codec, _ = load_codec()
        self._view = _warm(home / f"{rank}.memory", nbytes)
        part = home / f"{rank}.port.part"
        part.write_text(str(serve_plainly(self._view, None)), encoding="ascii")
        os.rename(part, home / f"{rank}.port")
        self._socks = _connect(home, rank, nodes)
        self._share = nbytes // len(self._socks) // CHUNK_BYTES * CHUNK_BYTES
        self._parity = _warm(home / f"{rank}.parity", self._share)
        self._rooms = [np.empty(_WINDOW_BYTES, np.uint8).data for _ in self._socks]

    def digests(self) -> bytes:
        return chunk_digests(self._view, self._view.nbytes)

    def build(self, digests: bytes | None) -> None:
        """Read all windows; with the digests of what is read, which all nodes have alike, build parity of them."""
        for sock in self._socks:
            sock.sendall(RANGE.pack(0, self._share))
        for begin in range(0, self._share, _WINDOW_BYTES):
            end = min(begin + _WINDOW_BYTES, self._share)
            windows = [room[: end - begin] for room in self._rooms]
            for sock, window in zip(self._socks, windows, strict=True):
                at = 0
                while at < window.nbytes:
                    at += sock.recv_into(window[at:])
                if digests is not None and verify(window, digests, begin, end, base=begin):
                    raise RuntimeError("what came is not what is there")
            if digests is not None:
                out = self._parity[begin:end]
                self._codec.encode_row(len(windows), 1, 0, windows, out)
                chunk_digests(out, out.nbytes)


def _warm(path: Path, nbytes: int) -> memoryview:
    with path.open("w+b") as file:
        view = map_new_file(file.fileno(), nbytes)
    words = np.frombuffer(view, np.uint64, count=nbytes // 8)
    words[:] = np.arange(len(words), dtype=np.uint64)
    return view


def main(home: Path, rank: int, nodes: int, nbytes: int) -> None:
    node = _Node(home, rank, nodes, nbytes)
    with _told(home / f"{rank}.sock") as orders:
        while order := orders.recv(1):
            node.build(node.digests() if order == _PROTECT else None)
            orders.sendall(b"!")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
