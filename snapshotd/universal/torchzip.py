"""
Files of torch.save, read without torch: the zip archive, and the stream that torch wrote before 1.6.

``load(source)`` returns the saved object with a ``TensorRef`` for each tensor: a range of the file, not read yet.
``load_part`` does the same for an archive inside another file, as DCP's ``.distcp`` files have them. Neither compares
the CRC-32s of the entries: ``watch`` and ``records_of`` are for those who do (checksums.py).

Rule 1: entries are stored, never compressed (torch compresses nothing; a zip bomb does), so each is a range.
Rule 2: names, sizes and offsets of the archive's directory are checked against the file before they are used, and
entries may not lie over one another.
Rule 3: the bytes are little-endian, or the file is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from snapshotd.errors import FormatError
from snapshotd.layout.dtypes import DTYPES
from snapshotd.universal.globals import StorageRef, StorageType, TensorRef
from snapshotd.universal.sources import FileSource, Source, read_bytes
from snapshotd.universal.unpickle import unpickle, unpickle_with_end
from snapshotd.universal.views import Stored

__all__ = ["Archive", "ZipRecord", "is_torch_file", "load", "load_part", "records_of", "tensor_of_part", "watch"]

MAX_PICKLE_BYTES: Final = 2 << 30
"""Largest data.pkl: structure only, a hundred bytes per tensor."""

MAX_ENTRIES: Final = 10_000_000

_WINDOW: Final = 4096
"""Bytes that are read first from both ends of an archive: DCP's small items fit whole."""

_MAX_KNOWN: Final = 10_000
_KNOWN_TENSORS: Final[dict[tuple[bytes, tuple[int, ...]], tuple[str, str, int, tuple[int, ...], tuple[int, ...]]]] = {}
"""(pickle, sizes of the storages) to (storage, dtype, offset, shape, strides) of a tensor that was checked."""

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001

_Entry = tuple[int, int, int]
"""Begin of the local header, bytes, CRC-32 (0: none was written), as the archive's directory has them."""


class Archive(NamedTuple):
    """Bytes ``[begin, begin + length)`` of a source, which are a zip archive."""

    source: Source
    begin: int
    length: int


class ZipRecord(NamedTuple):
    """One entry of an archive: its data begin at byte ``begin`` of the source. ``crc`` is 0 where none was written."""

    name: str
    begin: int
    nbytes: int
    crc: int


_WATCHED: Final[ContextVar[dict[Archive, None] | None]] = ContextVar("watched", default=None)


class _Range:
    """Bytes [begin, end) of a source, with a window of them in memory."""

    def __init__(self, source: Source, begin: int, length: int) -> None:
        if begin < 0 or length < 0 or begin + length > source.size:
            raise FormatError(
                f"{source.label} has {source.size} bytes, but [{begin}, {begin + length}) should hold an archive: it "
                "was cut short; copy it again, or take an older checkpoint"
            )
        self.source, self.begin, self.length = source, begin, length
        self.head = read_bytes(source, begin, min(length, _WINDOW))
        self.tail_at = max(len(self.head), length - _WINDOW)
        self.tail = read_bytes(source, begin + self.tail_at, length - self.tail_at)

    def read(self, at: int, count: int) -> bytes:
        if not 0 <= at <= at + count <= self.length:
            raise FormatError(f"{self.source.label}: bytes [{at}, {at + count}) are outside of the archive")
        if at + count <= len(self.head):
            return self.head[at : at + count]
        if at >= self.tail_at:
            return self.tail[at - self.tail_at : at - self.tail_at + count]
        return read_bytes(self.source, self.begin + at, count)


def is_torch_file(source: Source) -> bool:
    """Whether ``source`` begins as a torch.save file of either kind does."""
    if source.size < 16:
        return False
    head = read_bytes(source, 0, 16)
    return head[:4] == b"PK\x03\x04" or _LEGACY_MAGIC.to_bytes(10, "little") in head


@contextmanager
def watch() -> Iterator[dict[Archive, None]]:
    """Give a dict that has each archive, once, which this thread opens until the end of the block."""
    opened: dict[Archive, None] = {}
    token = _WATCHED.set(opened)
    try:
        yield opened
    finally:
        _WATCHED.reset(token)


