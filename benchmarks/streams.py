"""
The streams of a parity group and nothing else: `python -m benchmarks.streams DIRECTORY RANK NODES NBYTES` is one node.

It serves NBYTES in warm tmpfs memory, and each time that it is told so it reads its share of every other node's, a
window of each in turn, as a daemon does that builds parity. Nothing is verified, encoded or kept.
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

from snapshotd.mapping import map_new_file

from .owner import RANGE, serve_plainly
from .processes import wait_for
from .run import Run

__all__ = ["Group"]

_WINDOW_BYTES = 1 << 20
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

    def step(self) -> None:
        """Each node reads what it would build its parity of."""
        for sock in self._socks:
            sock.sendall(b"!")
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


def main(home: Path, rank: int, nodes: int, nbytes: int) -> None:
    with (home / f"{rank}.memory").open("w+b") as file:
        view = map_new_file(file.fileno(), nbytes)
    words = np.frombuffer(view, np.uint64, count=nbytes // 8)
    words[:] = np.arange(len(words), dtype=np.uint64)
    part = home / f"{rank}.port.part"
    part.write_text(str(serve_plainly(view, None)), encoding="ascii")
    os.rename(part, home / f"{rank}.port")
    socks = _connect(home, rank, nodes)
    share = nbytes // len(socks)
    rooms = [np.empty(_WINDOW_BYTES, np.uint8).data for _ in socks]
    with _told(home / f"{rank}.sock") as orders:
        while orders.recv(1):
            for sock in socks:
                sock.sendall(RANGE.pack(0, share))
            for begin in range(0, share, _WINDOW_BYTES):
                size = min(_WINDOW_BYTES, share - begin)
                for sock, room in zip(socks, rooms, strict=True):
                    at = 0
                    while at < size:
                        at += sock.recv_into(room[at:size])
            orders.sendall(b"!")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
