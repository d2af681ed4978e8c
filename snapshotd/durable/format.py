"""
The durable directory format: names of files, and the JSON in them, to checked values and back.

::

    ROOT/<job>/step-<step>.e<epoch>/rank-<rank>.safetensors   a plain copy of the rank's slot
                                    rank-<rank>.json          what it is, and the digest of each of its chunks
                                    snapshot.json             the marker, written last: the snapshot is whole

Rule 1: a directory without a valid marker is not a snapshot. Whoever reads, begins with the marker.
Rule 2: everything hangs together by digests: the marker has one of itself and the root digest of each rank's file;
that is the digest of the chunk digests in the rank's JSON; and those are the digests of the bytes.
Rule 3: every number and every name that is read is checked before it is used. File names are not taken from JSON:
they follow from the rank, and the JSON must say the same.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import xxhash

from snapshotd.errors import FormatError, UsageError
from snapshotd.layout import CHUNK_BYTES, DIGEST_BYTES, chunk_count, root_digest
from snapshotd.layout.header import decode_json
from snapshotd.layout.layout import MAX_FILE_BYTES
from snapshotd.v1 import control_pb2 as control

__all__ = [
    "MARKER_NAME",
    "MAX_WORLD_SIZE",
    "Marker",
    "MarkerRank",
    "RankRecord",
    "job_directory_name",
    "rank_file_name",
    "rank_record_name",
    "read_json_file",
    "snapshot_directory_name",
    "snapshot_of_directory_name",
]

MARKER_NAME: Final = "snapshot.json"

MARKER_FORMAT: Final = "snapshotd-snapshot"
RANK_FORMAT: Final = "snapshotd-rank"
VERSION: Final = 1

MAX_WORLD_SIZE: Final = 1 << 20
"""Ranks of one snapshot: ten times the largest training run that anybody has told of."""

MAX_JSON_BYTES: Final = 256 * 1024 * 1024
"""A marker has some 200 bytes per rank, a rank's JSON 128 bytes per MiB of its slot: this is for 2 TiB of slot."""

_MAX_CHUNK_BYTES: Final = 16 * 1024 * 1024
"""What is read anew for a byte of it."""

_MAX_NUMBER: Final = (1 << 63) - 1
_MAX_QUOTED: Final = 200
_DIGEST: Final = re.compile(r"[0-9a-f]{32}\Z")
_SNAPSHOT_DIRECTORY: Final = re.compile(r"step-(?P<step>[0-9]{12,19})\.e(?P<epoch>[0-9]{6,19})\Z")


def job_directory_name(job: str) -> str:
    """
    Return the directory name for a job: its own name where that is safe, quoted otherwise, never the same for two.

    UsageError for a name that is empty or not valid Unicode.
    """
    if not job:
        raise UsageError("a job needs a name")
    try:
        quoted = quote(job, safe="").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise UsageError(f"the job name {job!r:.60} is not valid Unicode") from error
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > _MAX_QUOTED:
        quoted = f"{quoted[: _MAX_QUOTED - 40]}~{xxhash.xxh3_128_hexdigest(job.encode())}"
    return quoted


def snapshot_directory_name(epoch: int, step: int) -> str:
    return f"step-{step:012d}.e{epoch:06d}"


def snapshot_of_directory_name(name: str) -> tuple[int, int] | None:
    """Return (epoch, step) of a directory that is named like a snapshot, None for any other name."""
    match = _SNAPSHOT_DIRECTORY.match(name)
    if match is None:
        return None
    epoch, step = int(match["epoch"]), int(match["step"])
    return (epoch, step) if snapshot_directory_name(epoch, step) == name else None


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:06d}.safetensors"