def records_of(archive: Archive) -> Iterator[ZipRecord]:
    """Iterate over all entries of an archive that have bytes."""
    entries, part = _open(*archive)
    for name, entry in entries.items():
        at, nbytes = _locate(part, name, entry)
        if nbytes:
            yield ZipRecord(name, archive.begin + at, nbytes, entry[2])


def load(source: Source | str) -> Any:
    """Return what torch.save wrote into a file, zip or legacy."""
    if isinstance(source, str):
        source = FileSource(source)
    if source.size >= 4 and read_bytes(source, 0, 4) == b"PK\x03\x04":
        return load_part(source, 0, source.size)
    return _load_legacy(source)


def load_part(source: Source, begin: int, length: int) -> Any:
    """Return what torch.save wrote into bytes ``[begin, begin + length)`` of ``source``, which are a zip archive."""
    entries, part = _open(source, begin, length)
    pickled = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
    if pickled is None:
        names = ", ".join(sorted(entries)[:5])
        raise FormatError(f"{source.label}: an archive without data.pkl (it has {names}): not a file of torch.save")
    prefix = pickled[: -len("data.pkl")]
    if (name := prefix + "byteorder") in entries:
        _check_byte_order(part, _locate(part, name, entries[name]))
    at, size = _locate(part, pickled, entries[pickled])
    if size > MAX_PICKLE_BYTES:
        raise FormatError(f"{source.label}: {pickled} has {size} bytes; the limit is {MAX_PICKLE_BYTES}")
    storages: dict[str, StorageRef] = {}

    def storage(key: str, dtype: str | None, nbytes: int | None, location: str) -> StorageRef:
        known = storages.get(key)
        if known is None:
            name = f"{prefix}data/{key}"
            if name not in entries:
                raise FormatError(f"{source.label}: the storage {name} is missing")
            entry = _locate(part, name, entries[name])
            if nbytes is not None and entry[1] != nbytes:
                raise FormatError(
                    f"{source.label}: the storage {prefix}data/{key} has {entry[1]} bytes, the pickle says {nbytes}"
                )
            known = StorageRef(source, f"{begin}:{key}", dtype, entry[1], begin + entry[0], location)
            storages[key] = known
        elif known.dtype != dtype:
            known = StorageRef(source, known.key, dtype, known.nbytes, known.begin, location)
        return known

    return unpickle(part.read(at, size), what=f"{source.label} ({pickled})", persistent=_persistent(storage, source))


def tensor_of_part(source: Source, begin: int, length: int) -> Stored:
    """
    Return a view of the one tensor that torch.save wrote into these bytes; FormatError for anything else.

    A checkpoint has thousands of chunks, and few different pickles among them: what was checked once for the same
    pickle and the same size of its storage is not checked again.
    """
    entries, part = _open(source, begin, length)
    name = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
    if name is None or entries[name][1] > _WINDOW:
        return _single_tensor(load_part(source, begin, length), source, begin)
    pickled = part.read(*_locate(part, name, entries[name]))
    prefix = name[: -len("data.pkl")]
    sizes = tuple(entry[1] for key, entry in entries.items() if key.startswith(f"{prefix}data/"))
    order_name = prefix + "byteorder"
    order = _locate(part, order_name, entries[order_name]) if order_name in entries else None
    known = _KNOWN_TENSORS.get((pickled, sizes))
    if known is None:
        value = load_part(source, begin, length)
        view = _single_tensor(value, source, begin)
        if len(_KNOWN_TENSORS) < _MAX_KNOWN:
            key = value.storage.key.partition(":")[2]
            _KNOWN_TENSORS[pickled, sizes] = (key, value.dtype, value.offset, value.shape, value.strides)
        return view
    if order is not None:
        _check_byte_order(part, order)
    key, dtype, offset, shape, strides = known
    entry = entries.get(f"{prefix}data/{key}")
    if entry is None:
        raise FormatError(f"{source.label}: the storage {prefix}data/{key} is missing")
    at, nbytes = _locate(part, f"{prefix}data/{key}", entry)
    view = Stored(source, begin + at + offset * DTYPES[dtype].itemsize, dtype, shape, strides)
    if view.end > begin + at + nbytes:
        raise FormatError(f"{source.label}: a tensor of {dtype} {list(shape)} is larger than its storage {key}")
    return view


def _single_tensor(value: Any, source: Source, begin: int) -> Stored:
    if not isinstance(value, TensorRef):
        raise FormatError(f"{source.label}: byte {begin} should begin a tensor, but there is a {type(value).__name__}")
    return value.view


