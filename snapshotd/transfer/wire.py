"""
The bytes on a bulk connection, for both ends: frames, bulk in and out, addresses, and what errors become.

Rule 1: bulk goes from one mapping into the other. No bytes object ever holds more than a frame.
Rule 2: every length is checked before memory is taken; a frame's memory grows with what has really arrived.
Rule 3: every wait ends: the socket has a timeout, and each wait of that length must bring at least one byte.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from snapshotd.errors import CorruptionError, PeerError, RemoteProtocolError, SnapshotdError, UsageError
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse

__all__ = [
    "DIGESTS_BYTES_MAX",
    "FRAME_BYTES_MAX",
    "PIECE_BYTES",
    "PROTOCOL",
    "RANGES_MAX",
    "ConnectionClosed",
    "CorruptChunk",
    "Inbound",
    "ObjectMissing",
    "Outbound",
    "PeerBusy",
    "TransferCancelled",
    "format_address",
    "hang_up",
    "is_tls",
    "parse_address",
    "tune",
]

PROTOCOL: Final = 2
FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
RANGES_MAX: Final = 65_536
DIGESTS_BYTES_MAX: Final = 64 * 1024 * 1024  # of a file of 1 TiB
PIECE_BYTES: Final = 1024 * 1024
"""Bulk is sent and received in pieces of this size: large enough for the system calls, small enough for the cache."""

_WAKE_BYTES: Final = 1024 * 1024
"""16 packets on loopback. Who waits for as much as the window holds makes the sender wait for him: both in turns."""

_SHORT_BYTES: Final = 4 * 64 * 1024
"""Four packets on loopback: to ask to be woken up once for all of them costs more than it saves."""

_LENGTH: Final = struct.Struct("<I")
_GROWTH_BYTES: Final = 64 * 1024
_AHEAD_BYTES: Final = 4 * 1024
"""Most heads and requests, and little of the bulk behind them, which is received in its place otherwise."""

_BUFFER_BYTES: Final = 4 * 1024 * 1024


class ObjectMissing(PeerError):
    """The peer does not have the object, or has not sealed it: an erasure, not a failure of the peer."""

    code = "NOT_FOUND"
    exit_code = 1


class PeerBusy(PeerError):
    """The peer holds things for as many others as it may."""

    code = "BUSY"
    hint = "try again when they have ended"


class CorruptChunk(CorruptionError):
    """Bytes from a peer do not match their digest. ``chunk`` is the index in the file, ``peer`` the address."""

    def __init__(self, message: str, *, chunk: int, peer: str) -> None:
        super().__init__(message)
        self.chunk = chunk
        self.peer = peer


class TransferCancelled(SnapshotdError):
    """The caller's own event stopped a transfer."""

    code = "CANCELLED"


class ConnectionClosed(Exception):
    """The other end closed the connection where it may (between frames) or may not. Never leaves this package."""


