"""
Layouts: the byte order of all shards of one rank, and the header of its slot files.

Rule 1: a slot file with a layout is a valid safetensors file. Shards that fill lines of the cache lie first, so that
each begins with a line, as large tensors do in memory: copies of what lies alike are fast. Within those, and within the
others, they lie in order of descending item size, so that each is naturally aligned and there are no holes (which
safetensors forbids); ``__meta__`` is last.
Rule 2: a layout is stable from step to step. It is named by the hash of its header, and equal layouts have equal bytes.
Rule 3: offsets of shards are offsets in the file, not in the data area.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import xxhash

from snapshotd.errors import FormatError, LayoutError
from snapshotd.layout.box import Box, TensorBox
from snapshotd.layout.dtypes import DTYPES, stored_shape
from snapshotd.layout.header import (
    LENGTH_BYTES,
    MAX_WRITTEN_HEADER_BYTES,
    META_KEY,
    METADATA_KEY,
    Header,
    RawTensor,
    decode_header,
    decode_json,
    encode_header,
    encode_json,
    header_length,
    size_tuple,
    string_map,
)
from snapshotd.layout.index import Index, index_of

__all__ = ["MAX_FILE_BYTES", "MAX_META_BYTES", "VERSION", "Layout", "Shard"]

VERSION: Final = "1"
"""Of the slot format. A reader refuses what it does not know."""

MAX_META_BYTES: Final = 1 << 30
"""Largest room for the step's own JSON."""

MAX_FILE_BYTES: Final = 1 << 60
"""Largest slot file: one exbibyte, so that sums of offsets stay below 2**63."""

_LINE_BYTES: Final = 64
"""A line of the cache, and where torch and numpy begin a tensor."""

_Likeness: TypeAlias = tuple[object, ...]
"""All that an entry says of its tensor, but its name and its place."""

_NAMES_IN_ERRORS: Final = 10

_FORMAT: Final = "format"
_VERSION: Final = "snapshotd.version"
_BOXES: Final = "snapshotd.boxes"
_TIES: Final = "snapshotd.ties"
_RESERVED: Final = frozenset({_FORMAT, _VERSION, _BOXES, _TIES})
_BOX_FIELDS: Final = frozenset({"fqn", "dtype", "global_shape", "offsets", "scope", "kind"})