def _persistent(
    storage: Callable[[str, str | None, int | None, str], StorageRef], source: Source
) -> Callable[[Any], StorageRef]:
    def find(key: Any) -> StorageRef:
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage":
            raise FormatError(f"{source.label}: a persistent id that is no storage: {key!r:.80}")
        kind, name, location, count = key[1:5]
        if not isinstance(kind, StorageType) or not isinstance(name, str) or type(count) is not int or count < 0:
            raise FormatError(f"{source.label}: a storage that makes no sense: {key!r:.80}")
        item = DTYPES[kind.dtype].itemsize if kind.dtype is not None else 1
        found = storage(name, kind.dtype, count * item, str(location)[:100])
        view = key[5] if len(key) > 5 else None
        if view is not None:  # legacy files only: a storage that is a part of another
            name, offset, size = view
            if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= count:
                raise FormatError(f"{source.label}: a view of a storage that is outside of it: {view!r:.80}")
            raise FormatError(f"{source.label}: views of storages (torch before 0.4) are not read; save it again")
        return found

    return find


def _open(source: Source, begin: int, length: int) -> tuple[dict[str, _Entry], _Range]:
    """Return {name: entry} with places relative to the archive, and the archive."""
    part = _Range(source, begin, length)
    opened = _WATCHED.get()
    if opened is not None:
        opened[Archive(source, begin, length)] = None
    label = f"{source.label}" + (f" at byte {begin}" if begin else "")
    window = part.read(max(0, length - _WINDOW), min(length, _WINDOW))
    end = window.rfind(b"PK\x05\x06")
    if end < 0 or len(window) - end < 22:
        raise FormatError(f"{label}: the end of the archive is missing: it was cut short, or is no file of torch.save")
    end_at = max(0, length - _WINDOW) + end
    _, _, _, count, size, at = struct.unpack_from("<4xHHHHII", window, end)
    if count == 0xFFFF or size == 0xFFFFFFFF or at == 0xFFFFFFFF:
        count, size, at = _zip64_end(part, end_at, label)
    if count > MAX_ENTRIES or at + size > end_at or size < 46 * count:
        raise FormatError(f"{label}: a directory of {count} entries and {size} bytes at {at} does not fit")
    return _directory(part, part.read(at, size), count, at, label), part


def _zip64_end(part: _Range, end_at: int, label: str) -> tuple[int, int, int]:
    locator = part.read(end_at - 20, 20) if end_at >= 20 else b""
    if locator[:4] != b"PK\x06\x07":
        raise FormatError(f"{label}: a zip64 archive without its locator")
    (at,) = struct.unpack_from("<Q", locator, 8)
    record = part.read(at, 56)
    if record[:4] != b"PK\x06\x06":
        raise FormatError(f"{label}: a zip64 archive without its end record")
    count, size, begin = struct.unpack_from("<QQQ", record, 32)
    return count, size, begin


def _directory(part: _Range, data: bytes, count: int, limit: int, label: str) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    ranges: list[tuple[int, int]] = []
    at = 0
    for _ in range(count):
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > len(data):
            raise FormatError(f"{label}: the archive's directory is broken at its byte {at}")
        flags, method = struct.unpack_from("<HH", data, at + 8)
        crc, packed, size, n_name, n_extra, n_comment = struct.unpack_from("<IIIHHH", data, at + 16)
        (header,) = struct.unpack_from("<I", data, at + 42)
        name = str(data[at + 46 : at + 46 + n_name], "utf-8", "replace")
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        at += 46 + n_name + n_extra + n_comment
        if 0xFFFFFFFF in (packed, size, header):
            size, packed, header = _zip64_extra(extra, size, packed, header, label)
        if method != 0 or packed != size:
            raise FormatError(
                f"{label}: the entry {name!r:.80} is compressed ({packed} bytes for {size}); torch.save stores. It is "
                "refused, because such an entry can be a bomb: unpack and save it again if it is yours"
            )
        if flags & 1:
            raise FormatError(f"{label}: the entry {name!r:.80} is encrypted")
        end = header + 30 + n_name + size
        if end > limit:
            raise FormatError(f"{label}: the entry {name!r:.80} has {size} bytes at {header}, behind the archive's end")
        if name in entries:
            raise FormatError(f"{label}: the entry {name!r:.80} is there twice")
        entries[name] = (header, size, crc)
        ranges.append((header, end))
    ranges.sort()
    for (_, first_end), (second_begin, _) in zip(ranges, ranges[1:], strict=False):
        if second_begin < first_end:
            raise FormatError(f"{label}: entries of the archive lie over one another at byte {second_begin}")
    return entries


