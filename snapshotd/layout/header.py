"""
The header of a slot file: bytes to a checked description, and back.

A slot file is a safetensors file: 8 bytes little-endian N, N bytes of JSON padded with spaces, then the data.

Rule 1: every number is checked before it is used to allocate, to slice or to multiply.
Rule 2: the reader either understands the whole header or raises FormatError; there is no other way out.
Rule 3: what the reader accepts, the safetensors package accepts too (no holes, no overlaps, known tags).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn, TypeGuard

from snapshotd.errors import FormatError

__all__ = [
    "ALIGN_BYTES",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_WRITTEN_HEADER_BYTES",
    "META_KEY",
    "Header",
    "RawTensor",
    "decode_header",
    "encode_header",
    "header_length",
]

LENGTH_BYTES: Final = 8
"""Bytes of the number in front of the JSON."""

ALIGN_BYTES: Final = 4096
"""The data area begins at a multiple of this: a page, and more than any element type or vector unit asks for."""

MAX_HEADER_BYTES: Final = 256 * 1024 * 1024
"""Largest JSON that is read. A layout of 10,000 tensors has 4 MB."""

MAX_WRITTEN_HEADER_BYTES: Final = 100_000_000
"""Largest JSON that is written: the safetensors package (0.8) refuses more."""

META_KEY: Final = "__meta__"
"""The tensor at the end of the file that holds the step's own JSON, padded with spaces by its writer."""

METADATA_KEY: Final = "__metadata__"

_MAX_OFFSET: Final = 1 << 62
_ENTRY_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


class RawTensor(NamedTuple):
    """One entry of the header: a safetensors tag, a shape, and [begin, end) in bytes relative to the data area."""

    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands in a header: ``metadata`` is str to str, ``tensors`` are in the order of the JSON."""

    metadata: dict[str, str]
    tensors: dict[str, RawTensor]


def header_length(first8: bytes | memoryview) -> int:
    """
    Return how many bytes the whole header has, from its first 8 bytes: these 8, the JSON and its padding.

    The data area begins at this offset: a multiple of ALIGN_BYTES. FormatError for any other bytes.
    """
    if len(first8) < LENGTH_BYTES:
        raise FormatError(f"a slot file begins with {LENGTH_BYTES} bytes of length, but there are only {len(first8)}")
    json_bytes = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if not 2 <= json_bytes <= MAX_HEADER_BYTES:
        raise FormatError(f"the header claims {json_bytes} bytes; possible are 2 to {MAX_HEADER_BYTES}")
    if (json_bytes + LENGTH_BYTES) % ALIGN_BYTES:
        raise FormatError(f"the header claims {json_bytes} bytes, so that the data would not be on a page boundary")
    return json_bytes + LENGTH_BYTES


def encode_header(header: Header) -> bytes:
    """Return the header's bytes: length, JSON, padding."""
    entries: dict[str, object] = {METADATA_KEY: header.metadata}
    for key, tensor in header.tensors.items():
        entries[key] = {"dtype": tensor.tag, "shape": tensor.shape, "data_offsets": (tensor.begin, tensor.end)}
    text = encode_json(entries)
    padding = -(LENGTH_BYTES + len(text)) % ALIGN_BYTES
    return b"".join(((len(text) + padding).to_bytes(LENGTH_BYTES, "little"), text, b" " * padding))


def encode_json(value: object) -> bytes:
    """Return compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def decode_json(text: bytes | str, what: str) -> dict[str, object]:
    """
    Return the one JSON object in ``text``; FormatError, naming ``what``, for everything else.

    Stricter than ``json.loads``: no duplicate keys, no NaN, no bytes that are not UTF-8.
    """
    try:
        decoded = str(text, "utf-8") if not isinstance(text, str) else text
        value: object = json.loads(decoded, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # both JSON and Unicode errors are ValueErrors
        raise FormatError(f"{what} is not JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object but {type(value).__name__}")
    return value


def decode_header(data: bytes) -> Header:
    """Return what stands in the header ``data`` (all its bytes, with length and padding); FormatError otherwise."""
    total = header_length(data)
    if len(data) != total:
        raise FormatError(f"the header claims {total} bytes, but there are {len(data)}")
    if data[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise FormatError("the header does not begin with '{'")
    entries = decode_json(data[LENGTH_BYTES:], "the header")
    metadata = string_map(entries.pop(METADATA_KEY, None), f"{METADATA_KEY} in the header")
    return Header(metadata=metadata, tensors={key: _raw_tensor(key, value) for key, value in entries.items()})


def string_map(value: object, what: str) -> dict[str, str]:
    """Return ``value`` if it is a str-to-str dict of valid Unicode; FormatError, naming ``what``, otherwise."""
    if not isinstance(value, dict):
        raise FormatError(f"{what} is missing or not a JSON object")
    result: dict[str, str] = {}
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise FormatError(f"{what} holds something else than strings at {key!r:.60}")
        try:
            key.encode()
            text.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{what} holds invalid Unicode at {key!r:.60}") from error
        result[key] = text
    return result


def size_tuple(value: object, what: str) -> tuple[int, ...]:
    """Return a JSON list of sizes as a tuple; FormatError, naming ``what``, if it is not one."""
    if not _are_sizes(value):
        raise FormatError(f"{what} is not a list of sizes: {value!r:.80}")
    return tuple(value)


def _raw_tensor(key: str, value: object) -> RawTensor:
    if not isinstance(value, dict) or value.keys() != _ENTRY_FIELDS:
        raise FormatError(f"the header's entry {key!r:.80} needs exactly dtype, shape and data_offsets")
    tag, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    # A header has thousands of entries: what is wrong with one is put into words when something is.
    if type(tag) is str and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
        begin, end = offsets
        if begin <= end:
            return RawTensor(tag, tuple(shape), begin, end)
    what = f"the header's entry {key!r:.80}"
    if not isinstance(tag, str):
        raise FormatError(f"{what}: dtype is not a string")
    size_tuple(shape, f"{what}: shape")
    size_tuple(offsets, f"{what}: data_offsets")
    raise FormatError(f"{what}: data_offsets {offsets!r:.80} are not [begin, end]")


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - a generator takes three times as long
        if type(item) is not int or not 0 <= item <= _MAX_OFFSET:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
