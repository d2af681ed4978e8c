"""
Serves the bytes of slots and parity files to other daemons and to tools.

Rule 1: a peer is checked (user, certificate) before one byte of its request is read.
Rule 2: nothing a peer does ends the server, or keeps a thread for longer than the timeouts.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Final

from snapshotd.errors import AccessDenied, RemoteProtocolError, SnapshotdError, UsageError
from snapshotd.security import PeerGuard
from snapshotd.transfer import wire
from snapshotd.transfer.answers import Answers
from snapshotd.transfer.objects import Holding, Lookup, Objects, Refusal, Wait
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ObjectKey

__all__ = ["BulkServer"]

_log: Final = logging.getLogger(__name__)
_SMALL_BYTES: Final = 64 * 1024
_LINGER_S: Final = 0.5
_LINGER_BYTES: Final = 256 * 1024
_ACCEPT_PAUSE_S: Final = 0.05
_JOIN_S: Final = 5.0


class BulkServer:
    """
    Listens from construction to close(), one thread per connection. A context manager.

    Args:
        listen: (host, port); port 0 takes a free one, see ``address``. UsageError when it cannot be had.
        lookup: finds an object and leases it; None for what is not here.
        tls: a context that asks for the peer's certificate; None for plain TCP.
        wait: returns when an object is there to be found, or after so many seconds: requests may wait for one.
        suspected: hears, in a thread of a connection, that a reader found an object rotten; it is to be verified.
        guard: who is served. Default: on loopback our own user and root, nobody else without TLS.
        max_connections: beyond that the connection that has been idle longest is closed for a new one, or, if all are
            busy, the new one is refused. Those that hold something are busy, and half of them may.
        timeout_s: a peer that neither takes nor gives a byte for so long is dropped.
        idle_timeout_s: a connection without requests for so long is closed, and lets go of what it held.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        lookup: Lookup,
        *,
        tls: ssl.SSLContext | None = None,
        guard: PeerGuard | None = None,
        wait: Wait = lambda key, timeout_s: None,
        suspected: Callable[[ObjectKey], None] = lambda key: None,
        max_connections: int = 64,
        timeout_s: float = 30.0,
        idle_timeout_s: float = 120.0,
    ) -> None:
        if max_connections < 1 or timeout_s <= 0 or idle_timeout_s <= 0:
            raise UsageError("max_connections and timeouts of a bulk server must be positive")
        self._tls = tls
        self._guard = guard if guard is not None else PeerGuard()
        self._objects = Objects(lookup, wait=wait, holders_max=max(1, max_connections // 2))
        self._answers = Answers(
            self._objects, suspected=suspected, sent=lambda nbytes: self._count("sent_bytes", nbytes)
        )
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[_Connection, None] = {}  # the order is that of their last request
        self._counters = {"connections": 0, "refused": 0, "requests": 0, "errors": 0, "sent_bytes": 0}
        self._listener = _listen(listen)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._accepter = threading.Thread(target=self._accept, name="bulk-accept", daemon=True)
        self._accepter.start()

    @property
    def address_text(self) -> str:
        """``host:port`` as in NodeHello.bulk_address."""
        return wire.format_address(*self.address)

    def counters(self) -> dict[str, int]:
        """Return what happened since the start: connections, refused, requests, errors, sent_bytes."""
        with self._lock:
            return dict(self._counters)

    def close(self) -> None:
        """Stop listening, cut all connections, and wait for the threads. May be called twice."""
        self._closing.set()
        wire.hang_up(self._listener)  # wakes accept()
        self._accepter.join(_JOIN_S)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()
        for connection in connections:
            connection.thread.join(_JOIN_S)

    def __enter__(self) -> BulkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ connections

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._closing.wait(_ACCEPT_PAUSE_S)  # the kernel keeps the peer in the queue meanwhile
                continue
            connection = _Connection(self, sock, Holding(self._objects))
            with self._lock:
                admitted = not self._closing.is_set() and self._make_room()
                if admitted:
                    self._connections[connection] = None
                    self._counters["connections"] += 1
                else:
                    self._counters["refused"] += 1
            if admitted:
                connection.thread.start()
            else:
                sock.close()

    def _make_room(self) -> bool:
        """Under the lock: whether one more connection may be; an idle one is cut for it."""
        if len(self._connections) < self._max_connections:
            return True
        for connection in self._connections:
            if not connection.busy:
                # Its thread ends by itself; until then there is one more than the limit.
                del self._connections[connection]
                connection.cut()
                return True
        return False

    def _serve(self, connection: _Connection) -> None:
        """The life of one connection, in its own thread."""
        sock = connection.sock
        try:
            sock.settimeout(self._timeout_s)
            wire.tune(sock)
            self._guard.check(sock, encrypted=self._tls is not None)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                connection.replace(sock)
                self._shake_hands(sock)
            connection.busy = False
            inbound, outbound = wire.Inbound(sock), wire.Outbound(sock)
            while not self._closing.is_set() and self._serve_one(connection, inbound, outbound):
                pass
        except AccessDenied as error:
            self._count("refused")
            _log.warning("bulk peer refused: %s", error)
            if self._tls is None:
                self._part(sock, error)
        except RemoteProtocolError as error:
            self._count("errors")
            self._part(sock, error)
        except OSError as error:  # timeouts, resets, failed handshakes
            if not self._closing.is_set():
                _log.debug("bulk connection ended: %s", error)
        except wire.ConnectionClosed:
            pass  # the way a connection should end
        except Exception:
            self._count("errors")
            _log.exception("bulk connection failed")
        finally:
            connection.holding.close()
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _serve_one(self, connection: _Connection, inbound: wire.Inbound, outbound: wire.Outbound) -> bool:
        """Read and answer one request; returns whether the connection goes on."""
        if inbound.is_empty and not inbound.wait(self._idle_timeout_s):
            raise TimeoutError("idle")
        request = inbound.frame(BulkRequest, within_s=self._timeout_s)
        with self._lock:
            if connection not in self._connections:
                return False  # cut to make room
            connection.busy = True
            self._connections[connection] = self._connections.pop(connection)
            self._counters["requests"] += 1
        try:
            self._answers.answer(outbound, request, connection.holding)
        except Refusal as error:
            self._count("errors")
            outbound.frame(BulkResponse(ok=False, code=error.code, message=str(error)[:4096]))
        finally:
            connection.busy = bool(connection.holding)
        return True

    def _part(self, sock: socket.socket, error: SnapshotdError) -> None:
        """Say why, and give the peer a moment to hear it: closing with unread bytes would reset the connection."""
        with contextlib.suppress(OSError):
            sock.settimeout(_LINGER_S)
            wire.Outbound(sock).frame(BulkResponse(ok=False, code=error.code, message=str(error)[:4096]))
        self._drain(sock)

    def _shake_hands(self, sock: ssl.SSLSocket) -> None:
        try:
            sock.do_handshake()
        except ssl.SSLError as error:
            self._count("refused")
            _log.warning("bulk peer refused: %s", error)
            self._drain(sock)  # or the alert, which says why, may be lost
            raise

    def _drain(self, sock: socket.socket) -> None:
        """Send nothing more, and take what still comes for a moment."""
        with contextlib.suppress(OSError):
            sock.settimeout(_LINGER_S)
            socket.socket.shutdown(sock, socket.SHUT_WR)
            scratch = bytearray(_SMALL_BYTES)
            left = _LINGER_BYTES
            while left > 0 and not self._closing.is_set():
                count = socket.socket.recv_into(sock, scratch)
                if count == 0:
                    break
                left -= count

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counters[name] += amount


class _Connection:
    """A socket, its thread, what it holds, and whether it must not be cut: a request is being answered, or it holds."""

    def __init__(self, server: BulkServer, sock: socket.socket, holding: Holding) -> None:
        self.sock = sock
        self.holding = holding
        self.busy = True  # until it has proved itself, it is not cut for others
        self._lock = threading.Lock()
        self._cut = False
        self.thread = threading.Thread(target=server._serve, args=(self,), name="bulk-serve", daemon=True)

    def replace(self, sock: socket.socket) -> None:
        """The same connection inside TLS from now on."""
        with self._lock:
            self.sock = sock
            if self._cut:
                wire.hang_up(sock)

    def cut(self) -> None:
        """Wake the thread, which then finds the connection ended. Only the thread itself closes the descriptor."""
        with self._lock:
            self._cut = True
            wire.hang_up(self.sock)

    def close(self) -> None:
        with self._lock:
            self.sock.close()


def _listen(listen: tuple[str, int]) -> socket.socket:
    host, port = listen
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen at {wire.format_address(host, port)}: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wire.tune(sock)
        sock.bind((host, port))
        sock.listen(128)
    except (OSError, OverflowError) as error:
        sock.close()
        raise UsageError(f"cannot listen at {wire.format_address(host, port)}: {error}") from error
    return sock
