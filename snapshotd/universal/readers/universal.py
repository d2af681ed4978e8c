"""
Read our own universal format back: from ``universal.json`` alone, with each file's header checked against it.

A training job that starts from a universal checkpoint reads it by this module: neither here nor in what is imported
here does anybody open a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Sealed
from snapshotd.universal.format import MARKER_NAME, Manifest
from snapshotd.universal.safetensors import read_header
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import JOURNAL, check_sealed
from snapshotd.universal.views import Stored, View

__all__ = ["check_share", "detect", "manifest_of", "read", "tensors_of"]


def detect(path: Path) -> bool:
    """A folder with ``universal.json``, or with a conversion into one that was interrupted."""
    if path.name == MARKER_NAME:
        return path.is_file()
    return (path / MARKER_NAME).is_file() or (path / JOURNAL).is_file()


def read(path: Path) -> State:
    """Return the state at ``path``. FormatError when a file is missing, cut short, or is not what the marker says."""
    folder = path.parent if path.name == MARKER_NAME else path
    manifest = manifest_of(folder)
    source_facts = dict(manifest.source)
    return State(
        format=str(source_facts.pop("format", "universal")),
        tensors=tensors_of(folder, manifest),
        step=manifest.step,
        source=source_facts,
        param_groups=manifest.param_groups,
        tied=manifest.tied,
        frozen=manifest.frozen,
        extra=manifest.extra,
        warnings=manifest.warnings,
    )


def tensors_of(folder: Path, manifest: Manifest) -> list[Tensor]:
    """Return the tensors in the manifest's order. FormatError as for ``read``."""
    files: dict[str, dict[str, Stored]] = {}
    tensors: list[Tensor] = []
    for entry in manifest.tensors:
        if entry.file not in files:
            source = FileSource(folder / entry.file)
            if not source.path.is_file():
                raise FormatError(f"{source.path} is missing; {MARKER_NAME} says that it holds {entry.name}")
            files[entry.file] = read_header(source)[0]
        found = files[entry.file].get(entry.key)
        if found is None:
            raise FormatError(f"{folder / entry.file} lacks {entry.key}, which {MARKER_NAME} says it holds")
        what = f"{entry.kind} of {entry.name}"
        view = Sealed(found.source, found.offset, entry.dtype, entry.shape, digest=entry.digest, what=what)
        if view.nbytes != found.nbytes:
            raise FormatError(
                f"{folder / entry.file}: {entry.key} is {found.dtype} {list(found.shape)}, but {MARKER_NAME} says "
                f"{entry.dtype} {list(entry.shape)}"
            )
        tensors.append(Tensor(entry.kind, entry.name, view))
    return tensors


def check_share(tensors: Sequence[Tensor], index: int, count: int, threads: int) -> None:
    """
    Read share ``index`` of ``count`` of all bytes and compare the digests; CorruptionError names what is rotten.

    The shares of all together are the whole checkpoint, each tensor in one of them.
    """
    total = max(1, sum(tensor.nbytes for tensor in tensors))
    mine: list[View] = []
    begin = 0
    for tensor in tensors:
        if begin * count // total == index:
            mine.append(tensor.view)
        begin += tensor.nbytes
    check_sealed(mine, threads)


def manifest_of(folder: Path) -> Manifest:
    """Return what the marker says; FormatError where there is none."""
    source = FileSource(folder / MARKER_NAME)
    if not source.path.is_file():
        interrupted = (folder / JOURNAL).is_file()
        hint = "the conversion was interrupted, go on with --resume" if interrupted else "no universal checkpoint"
        raise FormatError(f"{source.path} is missing: {hint}")
    return Manifest.decode(read_bytes(source, 0, source.size), source.label)
