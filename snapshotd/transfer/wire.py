"""
The bytes on a bulk connection, for both ends: frames, bulk in and out, addresses, and what errors become.

Rule 1: bulk goes from one mapping into the other. No bytes object ever holds more than a frame.
Rule 2: every length is checked before memory is taken; a frame's memory grows with what has really arrived.
Rule 3: every wait ends: the socket has a timeout, and each wait of that length must bring at least one byte.
"""

from __future__ import annotations

import contextlib
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
    "BulkReceiver",
    "ConnectionClosed",
    "CorruptChunk",
    "ObjectMissing",
    "PeerBusy",
    "TransferCancelled",
    "format_address",
    "hang_up",
    "is_readable",
    "is_tls",
    "parse_address",
    "receive_exactly",
    "receive_frame",
    "send_frame",
    "tune",
]

PROTOCOL: Final = 1
FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
RANGES_MAX: Final = 65_536
DIGESTS_BYTES_MAX: Final = 64 * 1024 * 1024  # of a file of 2 TiB
PIECE_BYTES: Final = 1024 * 1024
"""Bulk is sent and received in pieces of this size: large enough for the system calls, small enough for the cache."""

_WAKE_BYTES: Final = 512 * 1024
"""Eight packets on loopback. Who waits for as much as the window holds makes the sender wait for him: both in turns."""

_SHORT_BYTES: Final = 4 * 64 * 1024
"""Four packets on loopback: to ask to be woken up once for all of them costs more than it saves."""

_LENGTH: Final = struct.Struct("<I")
_GROWTH_BYTES: Final = 64 * 1024
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


def send_frame(sock: socket.socket, message: BulkRequest | BulkResponse) -> None:
    """Send one framed message. UsageError when it is too long; OSError as the socket has it."""
    data: bytes = message.SerializeToString()
    if len(data) > FRAME_BYTES_MAX:
        raise UsageError(f"a frame of {len(data)} bytes is longer than {FRAME_BYTES_MAX}")
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_frame(sock: socket.socket, kind: type[_MessageT], *, within_s: float) -> _MessageT:
    """
    Return the next framed message.

    ConnectionClosed when the other end closed instead of beginning one; RemoteProtocolError for what is no frame,
    or has not arrived ``within_s`` seconds after its length; OSError as the socket has it.
    """
    head = bytearray(_LENGTH.size)
    receive_exactly(sock, memoryview(head))
    (length,) = _LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise RemoteProtocolError(f"a frame of {length} bytes is longer than {FRAME_BYTES_MAX}")
    deadline = time.monotonic() + within_s
    data = bytearray()
    while len(data) < length:
        begin = len(data)
        data += bytes(min(_GROWTH_BYTES, length - begin))
        with memoryview(data) as view, view[begin:] as rest:
            try:
                receive_exactly(sock, rest)
            except ConnectionClosed:
                raise ConnectionResetError("the connection ended inside a frame") from None
        if time.monotonic() > deadline:
            raise RemoteProtocolError(f"a frame of {length} bytes did not arrive in {within_s:g} s")
    try:
        message: _MessageT = kind.FromString(bytes(data))
    except DecodeError as error:
        raise RemoteProtocolError(f"a frame cannot be parsed: {error}") from error
    return message


def receive_exactly(sock: socket.socket, out: memoryview) -> None:
    """Fill ``out``. ConnectionClosed when the other end closes first; OSError as the socket has it."""
    at, end = 0, out.nbytes
    while at < end:
        with out[at:end] as rest:
            count = sock.recv_into(rest)
        if count == 0:
            if at:
                raise ConnectionResetError(f"the connection ended after {at} of {end} bytes")
            raise ConnectionClosed
        at += count


class BulkReceiver:
    """
    Takes ``nbytes`` of bulk off a socket, bit by bit. It is woken up for a piece of them and not for each packet: that
    costs more than the copying.

    Nothing else may be read from the socket before all of them were.
    """

    def __init__(self, sock: socket.socket, nbytes: int) -> None:
        self._sock = sock
        self._left = nbytes
        self._wakes_at = 1
        self._is_short = nbytes < _SHORT_BYTES or is_tls(sock)

    def receive(self, out: memoryview) -> None:
        """Fill ``out``. ConnectionResetError when the other end closes first; OSError as the socket has it."""
        if self._is_short:
            receive_exactly(self._sock, out)
            self._left -= out.nbytes
            return
        at, end = 0, out.nbytes
        while at < end:
            self._wake_at(min(_WAKE_BYTES, self._left))
            with out[at:end] as rest:
                try:
                    count = self._sock.recv_into(rest)
                except TimeoutError:
                    self._wake_at(1)  # not silent, but slow?
                    if not is_readable(self._sock):
                        raise
                    count = self._sock.recv_into(rest)
            if count == 0:
                raise ConnectionResetError(f"the connection ended after {at} of {end} bytes")
            at += count
            self._left -= count
        if not self._left:
            self._wake_at(1)

    def _wake_at(self, nbytes: int) -> None:
        """Count the socket as readable from so many bytes on. One that is broken is found out elsewhere."""
        if nbytes != self._wakes_at:
            self._wakes_at = nbytes
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


def is_readable(sock: socket.socket) -> bool:
    """Return whether there is something to read now, or the connection has ended."""
    poll = select.poll()  # select() fails for descriptors above 1023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


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