def _locate(part: _Range, name: str, entry: _Entry) -> tuple[int, int]:
    """Return (begin of the data, bytes) of an entry, which its local header says."""
    header, size, _ = entry
    local = part.read(header, 30)
    if local[:4] != b"PK\x03\x04":
        raise FormatError(f"{part.source.label}: the entry {name!r:.80} is not at byte {header} of the archive")
    n_name, n_extra = struct.unpack_from("<HH", local, 26)
    begin: int = header + 30 + n_name + n_extra
    if begin + size > part.length:
        raise FormatError(f"{part.source.label}: the entry {name!r:.80} has {size} bytes, behind the archive's end")
    return begin, size


def _zip64_extra(extra: bytes, size: int, packed: int, header: int, label: str) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            if at + 4 + length > len(extra):
                break
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = values.pop(0) if size == 0xFFFFFFFF else size
                packed = values.pop(0) if packed == 0xFFFFFFFF else packed
                header = values.pop(0) if header == 0xFFFFFFFF else header
            except IndexError:
                break
            return size, packed, header
        at += 4 + length
    raise FormatError(f"{label}: a zip64 entry without its sizes")


def _check_byte_order(part: _Range, entry: tuple[int, int]) -> None:
    """Files of torch before 2.1 say nothing; they were little-endian but for a few machines."""
    if part.read(entry[0], min(entry[1], 16)) != b"little":
        raise FormatError(f"{part.source.label} is not little-endian: save it again on a little-endian machine")


def _load_legacy(source: Source) -> Any:
    """
    Four pickles (magic, protocol, system, the object), one with the storages' keys, then the storages: for each eight
    bytes with its number of elements, and the elements.
    """
    label = source.label
    if source.size > 64 and _LEGACY_MAGIC.to_bytes(10, "little") not in read_bytes(source, 0, 32):
        raise FormatError(f"{label} is not a file of torch.save: neither a zip archive nor torch's old format")
    found: dict[str, StorageRef] = {}
    # The structure comes first, the storages after it; twice the window each time, until the pickles end inside it.
    window = min(source.size, 1 << 20)
    while True:
        data = read_bytes(source, 0, window)
        found.clear()
        try:
            value, keys, at = _legacy_pickles(source, data, found)
            break
        except FormatError as error:
            if window >= min(source.size, MAX_PICKLE_BYTES) or "names" in str(error):
                raise
            window = min(source.size, window * 4)
    for key in keys:
        storage = found.get(key) if isinstance(key, str) else None
        if storage is None:
            raise FormatError(f"{label}: a storage {key!r:.40} that nothing uses")
        item = DTYPES[storage.dtype].itemsize if storage.dtype is not None else 1
        count = int.from_bytes(read_bytes(source, at, 8), "little", signed=True)
        if count * item != storage.nbytes:
            raise FormatError(f"{label}: the storage {key} has {count} elements, expected {storage.nbytes // item}")
        if at + 8 + storage.nbytes > source.size:
            raise FormatError(
                f"{label} has {source.size} bytes, but its storage {key} ends at {at + 8 + storage.nbytes}: it was cut "
                "short; copy it again, or take an older checkpoint"
            )
        storage.begin = at + 8
        at += 8 + storage.nbytes
    if any(storage.begin < 0 for storage in found.values()):
        raise FormatError(f"{label}: storages are missing: the file was cut short")
    return value


def _legacy_pickles(source: Source, data: bytes, found: dict[str, StorageRef]) -> tuple[Any, list[Any], int]:
    def storage(key: str, dtype: str | None, nbytes: int | None, location: str) -> StorageRef:
        if key not in found:
            found[key] = StorageRef(source, key, dtype, nbytes or 0, -1, location)
        return found[key]

    persistent = _persistent(storage, source)
    values: list[Any] = []
    at = 0
    for _ in range(5):
        value, at = unpickle_with_end(data, what=source.label, persistent=persistent, begin=at)
        values.append(value)
    magic, protocol, system, value, keys = values
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
        raise FormatError(f"{source.label} is not a file of torch.save of a known version")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise FormatError(f"{source.label} is not little-endian: save it again on a little-endian machine")
    return value, keys, at