def rank_record_name(rank: int) -> str:
    return f"rank-{rank:06d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """
    What stands in a rank's JSON: the slot, and the digests of all of its chunks, of ``chunk_bytes`` each.

    FormatError when the two contradict each other.
    """

    slot: control.SlotRef
    chunk_digests: bytes
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        if len(self.chunk_digests) != chunk_count(self.slot.file_bytes, self.chunk_bytes) * DIGEST_BYTES:
            raise FormatError(
                f"rank {self.slot.rank}: {len(self.chunk_digests)} bytes of digests do not belong to a file of "
                f"{self.slot.file_bytes} bytes"
            )
        if (got := root_digest(self.chunk_digests)) != self.slot.root_digest:
            raise FormatError(
                f"rank {self.slot.rank}: the chunk digests have the root {got}, expected {self.slot.root_digest}"
            )

    def encode(self) -> bytes:
        slot = self.slot
        fields: dict[str, object] = {
            "format": RANK_FORMAT,
            "version": VERSION,
            "job": slot.job,
            "epoch": slot.epoch,
            "step": slot.step,
            "rank": slot.rank,
            "world_size": slot.world_size,
            "lane": slot.lane,
            "file_bytes": slot.file_bytes,
            "root_digest": slot.root_digest,
            "layout_hash": slot.layout_hash,
            "chunk_bytes": self.chunk_bytes,
            "chunk_digests": self.chunk_digests.hex(),
        }
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes, what: str) -> RankRecord:
        """Return the record in ``text``; FormatError, naming ``what``, for anything else."""
        fields = _Fields(text, what, RANK_FORMAT)
        chunk_bytes = fields.number("chunk_bytes", 1 << 40)
        if not 1 <= chunk_bytes <= _MAX_CHUNK_BYTES:
            raise FormatError(f"{what} has chunks of {chunk_bytes} bytes; possible are 1 to {_MAX_CHUNK_BYTES}")
        slot = control.SlotRef(
            job=fields.text("job"),
            epoch=fields.number("epoch"),
            step=fields.number("step"),
            rank=fields.number("rank", MAX_WORLD_SIZE - 1),
            world_size=fields.number("world_size", MAX_WORLD_SIZE),
            lane=fields.number("lane", MAX_WORLD_SIZE),
            file_bytes=fields.number("file_bytes", MAX_FILE_BYTES),
            root_digest=fields.digest("root_digest"),
            layout_hash=fields.digest("layout_hash"),
        )
        try:
            digests = bytes.fromhex(fields.text("chunk_digests"))
        except ValueError as error:
            raise FormatError(f"{what}: chunk_digests is not hexadecimal") from error
        return cls(slot=slot, chunk_digests=digests, chunk_bytes=chunk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerRank:
    """One rank's line in the marker."""

    file_bytes: int
    root_digest: str
    layout_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What stands in ``snapshot.json``: which snapshot this is, and what must be there; ``ranks[i]`` is rank i."""

    job: str
    epoch: int
    step: int
    ranks: tuple[MarkerRank, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def encode(self) -> bytes:
        fields: dict[str, object] = {
            "format": MARKER_FORMAT,
            "version": VERSION,
            "job": self.job,
            "epoch": self.epoch,
            "step": self.step,
            "world_size": self.world_size,
            "ranks": [
                {
                    "rank": rank,
                    "file": rank_file_name(rank),
                    "bytes": entry.file_bytes,
                    "root_digest": entry.root_digest,
                    "layout_hash": entry.layout_hash,
                }
                for rank, entry in enumerate(self.ranks)
            ],
        }
        fields["digest"] = _digest_of(fields)
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes, what: str) -> Marker:
        """Return the marker in ``text``; FormatError, naming ``what``, for anything else."""
        fields = _Fields(text, what, MARKER_FORMAT)
        expected = fields.digest("digest")
        got = _digest_of({key: value for key, value in fields.values.items() if key != "digest"})
        if got != expected:
            raise FormatError(f"{what} has the digest {got}, expected {expected}: it was changed")
        world_size = fields.number("world_size", MAX_WORLD_SIZE)
        entries = fields.values.get("ranks")
        if not isinstance(entries, list) or len(entries) != world_size or not world_size:
            raise FormatError(f"{what} does not list the {world_size} ranks that it claims")
        ranks = []
        for rank, entry in enumerate(entries):
            line = _Fields.of(entry, f"{what}: rank {rank}")
            if line.number("rank") != rank or line.text("file") != rank_file_name(rank):
                raise FormatError(f"{what}: line {rank} is not about rank {rank} and {rank_file_name(rank)}")
            ranks.append(
                MarkerRank(
                    file_bytes=line.number("bytes", MAX_FILE_BYTES),
                    root_digest=line.digest("root_digest"),
                    layout_hash=line.digest("layout_hash"),
                )
            )
        return cls(job=fields.text("job"), epoch=fields.number("epoch"), step=fields.number("step"), ranks=tuple(ranks))


def read_json_file(path: Path) -> bytes:
    """Return the bytes of a marker or a rank's JSON; FormatError when it is not there, too large, or unreadable."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise FormatError(f"{path} has {size} bytes; the limit is {MAX_JSON_BYTES}")
            return file.read(MAX_JSON_BYTES)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error


class _Fields:
    """The checked access to one JSON object."""

    __slots__ = ("values", "what")

    values: dict[str, object]

    def __init__(self, text: bytes, what: str, format_name: str) -> None:
        self.what = what
        self.values = decode_json(text, what)
        if self.values.get("format") != format_name:
            raise FormatError(f"{what} is not a {format_name}: its format is {self.values.get('format')!r:.60}")
        if self.values.get("version") != VERSION or type(self.values["version"]) is not int:
            raise FormatError(f"{what} has version {self.values.get('version')!r:.60}; this program reads {VERSION}")

    @classmethod
    def of(cls, value: object, what: str) -> _Fields:
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not a JSON object")
        fields = cls.__new__(cls)
        fields.what, fields.values = what, value
        return fields

    def number(self, key: str, most: int = _MAX_NUMBER) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise FormatError(f"{self.what}: {key} must be a number from 0 to {most}, not {value!r:.60}")
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise FormatError(f"{self.what}: {key} must be a string, not {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{self.what}: {key} is not valid Unicode") from error
        return value

    def digest(self, key: str) -> str:
        value = self.text(key)
        if not _DIGEST.match(value):
            raise FormatError(f"{self.what}: {key} must be 32 hexadecimal digits, not {value!r:.60}")
        return value


def _digest_of(fields: dict[str, object]) -> str:
    """The digest does not depend on spaces or on the order of keys: a tool may print the marker anew."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