class Shard(NamedTuple):
    """A tensor box's place: bytes ``[begin, end)`` of the slot file, under ``key`` in the safetensors header."""

    tensor: TensorBox
    key: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class Layout:
    """
    Where each shard of a rank lies in its slot file; made by ``build`` or ``parse`` only.

    Attributes:
        header: the first ``data_begin`` bytes of each slot file with this layout.
        shards: in byte order; ``index`` finds them by their tensors' names.
        data_begin: file offset of the data area, a multiple of 4096.
        meta: [begin, end) in the file of the room for the step's own JSON; ``end`` is ``file_bytes``.
        file_bytes: size of a slot file with this layout.
        hash: xxh3_128 of the header in hexadecimal: the layout's name.
        ties: alias to the name of the tensor that it shares its storage with.
        attrs: whatever else the caller of ``build`` wanted to stand in the header.
    """

    header: bytes = field(repr=False)
    hash: str = field(compare=False)
    data_begin: int = field(compare=False)
    meta: tuple[int, int] = field(compare=False)
    file_bytes: int = field(compare=False)
    shards: tuple[Shard, ...] = field(compare=False, repr=False)
    ties: Mapping[str, str] = field(compare=False, repr=False)
    attrs: Mapping[str, str] = field(compare=False, repr=False)

    @classmethod
    def build(
        cls,
        boxes: Sequence[TensorBox],
        *,
        meta_capacity: int,
        ties: Mapping[str, str] = MappingProxyType({}),
        attrs: Mapping[str, str] = MappingProxyType({}),
    ) -> Layout:
        """
        Lay out ``boxes``: those of whole lines first, then by item size, the largest first, and otherwise in the order
        given; then ``meta_capacity`` bytes.

        LayoutError for duplicate keys (with their names), for ties and attrs that are not str to str or clash with
        names in use, and for layouts above the limits.
        """
        if type(meta_capacity) is not int or not 0 <= meta_capacity <= MAX_META_BYTES:
            raise LayoutError(f"meta_capacity must be 0 to {MAX_META_BYTES} bytes, not {meta_capacity!r}")
        _check_strings("ties", ties)
        _check_strings("attrs", attrs)
        if clash := sorted(_RESERVED & attrs.keys()):
            raise LayoutError(f"attrs uses the reserved names {', '.join(clash)}")
        ordered = sorted(boxes, key=lambda box: (box.nbytes % _LINE_BYTES != 0, -box.itemsize))
        keys = [_key_of(box) for box in ordered]
        _check_unique(keys)
        _check_ties(ties, {box.name for box in ordered})

        raw: dict[str, RawTensor] = {}
        end = 0
        for key, box in zip(keys, ordered, strict=True):
            begin, end = end, end + box.nbytes
            dtype = DTYPES[box.dtype]
            raw[key] = RawTensor(tag=dtype.tag, shape=stored_shape(dtype, box.box.lengths), begin=begin, end=end)
        raw[META_KEY] = RawTensor(tag="U8", shape=(meta_capacity,), begin=end, end=end + meta_capacity)
        if end + meta_capacity > MAX_FILE_BYTES - MAX_WRITTEN_HEADER_BYTES:
            raise LayoutError(f"{end} bytes of shards are above the limit of {MAX_FILE_BYTES} for a file")
        metadata = {_FORMAT: "pt", _VERSION: VERSION, _BOXES: _describe(keys, ordered)}
        metadata[_TIES] = encode_json(dict(sorted(ties.items()))).decode()
        metadata.update(sorted(attrs.items()))
        header = encode_header(Header(metadata=metadata, tensors=raw))
        if len(header) - LENGTH_BYTES > MAX_WRITTEN_HEADER_BYTES:
            raise LayoutError(
                f"the header of {len(ordered)} shards has {len(header)} bytes; safetensors allows "
                f"{MAX_WRITTEN_HEADER_BYTES}. Shorten the names, or split the state over more ranks"
            )
        return cls._assemble(header, zip(keys, ordered, strict=True), meta_capacity, dict(ties), dict(attrs))

    @classmethod
    def parse(cls, header: bytes | memoryview, *, file_bytes: int | None = None) -> Layout:
        """
        Read the layout back from a slot file's first bytes: its header, and whatever follows is not looked at.

        ``file_bytes``: the size of the file, where known; the layout must fit into it. FormatError, and no other
        error, for bytes that are not the header of a slot file.
        """
        first = bytes(header[:LENGTH_BYTES])
        total = header_length(first)
        if len(header) < total:
            raise FormatError(f"the header claims {total} bytes, but there are {len(header)}")
        if file_bytes is not None and file_bytes < total:
            raise FormatError(f"the header claims {total} bytes, but the file has {file_bytes}")
        data = bytes(header[:total])
        decoded = decode_header(data)
        metadata = decoded.metadata
        if metadata.get(_FORMAT) != "pt" or metadata.get(_VERSION) != VERSION:
            raise FormatError(
                f"not a slot file of version {VERSION}: {_FORMAT} is {metadata.get(_FORMAT)!r:.40}, "
                f"{_VERSION} is {metadata.get(_VERSION)!r:.40}"
            )
        shards, meta_capacity = _check_tensors(decoded)
        ties = string_map(decode_json(metadata.get(_TIES, ""), _TIES), _TIES)
        attrs = {key: value for key, value in metadata.items() if key not in _RESERVED}
        try:
            _check_ties(ties, {tensor.name for _, tensor in shards})
        except LayoutError as error:
            raise FormatError(str(error)) from error
        layout = cls._assemble(data, shards, meta_capacity, ties, attrs)
        if layout.file_bytes > MAX_FILE_BYTES:
            raise FormatError(f"the layout needs {layout.file_bytes} bytes; the limit is {MAX_FILE_BYTES}")
        if file_bytes is not None and layout.file_bytes > file_bytes:
            raise FormatError(f"the layout needs {layout.file_bytes} bytes, but the file has {file_bytes}")
        return layout

    @cached_property
    def index(self) -> Index:
        return index_of(shard.tensor for shard in self.shards)

    @classmethod
    def _assemble(
        cls,
        header: bytes,
        boxes: Iterable[tuple[str, TensorBox]],
        meta_capacity: int,
        ties: dict[str, str],
        attrs: dict[str, str],
    ) -> Layout:
        shards: list[Shard] = []
        end = len(header)
        for key, tensor in boxes:
            begin, end = end, end + tensor.nbytes
            shards.append(Shard(tensor=tensor, key=key, begin=begin, end=end))
        return cls(
            header=header,
            hash=xxhash.xxh3_128_hexdigest(header),
            data_begin=len(header),
            meta=(end, end + meta_capacity),
            file_bytes=end + meta_capacity,
            shards=tuple(shards),
            ties=MappingProxyType(ties),
            attrs=MappingProxyType(attrs),
        )


def _key_of(tensor: TensorBox) -> str:
    if tensor.is_whole:
        return tensor.name
    return tensor.name + "@" + ",".join(map(str, tensor.box.offsets))


def _describe(keys: Sequence[str], tensors: Sequence[TensorBox]) -> str:
    boxes = {
        key: {
            "fqn": tensor.name,
            "dtype": tensor.dtype,
            "global_shape": tensor.global_shape,
            "offsets": tensor.box.offsets,
            "scope": tensor.scope,
            "kind": tensor.kind,
        }
        for key, tensor in zip(keys, tensors, strict=True)
    }
    return encode_json(boxes).decode()


def _check_unique(keys: Sequence[str]) -> None:
    reserved = {META_KEY, METADATA_KEY} & set(keys)
    if reserved:
        raise LayoutError(f"{', '.join(sorted(reserved))} cannot be the name of a tensor")
    if len(set(keys)) != len(keys):
        names = [key for key, count in Counter(keys).items() if count > 1]
        more = f" and {len(names) - _NAMES_IN_ERRORS} more" if len(names) > _NAMES_IN_ERRORS else ""
        raise LayoutError(f"these shards appear more than once: {', '.join(names[:_NAMES_IN_ERRORS])}{more}")


