"""
Frames over a Unix socket: a 4-byte little-endian length, then one ``snapshotd.v1.Frame``.

Rule 1: a length is checked before it is waited for.
Rule 2: bytes that are no frame are a RemoteProtocolError and end the connection; they never reach the training loop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError

from snapshotd.errors import RemoteProtocolError
from snapshotd.v1 import worker_pb2 as pb

__all__ = ["MAX_FRAME_BYTES", "FrameReader", "pack"]

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
_LENGTH: Final = struct.Struct("<I")


def pack(frame: pb.Frame) -> bytes:
    """Return the bytes of ``frame`` with its length in front; ValueError above the limit."""
    body: bytes = frame.SerializeToString()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is above the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Takes bytes as they come, gives whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[pb.Frame]:
        """Yield the frames that ``data`` completes. RemoteProtocolError for what cannot be a frame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise RemoteProtocolError(f"a frame of {size} bytes is announced; the limit is {MAX_FRAME_BYTES}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                yield pb.Frame.FromString(body)
            except DecodeError as error:
                raise RemoteProtocolError("the daemon sent bytes that are no frame") from error