_MessageT = TypeVar("_MessageT", BulkRequest, BulkResponse)


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of ``host:port`` or ``[v6]:port``. UsageError for anything else."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise UsageError(f"{text!r} is no address; write it as HOST:PORT")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Return what parse_address() understands."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tune(sock: socket.socket) -> None:
    """
    Let small frames leave at once and windows be large.

    Asking for a buffer size turns the kernel's own tuning off, so it is asked for only where that would stop lower.
    Before connect() or listen(), or the window scale is too small for it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, name in ((socket.SO_RCVBUF, "rmem"), (socket.SO_SNDBUF, "wmem")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            tuned = int(Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text().split()[2])
            most = int(Path(f"/proc/sys/net/core/{name}_max").read_text())
            if tuned < _BUFFER_BYTES and tuned < most:
                sock.setsockopt(socket.SOL_SOCKET, option, min(most, _BUFFER_BYTES))


class Outbound:
    """
    What goes out on a connection. For one thread at a time.

    What more follows at once waits for it, so that a frame and the bulk behind it leave by one system call.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: list[bytes | memoryview] = []

    def frame(self, message: BulkRequest | BulkResponse, *, more: bool = False) -> None:
        """Send one framed message. UsageError when it is too long; OSError as the socket has it."""
        data: bytes = message.SerializeToString()
        if len(data) > FRAME_BYTES_MAX:
            raise UsageError(f"a frame of {len(data)} bytes is longer than {FRAME_BYTES_MAX}")
        self.send(_LENGTH.pack(len(data)) + data, more=more)

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send bytes; with ``more`` they must stay as they are until what follows was sent."""
        if more:
            self._waiting.append(data)
            return
        parts, self._waiting = [*self._waiting, data], []
        if is_tls(self._sock):
            for part in parts:
                self._sock.sendall(part)
            return
        try:
            sent = os.writev(self._sock.fileno(), parts)  # mostly there is room: Python's socket would ask first
        except BlockingIOError:
            sent = 0
        for part in parts:
            if sent < len(part):  # sending nothing would be two system calls, too
                with memoryview(part) as view, view[sent:] as rest:
                    self._sock.sendall(rest)
            sent = max(0, sent - len(part))


class Inbound:
    """
    What comes in on a connection: frames, and bulk behind their heads. For one thread at a time, and nobody else may
    read from the socket.

    With a frame comes, by one system call, what has arrived behind it. Bulk goes straight into its place otherwise, and
    whoever waits for it has taken all that is there and is woken up for a piece of it, and not for each packet or
    buffer: that costs both ends more than the copying.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._begin = self._end = 0  # of what has arrived in it
        self._left = 0  # of bulk, behind that
        self._wakes_at = 1
        self._is_there = False  # very likely, something to read
        self._is_short = True
        self._is_tls = is_tls(sock)
        self._timeout_s = 0.0
        self._poll = select.poll()  # select() fails for descriptors above 1023
        self._poll.register(sock, select.POLLIN)

    def wait(self, within_s: float) -> bool:
        """Return whether there is something to read on the socket, or the connection has ended, within that time."""
        self._is_there = bool(self._poll.poll(within_s * 1000))
        return self._is_there

    @property
    def is_empty(self) -> bool:
        """Whether nothing has arrived that was not asked for."""
        return self._begin == self._end

    def frame(self, kind: type[_MessageT], *, within_s: float) -> _MessageT:
        """
        Return the next framed message.

        ConnectionClosed when the other end closed instead of beginning one; RemoteProtocolError for what is no frame,
        or has not arrived ``within_s`` seconds after its length; OSError as the socket has it.
        """
        self._have(_LENGTH.size)
        (length,) = _LENGTH.unpack_from(self._ahead, self._begin)
        if length > FRAME_BYTES_MAX:
            raise RemoteProtocolError(f"a frame of {length} bytes is longer than {FRAME_BYTES_MAX}")
        if self._begin + _LENGTH.size + length <= self._end:
            data = self._take(_LENGTH.size + length)[_LENGTH.size :]
        else:
            self._take(_LENGTH.size)
            data = self._long(length, within_s)
        try:
            message: _MessageT = kind.FromString(data)
        except DecodeError as error:
            raise RemoteProtocolError(f"a frame cannot be parsed: {error}") from error
        return message

    def expect(self, nbytes: int) -> None:
        """So many bytes of bulk come next."""
        self._left = nbytes
        self._is_short = nbytes < _SHORT_BYTES or self._is_tls
        if not self._is_short:
            self._timeout_s = self._sock.gettimeout() or 0.0
            self._sock.settimeout(0)  # or Python asks before each read whether there is anything

    def receive(self, out: memoryview) -> None:
        """Fill ``out`` with bulk. ConnectionResetError when the other end closes; OSError as the socket has it."""
        at, end = min(out.nbytes, self._end - self._begin), out.nbytes
        if at:
            out[:at] = self._ahead[self._begin : self._begin + at]
            self._begin += at
        if self._is_tls:
            self._decrypt(out, at)
            at = end
        while at < end:
            try:
                with out[at:end] as rest:
                    count = self._read(rest) if self._is_short else self._sock.recv_into(rest)
            except BlockingIOError:
                self._wait(self._left - at)
                continue
            if count == 0:
                raise ConnectionResetError(f"the connection ended after {at} of {end} bytes")
            at += count
        self._left -= end
        if not self._left and not self._is_short:
            self._wake_at(1)
            self._sock.settimeout(self._timeout_s)

    def _decrypt(self, out: memoryview, at: int) -> None:
        """Fill the rest of ``out``: records of 16 KiB, so many that each line of this is felt."""
        read, end = self._sock.recv_into, out.nbytes
        while at < end:
            count = read(out[at:], end - at)
            if count == 0:
                raise ConnectionResetError(f"the connection ended after {at} of {end} bytes")
            at += count

    def _read(self, room: memoryview) -> int:
        """Read what is there; what is not is waited for. As ``recv_into``, but that asks first, for its timeout."""
        if self._is_tls:
            return self._sock.recv_into(room)
        try:
            return os.readv(self._sock.fileno(), [room])
        except BlockingIOError:
            return self._sock.recv_into(room)

    def _wait(self, left: int) -> None:
        """Sleep until a piece of bulk is there, or less of it after the timeout; TimeoutError when there is nothing."""
        self._wake_at(min(_WAKE_BYTES, left))
        if not self.wait(self._timeout_s):
            self._wake_at(1)  # not silent, but slow?
            if not self.wait(0):
                raise TimeoutError

    def _have(self, nbytes: int) -> None:
        """Wait until the first ``nbytes`` of a frame have arrived."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin + nbytes > len(self._ahead):
            self._ahead[: self._end - self._begin] = self._ahead[self._begin : self._end]
            self._begin, self._end = 0, self._end - self._begin
        while self._end - self._begin < nbytes:
            with self._ahead[self._end :] as room:
                count = self._read(room) if self._is_there else self._sock.recv_into(room)
                self._is_there = False
            if count == 0:
                if self._begin == self._end:
                    raise ConnectionClosed
                raise ConnectionResetError("the connection ended inside a frame")
            self._end += count

    def _take(self, nbytes: int) -> bytes:
        data = bytes(self._ahead[self._begin : self._begin + nbytes])
        self._begin += len(data)
        return data

    def _long(self, length: int, within_s: float) -> bytes:
        """The rest of a frame of which not all has arrived. Its memory grows with what does."""
        deadline = time.monotonic() + within_s
        data = bytearray(self._take(min(length, self._end - self._begin)))
        while len(data) < length:
            begin = len(data)
            data += bytes(min(_GROWTH_BYTES, length - begin))
            with memoryview(data) as view, view[begin:] as room:
                count = self._sock.recv_into(room)
            if count == 0:
                raise ConnectionResetError("the connection ended inside a frame")
            del data[begin + count :]
            if time.monotonic() > deadline:
                raise RemoteProtocolError(f"a frame of {length} bytes did not arrive in {within_s:g} s")
        return bytes(data)

    def _wake_at(self, nbytes: int) -> None:
        """Count the socket as readable from so many bytes on. One that is broken is found out elsewhere."""
        if nbytes != self._wakes_at:
            self._wakes_at = nbytes
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


def hang_up(sock: socket.socket) -> None:
    """
    End both directions at once, which wakes the thread that waits on the socket; close() alone would not.

    Past the TLS layer on purpose: that would take its state away from the thread that is using it.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def is_tls(sock: socket.socket) -> bool:
    """Return whether the bytes of the socket are encrypted."""
    return isinstance(sock, ssl.SSLSocket)
