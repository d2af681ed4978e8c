"""
Connections to peers, kept for the next request.

Rule 1: at most ``limit`` connections per peer, and who came first gets the next one. Whoever waits for one fails as
        soon as the peer fails for somebody else, so that a dead peer costs one timeout, and not one for each in line.
Rule 2: a kept connection may have died since. If nothing of the answer has come yet, the request is sent once more
        over a new one; reads have no effects, so that is safe.
Rule 3: only a connection whose answer was read to its last byte goes back.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Final

from snapshotd.errors import AccessDenied, PeerUnreachable, RemoteProtocolError, SnapshotdError, UsageError
from snapshotd.transfer import wire
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse

__all__ = ["Borrowed", "Connection", "Pool"]

_KEEP_S: Final = 60.0  # half of what the server keeps an idle connection for
_FRESH_S: Final = 5.0
"""A connection that was used just now is tried as it is: to ask it takes longer than rule 2 does in the rare case."""

_POLL_S: Final = 0.05
_STALE: Final = (wire.ConnectionClosed, ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""What becomes of a connection that the peer has closed since."""


class Connection:
    """One open connection; belongs to one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbound, self.outbound = wire.Inbound(sock), wire.Outbound(sock)
        self.used_at = time.monotonic()

    def usable(self) -> bool:
        """Whether it is worth a try: young enough, and silent as an idle connection has to be."""
        idle_s = time.monotonic() - self.used_at
        if idle_s > _KEEP_S or not self.inbound.is_empty:
            return False
        try:
            return idle_s < _FRESH_S or not self.inbound.wait(0)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class _Peer:
    """The connections of one address. Fields change under the pool's lock."""

    def __init__(self) -> None:
        self.idle: list[Connection] = []
        self.num_in_use = 0
        self.waiting: list[object] = []  # in order of their coming
        self.num_failures = 0
        self.last_failure = ""


