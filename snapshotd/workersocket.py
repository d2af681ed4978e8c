"""
The Unix socket between workers and their node's daemon: where it is, and its framing.

A frame is a 4-byte little-endian length and one worker_pb2.Frame, at most MAX_FRAME_BYTES.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path

from google.protobuf.message import DecodeError

from snapshotd.errors import RemoteProtocolError
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["MAX_FRAME_BYTES", "PROTOCOL", "ask_who", "default_socket_path", "encode_frame", "read_frame"]

PROTOCOL = 1
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")


def default_socket_path() -> Path:
    """SNAPSHOTD_SOCKET, else a path of this user: $XDG_RUNTIME_DIR/snapshotd or /tmp/snapshotd-UID."""
    configured = os.environ.get("SNAPSHOTD_SOCKET")
    if configured:
        return Path(configured)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "snapshotd" / "daemon.sock"
    return Path(f"/tmp/snapshotd-{os.getuid()}") / "daemon.sock"


def encode_frame(frame: worker.Frame) -> bytes:
    data = frame.SerializeToString()
    if len(data) > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a frame of {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> worker.Frame | None:
    """
    The next frame, or None at the end of the stream.

    Raises RemoteProtocolError for a length over the limit, a frame cut short, or bytes that are no frame.
    """
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise RemoteProtocolError("the stream ended inside a frame's length") from error
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}")
    try:
        return worker.Frame.FromString(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise RemoteProtocolError("the stream ended inside a frame") from error
    except DecodeError as error:
        raise RemoteProtocolError(f"not a frame: {error}") from error


def ask_who(path: Path | None = None, timeout_s: float = 2.0) -> worker.IAm | None:
    """The name and the coordinator of the daemon at `path`, or None when none answers in time."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout_s)
            link.connect(str(path or default_socket_path()))
            link.sendall(encode_frame(worker.Frame(request_id=1, who_are_you=worker.WhoAreYou())))
            (length,) = _LENGTH.unpack(_read_exactly(link, _LENGTH.size))
            if length > MAX_FRAME_BYTES:
                return None
            frame = worker.Frame.FromString(_read_exactly(link, length))
            return frame.i_am if frame.i_am.node_id else None
    except (OSError, EOFError, DecodeError):
        return None


def _read_exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data