def _check_strings(what: str, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise LayoutError(f"{what} must map str to str; {key!r:.60} maps to {value!r:.60}")
        try:
            key.encode()
            value.encode()
        except UnicodeEncodeError as error:
            raise LayoutError(f"{what} holds invalid Unicode at {key!r:.60}") from error


def _check_ties(ties: Mapping[str, str], names: set[str]) -> None:
    for alias, name in ties.items():
        if alias in names:
            raise LayoutError(f"{alias!r:.80} is both an alias of {name!r:.80} and a tensor of its own")
        if name in ties:
            raise LayoutError(f"{alias!r:.80} is an alias of {name!r:.80}, which is itself an alias")


def _check_tensors(header: Header) -> tuple[list[tuple[str, TensorBox]], int]:
    """Return (key, tensor) in byte order and the room for meta, or FormatError: each byte must belong to one shard."""
    tensors = dict(header.tensors)
    meta = tensors.pop(META_KEY, None)
    if meta is None or meta.tag != "U8" or meta.shape != (meta.end - meta.begin,) or meta.shape[0] > MAX_META_BYTES:
        raise FormatError(f"{META_KEY} is missing or not a U8 tensor of one dimension and at most {MAX_META_BYTES}")
    described = decode_json(header.metadata.get(_BOXES, ""), _BOXES)
    if described.keys() != tensors.keys():
        odd = sorted(described.keys() ^ tensors.keys())[:_NAMES_IN_ERRORS]
        raise FormatError(f"{_BOXES} and the header do not hold the same tensors: {odd!r:.400}")
    expected = 0
    shards: list[tuple[str, TensorBox]] = []
    alike: dict[_Likeness, TensorBox] = {}
    for key, raw in sorted(tensors.items(), key=_place_of):
        if raw.begin != expected:
            raise FormatError(f"the shard {key!r:.80} begins at {raw.begin}, but the one before ends at {expected}")
        expected = raw.end
        shards.append((key, _check_tensor(key, raw, described[key], alike)))
    if meta.begin != expected:
        raise FormatError(f"{META_KEY} begins at {meta.begin}, but the last shard ends at {expected}")
    return shards, meta.shape[0]


def _place_of(item: tuple[str, RawTensor]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _check_tensor(key: str, raw: RawTensor, described: object, alike: dict[_Likeness, TensorBox]) -> TensorBox:
    """Return the tensor of one entry. Models have many of one shape: ``alike`` are those that were checked before."""
    try:
        if not isinstance(described, dict) or described.keys() != _BOX_FIELDS:
            raise FormatError(f"is not described by exactly {', '.join(sorted(_BOX_FIELDS))}")
        offsets = size_tuple(described["offsets"], "offsets")
        global_shape = size_tuple(described["global_shape"], "global_shape")
        dtype, scope, kind = described["dtype"], described["scope"], described["kind"]
        if not type(dtype) is type(scope) is type(kind) is str:
            raise FormatError(f"dtype, scope and kind are not all strings: {(dtype, scope, kind)!r:.80}")
        likeness = (raw.tag, raw.shape, raw.end - raw.begin, dtype, offsets, global_shape, scope, kind)
        known = alike.get(likeness)
        if known is not None:
            tensor = known.named(described["fqn"])
        else:
            tensor = _new_tensor(raw, described, offsets, global_shape)
            alike[likeness] = tensor
    except (FormatError, LayoutError) as error:
        raise FormatError(f"the shard {key!r:.80}: {error}") from error
    if _key_of(tensor) != key:
        raise FormatError(f"the shard {key!r:.80} should be called {_key_of(tensor)!r:.80}")
    return tensor


def _new_tensor(
    raw: RawTensor, described: dict[str, Any], offsets: tuple[int, ...], global_shape: tuple[int, ...]
) -> TensorBox:
    dtype = DTYPES.get(described["dtype"])
    if dtype is None or dtype.tag != raw.tag:
        raise FormatError(f"it is {raw.tag!r:.40} in the header, but described as {described['dtype']!r:.40}")
    lengths = raw.shape
    if not dtype.native:
        lengths = (*raw.shape[:-1], raw.shape[-1] // dtype.itemsize) if offsets and raw.shape else ()
    if stored_shape(dtype, lengths) != raw.shape:
        raise FormatError(f"the shape {raw.shape!r:.80} is not one of {dtype.name}")
    tensor = TensorBox(
        name=described["fqn"],
        dtype=dtype.name,
        global_shape=global_shape,
        box=Box(offsets, lengths),
        scope=described["scope"],
        kind=described["kind"],
    )
    if tensor.nbytes != raw.end - raw.begin:
        raise FormatError(f"it has {raw.end - raw.begin} bytes, but shape {lengths} of {dtype.name}")
    return tensor