class Borrowed:
    """A connection for one request; made by Pool.borrow(). A context manager, whose end is that of the loan."""

    def __init__(self, pool: Pool, address: str, connection: Connection | None) -> None:
        self._pool = pool
        self.address = address
        self._connection = connection
        self._is_new = False
        self._request = BulkRequest()
        self._send_error: ConnectionError | ssl.SSLError | None = None
        self._kept = False

    def send(self, request: BulkRequest) -> None:
        """Send the request; ``head`` returns the beginning of the answer."""
        self._request = request
        try:
            if self._connection is None:
                self._connection = self._pool.connect(self.address)
                self._is_new = True
            try:
                self._connection.outbound.frame(request)
            except (ConnectionError, ssl.SSLError) as error:
                self._send_error = error
        except OSError as error:
            raise self._told(error) from error

    def head(self) -> BulkResponse:
        """Return the head of the answer; where the kept connection turns out to be stale, ask over a new one."""
        assert self._connection is not None, "nothing was asked yet"
        try:
            response = self._head(self._connection)
            self._connection.inbound.expect(response.payload_bytes)
            return response
        except (wire.ConnectionClosed, OSError) as error:
            if self._is_new or not isinstance(error, _STALE):
                raise self._told(error) from error
        self._connection.close()
        self._connection = None
        self._pool.forget_idle(self.address)  # they are as old as this one
        self._send_error = None
        self.send(self._request)
        return self.head()

    def receive(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes of the answer's payload."""
        assert self._connection is not None, "the head comes first"
        try:
            self._connection.inbound.receive(out)
        except OSError as error:
            raise self._told(error) from error

    def tail(self) -> BulkResponse:
        """Return the response behind blocks."""
        assert self._connection is not None, "nothing was asked yet"
        try:
            return self._connection.inbound.frame(BulkResponse, within_s=self._pool.timeout_s)
        except (wire.ConnectionClosed, OSError) as error:
            raise self._told(error) from error

    def _head(self, connection: Connection) -> BulkResponse:
        inbound, error = connection.inbound, self._send_error
        if error is None:
            return inbound.frame(BulkResponse, within_s=self._pool.timeout_s)
        # A peer that refuses us says why and hangs up, perhaps before it has read the request.
        try:
            return inbound.frame(BulkResponse, within_s=self._pool.timeout_s)
        except ssl.SSLError as alert:
            raise alert from error
        except (OSError, wire.ConnectionClosed, RemoteProtocolError):
            raise error from None

    def keep(self) -> None:
        """The answer was read to its end: the connection may serve again."""
        self._kept = True

    def _told(self, error: OSError | wire.ConnectionClosed) -> SnapshotdError:
        """Return as one of our errors what a socket raised."""
        if isinstance(error, wire.ConnectionClosed):
            return self._pool.failed(self.address, f"{self.address} closed the connection")
        if isinstance(error, TimeoutError):
            return self._pool.failed(self.address, f"{self.address} was silent for {self._pool.timeout_s:g} s")
        if isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            if "ALERT" in (error.reason or ""):
                return AccessDenied(f"{self.address} does not accept our certificate: {error}")
            return RemoteProtocolError(f"TLS with {self.address} failed: {error}")
        return self._pool.failed(self.address, f"lost {self.address}: {error}")

    def hang_up(self) -> None:
        """End the connection from another thread, which wakes the one that waits on it."""
        if self._connection is not None:
            wire.hang_up(self._connection.sock)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def end(self) -> None:
        """End the loan; the connection is kept for the next one if ``keep`` says so."""
        if not self._kept:
            self.close()
        self._pool.take_back(self.address, self._connection)

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Pool:
    """Connections by address; safe to use from many threads. See BulkClient for the arguments."""

    def __init__(self, *, tls: ssl.SSLContext | None, timeout_s: float, limit: int) -> None:
        self.timeout_s = timeout_s
        self._tls = tls
        self._limit = limit
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # of what those wait for who are in line
        self._closed = False

    def borrow(self, address: str, cancel: threading.Event | None) -> Borrowed:
        """Return the right to one request to that peer, waiting for it if need be."""
        connection, stale = self._take(address, cancel)
        for old in stale:
            old.close()
        return Borrowed(self, address, connection)

    def apart(self, address: str) -> Borrowed:
        """Return a connection that is not of the limited ones, for any number of requests; the caller closes it."""
        return Borrowed(self, address, None)

    def connect(self, address: str) -> Connection:
        """Return a new connection, with TLS if so set. PeerUnreachable, AccessDenied, UsageError."""
        host, port = wire.parse_address(address)
        try:
            sock = _connect(host, port, self.timeout_s)
        except OSError as error:
            raise self.failed(address, f"cannot connect to {address}: {error}") from error
        if self._tls is None:
            return Connection(sock)
        try:
            secured = self._tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            sock.close()
            raise UsageError(f"cannot begin TLS with {address}: {error}") from error
        try:
            secured.do_handshake()
        except BaseException as error:
            secured.close()
            if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                raise self.failed(address, f"{address} ended the TLS handshake: {error}") from error
            if isinstance(error, ssl.SSLError):
                raise AccessDenied(f"{address} is not a peer of ours: {error}") from error
            if isinstance(error, OSError):
                raise self.failed(address, f"{address} did not finish the TLS handshake: {error}") from error
            raise
        return Connection(secured)

    def failed(self, address: str, message: str) -> PeerUnreachable:
        """Note that the peer cannot be reached, for those who wait; return the exception to raise."""
        with self._lock:
            peer = self._peers.get(address)
            if peer is not None:
                peer.num_failures += 1
                peer.last_failure = message
                self._changed.notify_all()
        return PeerUnreachable(message)

    def forget_idle(self, address: str) -> None:
        """Close the idle connections to that peer."""
        with self._lock:
            peer = self._peers.get(address)
            idle = [] if peer is None else peer.idle[:]
            if peer is not None:
                peer.idle.clear()
        for connection in idle:
            connection.close()

    def take_back(self, address: str, connection: Connection | None) -> None:
        """End a loan; None when there is no connection to keep."""
        with self._lock:
            peer = self._peers[address]
            peer.num_in_use -= 1
            if connection is not None and not self._closed:
                connection.used_at = time.monotonic()
                peer.idle.append(connection)
                connection = None
            if not peer.num_in_use and not peer.waiting and not peer.idle:
                del self._peers[address]  # nothing is known about it; addresses come and go
            if peer.waiting:
                self._changed.notify_all()
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close all idle connections, and those in use when they come back."""
        with self._lock:
            self._closed = True
            idle = [connection for peer in self._peers.values() for connection in peer.idle]
            for peer in self._peers.values():
                peer.idle.clear()
            self._changed.notify_all()
        for connection in idle:
            connection.close()

    def _take(self, address: str, cancel: threading.Event | None) -> tuple[Connection | None, list[Connection]]:
        """Wait for a place; return an idle connection (None: make one) and those that are to be closed."""
        stale: list[Connection] = []
        with self._lock:
            peer = self._peers.get(address) or self._peers.setdefault(address, _Peer())
            if self._closed or peer.waiting or peer.num_in_use >= self._limit:
                self._await_turn(peer, cancel)
            peer.num_in_use += 1
            while peer.idle:
                connection = peer.idle.pop()  # the newest: the least likely to be stale
                if connection.usable():
                    return connection, stale
                stale.append(connection)
            return None, stale

    def _await_turn(self, peer: _Peer, cancel: threading.Event | None) -> None:
        """Under the lock: return when there is a place, and nobody waits for it who came before."""
        turn, failures = object(), peer.num_failures
        peer.waiting.append(turn)
        try:
            while True:
                if self._closed:
                    raise UsageError("the bulk client is closed")
                if peer.num_failures > failures:
                    raise PeerUnreachable(peer.last_failure)
                if peer.num_in_use < self._limit and peer.waiting[0] is turn:
                    return
                if cancel is not None and cancel.is_set():
                    raise wire.TransferCancelled("the transfer was cancelled")
                # An event cannot be waited for together with a condition; so, look at it now and then.
                self._changed.wait(None if cancel is None else _POLL_S)
        finally:
            peer.waiting.remove(turn)
            if peer.waiting:
                self._changed.notify_all()


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """Try the addresses of the host in turn, within ``timeout_s`` in all."""
    deadline = time.monotonic() + timeout_s
    problem: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            wire.tune(sock)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(address)
            sock.settimeout(timeout_s)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem
