"""
The Unix socket between workers and their node's daemon: where it is, and its framing.

A frame is a 4-byte little-endian length and one worker_pb2.Frame, at most MAX_FRAME_BYTES.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from snapshotd.errors import RemoteProtocolError
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["MAX_FRAME_BYTES", "PROTOCOL", "Frames", "ask_who", "default_socket_path", "encode_frame"]

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


class Frames:
    """Makes frames of bytes that arrive in whatever portions."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def is_inside(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._data)

    def feed(self, data: bytes) -> Iterator[worker.Frame]:
        """
        Yield the frames that are whole now.

        Raises RemoteProtocolError for a length over the limit, or bytes that are no frame: nothing can follow those.
        """
        self._data += data
        begin = 0
        try:
            while len(self._data) >= begin + _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._data, begin)
                if length > MAX_FRAME_BYTES:
                    raise RemoteProtocolError(
                        f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}"
                    )
                end = begin + _LENGTH.size + length
                if len(self._data) < end:
                    return
                with memoryview(self._data) as view, view[begin + _LENGTH.size : end] as body:
                    frame = worker.Frame.FromString(bytes(body))
                begin = end
                yield frame
        except DecodeError as error:
            raise RemoteProtocolError(f"not a frame: {error}") from error
        finally:
            del self._data[:begin]


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
