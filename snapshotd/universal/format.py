"""
The universal format: ``universal.json`` and what it says, to checked values and back. docs/reference has it as a page.

Rule 1: ``universal.json`` is the marker: it is written last. A directory without it is no universal checkpoint.
Rule 2: it says all that is needed to read and to verify; the safetensors files can be read without it.
Rule 3: what it says is checked before it is used; names of files are plain names inside the directory.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.layout.dtypes import DTYPES
from snapshotd.layout.header import decode_json

__all__ = [
    "FORMAT",
    "INDEX_NAME",
    "MARKER_NAME",
    "SHARD_BYTES",
    "VERSION",
    "Entry",
    "Manifest",
    "file_group",
    "steps_made",
]

FORMAT: Final = "snapshotd-universal"
VERSION: Final = 1
MARKER_NAME: Final = "universal.json"
INDEX_NAME: Final = "model.safetensors.index.json"

SHARD_BYTES: Final = 4_000_000_000
"""Tensor bytes of one safetensors file, about: a tensor is never cut."""

_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors\Z")
_DIGEST: Final = re.compile(r"xxh3_128:[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor: what it is, and where."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    key: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``universal.json`` says."""

    step: int | None
    source: dict[str, Any]
    tensors: list[Entry]
    tied: dict[str, str]
    frozen: list[str]
    param_groups: list[dict[str, Any]]
    extra: dict[str, Any]
    warnings: list[str]

    @property
    def steps_made(self) -> int | None:
        """How many optimizer steps have been made."""
        return steps_made(self.step, str(self.source.get("format", "")))

    def encode(self) -> bytes:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "source": self.source,
            "tied": self.tied,
            "frozen": self.frozen,
            "param_groups": self.param_groups,
            "extra": self.extra,
            "warnings": self.warnings,
        }
        lines = [
            json.dumps(
                {
                    "kind": entry.kind,
                    "name": entry.name,
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "file": entry.file,
                    "key": entry.key,
                    "digest": entry.digest,
                },
                ensure_ascii=False,
                allow_nan=False,
            )
            for entry in self.tensors
        ]
        text = json.dumps(head, ensure_ascii=False, allow_nan=False, indent=1)
        tensors = ",\n  ".join(lines)
        return f'{text[:-2]},\n "tensors": [\n  {tensors}\n ]\n}}\n'.encode()

    @classmethod
    def decode(cls, text: bytes, what: str) -> Manifest:
        """Return what stands in ``text``; FormatError, naming ``what``, for anything else."""
        values = decode_json(text, what)
        if values.get("format") != FORMAT:
            raise FormatError(f"{what} is not a {FORMAT}: its format is {values.get('format')!r:.60}")
        if values.get("version") != VERSION or type(values.get("version")) is not int:
            raise FormatError(
                f"{what} has version {values.get('version')!r:.60}; this program reads {VERSION}: update snapshotd"
            )
        step = values.get("step")
        if step is not None and (type(step) is not int or step < 0):
            raise FormatError(f"{what}: step is {step!r:.60}")
        listed = _typed(values, "tensors", list, what)
        return cls(
            step=step,
            source=_typed(values, "source", dict, what),
            tensors=[_entry(item, f"{what}: tensor {i}") for i, item in enumerate(listed)],
            tied=_strings(_typed(values, "tied", dict, what), f"{what}: tied"),
            frozen=_names(_typed(values, "frozen", list, what), f"{what}: frozen"),
            param_groups=_groups(_typed(values, "param_groups", list, what), what),
            extra=_typed(values, "extra", dict, what),
            warnings=_names(values.get("warnings", []), f"{what}: warnings"),
        )


def steps_made(step: int | None, format_name: str) -> int | None:
    """
    Return how many optimizer steps a checkpoint's ``step`` means: frameworks say that number itself, and our own
    snapshots are named by their last step, counted from 0. ``format_name``: what the checkpoint was in the first place.
    """
    return step if step is None or format_name != "snapshot" else step + 1


def file_group(kind: str) -> str:
    """Return the first part of the name of the files that hold tensors of ``kind``."""
    if kind in ("model", "buffer"):
        return "model"
    if kind in ("fp32", "rng", "extra"):
        return kind
    return f"optimizer.{kind}"


def _typed(values: dict[str, Any], key: str, kind: type, what: str) -> Any:
    value = values.get(key)
    if not isinstance(value, kind):
        raise FormatError(f"{what}: {key} must be a {kind.__name__}, not {value!r:.60}")
    return value


def _names(values: object, what: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise FormatError(f"{what} is not a list of strings")
    return values


def _strings(values: dict[Any, Any], what: str) -> dict[str, str]:
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"{what} must map names to names, not {key!r:.60} to {value!r:.60}")
    return values


def _groups(values: list[Any], what: str) -> list[dict[str, Any]]:
    for i, group in enumerate(values):
        names = group.get("names") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"{what}: parameter group {i} has no list of names")
    return values


def _entry(value: Any, what: str) -> Entry:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    texts: dict[str, Any] = {key: value.get(key) for key in ("kind", "name", "dtype", "file", "key", "digest")}
    for key, text in texts.items():
        if not isinstance(text, str) or not text:
            raise FormatError(f"{what}: {key} must be a string, not {text!r:.60}")
    what = f"{what} ({value['kind']:.60} of {value['name']:.200})"
    if value["dtype"] not in DTYPES:
        raise FormatError(f"{what} has the unknown dtype {value['dtype']!r:.60}")
    if not _FILE.match(value["file"]):
        raise FormatError(f"{what}: {value['file']!r:.100} is not the name of a safetensors file in the directory")
    if not _DIGEST.match(value["digest"]):
        raise FormatError(f"{what}: {value['digest']!r:.100} is not a digest that is known here (xxh3_128:...)")
    shape = value.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(f"{what}: shape is {shape!r:.100}")
    return Entry(**texts, shape=tuple(shape))
