"""
Digests of slot and parity bytes: one xxh3_64 per chunk, and one xxh3_128 over those.

Rule 1: chunk i of a file covers bytes ``[i * CHUNK_BYTES, (i + 1) * CHUNK_BYTES)``; the last may be short.
Rule 2: bytes are never copied on the way; slices of memoryviews go into the hash.
Rule 3: nothing here raises for wrong bytes. A mismatch is an erasure: the caller gets the chunk's index.

xxh3 finds rot and torn writes; it is no defence against an attacker.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash
from xxhash import xxh3_64_intdigest as digest_of

from snapshotd import native
from snapshotd.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "KnownDigests",
    "RunningDigests",
    "chunk_count",
    "chunk_digests",
    "is_right",
    "root_digest",
    "verify",
]

CHUNK_BYTES: Final = native.CHUNK_BYTES
"""
128 KiB: small enough that little is hashed for nothing where parts of chunks are read, large enough that Python's
overhead per chunk (0.3 us of 12) vanishes.
"""

DIGEST_BYTES: Final = 8
"""Bytes of one chunk's digest."""

_DIGEST: Final = struct.Struct("<Q")
_BETWEEN_CHUNKS: Final = 64
_COMPILED_CHUNKS: Final = 4
"""That lie one behind the other and are cold: from so many on compiled code is faster. Out of the cache xxhash is."""


class KnownDigests(NamedTuple):
    """The digests of successive chunks of a file, from the ``first`` on."""

    first: int
    digests: bytes


def chunk_count(length: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the number of chunks of ``length`` bytes: 0 for 0."""
    return -(-length // chunk_bytes)


def chunk_digests(
    buf: Buffer,
    length: int,
    chunk_bytes: int = CHUNK_BYTES,
    *,
    cold: bool = False,
    between: Callable[[], object] | None = None,
) -> bytes:
    """
    Return the digests of ``buf[0:length]``: 8 bytes little-endian per chunk, ``chunk_count(length)`` of them.

    ``buf`` may be longer (a slot with spare room). UsageError if it is shorter. ``cold``: the bytes are in no cache, so
    that several chunks are best read at a time. ``between`` is called before each 64 chunks, which take about half a
    millisecond: it may raise, to stop.
    """
    found: list[bytes] = []
    batch_bytes = _BETWEEN_CHUNKS * chunk_bytes
    with memoryview(buf) as whole, whole.cast("B") as view:
        if not 0 <= length <= view.nbytes:
            raise UsageError(f"cannot digest {length} bytes of a buffer of {view.nbytes}")
        with view[:length] as all_of_it:
            for begin in range(0, length, batch_bytes):
                if between is not None:
                    between()
                found.append(_digests_between(all_of_it, begin, min(begin + batch_bytes, length), chunk_bytes, cold))
    return b"".join(found)


class RunningDigests:
    """The digests of bytes that come in pieces: those that chunk_digests() gives for all of them in one."""

    def __init__(self) -> None:
        self._found: list[bytes] = []
        self._hash = xxhash.xxh3_64()
        self._room = CHUNK_BYTES  # left in the chunk that has begun

    def add(self, piece: memoryview) -> None:
        """Take the next bytes, a contiguous view of them."""
        at = 0
        while at < piece.nbytes:
            if self._room == CHUNK_BYTES and (whole := (piece.nbytes - at) // CHUNK_BYTES * CHUNK_BYTES):
                self._found.append(_digests_between(piece, at, at + whole, CHUNK_BYTES, False))
                at += whole
                continue
            end = min(at + self._room, piece.nbytes)
            with piece[at:end] as part:
                self._hash.update(part)
            self._room -= end - at
            if not self._room:
                self._finish_chunk()
            at = end

    def finish(self) -> bytes:
        """Return the digests of all that came; nothing may come behind it."""
        if self._room < CHUNK_BYTES:
            self._finish_chunk()
        return b"".join(self._found)

    def _finish_chunk(self) -> None:
        self._found.append(_DIGEST.pack(self._hash.intdigest()))
        self._hash.reset()
        self._room = CHUNK_BYTES


def root_digest(digests: bytes) -> str:
    """Return the one digest that stands for all of ``digests``: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(digests)


def is_right(view: memoryview, digests: bytes, chunk: int) -> bool:
    """Whether one chunk of ``view``, all bytes of a file, matches its digest: verify() for who looks at single ones."""
    with view[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES] as part:
        return bool(digest_of(part) == _DIGEST.unpack_from(digests, chunk * DIGEST_BYTES)[0])


def verify(
    buf: Buffer,
    digests: bytes,
    begin: int,
    end: int,
    *,
    base: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    cold: bool = False,
) -> list[int]:
    """
    Return the indexes of the chunks of file bytes ``[begin, end)`` that do not match: empty when all is well.

    ``buf`` holds the file from file offset ``base`` on (0: the whole file). ``digests`` are those of the whole file.
    ``begin`` must be a multiple of ``chunk_bytes``; ``end`` too, unless it lies in the last chunk: then it is taken for
    the end of the file. ``cold``: as for chunk_digests(). UsageError for ranges that are not so, or that ``buf`` or
    ``digests`` do not reach.
    """
    if len(digests) % DIGEST_BYTES:
        raise UsageError(f"{len(digests)} bytes of digests are no multiple of {DIGEST_BYTES}")
    num_chunks = len(digests) // DIGEST_BYTES
    if begin % chunk_bytes or not 0 <= begin <= end:
        raise UsageError(f"the range [{begin}, {end}) does not begin at a multiple of {chunk_bytes}")
    if chunk_count(end, chunk_bytes) > num_chunks:
        raise UsageError(f"the range [{begin}, {end}) reaches beyond the {num_chunks} chunks that have digests")
    if end % chunk_bytes and chunk_count(end, chunk_bytes) != num_chunks:
        raise UsageError(f"the range [{begin}, {end}) ends inside a chunk that is not the last of {num_chunks}")
    with memoryview(buf) as whole, whole.cast("B") as view:
        if begin < base or end - base > view.nbytes:
            raise UsageError(f"the range [{begin}, {end}) is not inside the buffer [{base}, {base + view.nbytes})")
        first, stop = begin // chunk_bytes, chunk_count(end, chunk_bytes)
        found = _digests_between(view, begin - base, end - base, chunk_bytes, cold)
        expected = digests[first * DIGEST_BYTES : stop * DIGEST_BYTES]
        if found == expected:
            return []
        pairs = zip(_DIGEST.iter_unpack(found), _DIGEST.iter_unpack(expected), strict=True)
        return [first + place for place, (one, other) in enumerate(pairs) if one != other]


def _digests_between(view: memoryview, begin: int, end: int, chunk_bytes: int, cold: bool) -> bytes:
    """``begin`` is where a chunk begins, ``end`` where one ends, or the file."""
    compiled = native.kernels() if cold and chunk_bytes == CHUNK_BYTES else None
    whole = begin + (end - begin) // chunk_bytes * chunk_bytes
    digests = b""
    if compiled is not None and whole - begin >= _COMPILED_CHUNKS * chunk_bytes:
        with view[begin:whole] as part:
            digests = compiled.digest(part)
        begin = whole
    values = [digest_of(view[at : min(at + chunk_bytes, end)]) for at in range(begin, end, chunk_bytes)]
    return digests + struct.pack(f"<{len(values)}Q", *values)
