"""
The other end of an exchange: `python -m benchmarks.owner FILE ADDRESSES [CERT KEY]` serves a file until it is ended.

By a daemon's bulk listener, and by the plainest loop there is: 16 bytes say which range is wanted, then it comes.
Both also over TLS where there is a certificate (of its own making, which is the CA too). ADDRESSES: a file to write
the ports to, and the chunk digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from snapshotd.layout import chunk_digests, root_digest
from snapshotd.mapping import map_file
from snapshotd.security import TlsFiles
from snapshotd.transfer import BulkServer

RANGE = struct.Struct("<QQ")
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Whole:
    """What a bulk server needs to know of the file, which is always there: it is its own lease."""

    view: memoryview
    digests: bytes

    @property
    def file_bytes(self) -> int:
        return self.view.nbytes

    @property
    def root(self) -> str:
        return root_digest(self.digests)

    @property
    def obj(self) -> Whole:
        return self

    def close(self) -> None:
        pass


def certificate(cert: str, key: str) -> TlsFiles:
    return TlsFiles(cert=Path(cert), key=Path(key), ca=Path(cert))


def main(file: str, addresses: str, cert: str = "", key: str = "") -> None:
    with open(file, "r+b") as opened:
        view = map_file(opened.fileno(), os.path.getsize(file))
    whole = Whole(view, chunk_digests(view, view.nbytes))

    found: dict[str, object] = {"digests": whole.digests.hex()}
    for name in ("plain", "tls") if cert else ("plain",):
        context = certificate(cert, key).server_context() if name == "tls" else None
        server = BulkServer(("127.0.0.1", 0), lambda key: whole, tls=context)
        found[f"ours-{name}"] = server.address[1]
        found[f"floor-{name}"] = serve_plainly(view, context)
    part = Path(f"{addresses}.part")
    part.write_text(json.dumps(found), encoding="ascii")
    os.rename(part, addresses)
    threading.Event().wait()


def serve_plainly(view: memoryview, context: ssl.SSLContext | None) -> int:
    """Serve ranges of the bytes by the plainest loop, in threads of this process; return the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def serve(sock: socket.socket) -> None:
        if context is not None:
            sock = context.wrap_socket(sock, server_side=True)
        with sock, contextlib.suppress(OSError):
            while asked := sock.recv(RANGE.size):
                begin, end = RANGE.unpack(asked)
                for at in range(begin, end, PIECE_BYTES):
                    sock.sendall(view[at : min(at + PIECE_BYTES, end)])

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
