"""
Read checkpoints of torch.distributed.checkpoint: of FSDP1/2, HSDP, TP and any mesh, by whichever trainer.

The chunks say where they lie in the global tensors: nothing about meshes is needed, and nothing is guessed. Keys are
whatever the trainer chose; dcp_keys.py finds model, optimizer and the rest in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.layout.header import decode_json
from snapshotd.universal.derived import Deferred
from snapshotd.universal.readers.companions import put_companions
from snapshotd.universal.readers.conventions import step_of_name
from snapshotd.universal.readers.dcp_keys import Item, assemble
from snapshotd.universal.safetensors import read_header
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.standins import Record
from snapshotd.universal.state import State
from snapshotd.universal.torchzip import load_part, tensor_of_part
from snapshotd.universal.unpickle import unpickle
from snapshotd.universal.views import Joined, View, stored_bytes

__all__ = ["detect", "items_of", "load_metadata", "read"]

METADATA_NAME: Final = ".metadata"
VERSIONS: Final = (None, "1.0.0")
_RANK_METADATA: Final = re.compile(r"__([0-9]+)\.metadata\Z")
_FURTHER: Final = re.compile(r"(?:(?:pytorch_)?model_fsdp|optimizer)_[1-9][0-9]*\Z")
_SHARDING_INFO: Final = "DCP_SHARDING_INFO"


def detect(path: Path) -> bool:
    """A folder with ``.metadata`` or ``__R.metadata``, accelerate's two folders, or the HF storage's shards."""
    if not path.is_dir():
        return path.name == METADATA_NAME and path.is_file()
    if any(_metadata_files(path)) or any(path.glob("__*_*.distcp")):
        return True
    return bool(_accelerate_folders(path)) or _is_hf_storage(path)


def read(path: Path) -> State:
    """Return the state at ``path``."""
    if path.name == METADATA_NAME:
        path = path.parent
    if _is_hf_storage(path) and not any(_metadata_files(path)):
        items, source = _hf_items(path), {"storage": "safetensors"}
    else:
        items, source = [], {}
        for folder in _accelerate_folders(path) or [path]:
            metadata = load_metadata(folder)
            source = {"version": metadata["version"] or "none"}
            items += _apart(folder, items_of(folder, metadata))
    state = assemble(items)
    state.source.update(source)
    put_companions(state, path)
    if state.step is None:
        state.step = step_of_name(path.name)
    return state


def _apart(folder: Path, items: list[Item]) -> list[Item]:
    """accelerate gives further models and optimizers the keys of the first: the folder's name tells them apart."""
    match = _FURTHER.match(folder.name)
    if match is None:
        return items
    return [
        replace(item, key=f"{folder.name}.{item.key}", path=(folder.name, *(item.path or (item.key,))))
        for item in items
    ]


def load_metadata(folder: Path) -> dict[str, Any]:
    """
    Return what ``.metadata`` says: ``items`` (flat key to Record), ``storage`` (flat key to a list of (offset or None,
    Record)), ``paths`` (flat key to path, None in old versions), ``version``.
    """
    files = list(_metadata_files(folder))
    if not files:
        have = len(list(folder.glob("__*_*.distcp")))
        raise FormatError(
            f"{folder / METADATA_NAME} is missing: the checkpoint was not finished ({have} .distcp files are there, "
            "but what they hold stands in .metadata, which is written last). Take an older checkpoint"
        )
    result: dict[str, Any] = {"items": {}, "storage": {}, "paths": {}, "version": None, "order": []}
    for file in files:
        source = FileSource(file)
        found = unpickle(read_bytes(source, 0, source.size), what=str(file))
        if not isinstance(found, Record) or found.kind != "Metadata":
            raise FormatError(f"{file} is not the metadata of a DCP checkpoint")
        _merge(result, found, file)
    return result


def items_of(folder: Path, metadata: Mapping[str, Any]) -> list[Item]:
    """Return the items of a folder, in the order of the trainer's own state dict where that is known."""
    files: dict[str, FileSource] = {}
    items: list[Item] = []
    storage: Mapping[str, list[tuple[Any, Record]]] = metadata["storage"]
    for key in metadata["order"]:
        described = metadata["items"][key]
        stored = storage.get(key, [])
        path = metadata["paths"].get(key)
        if described.kind == "BytesStorageMetadata":
            items.append(Item(key=key, path=path, value=_object(folder, key, stored, files)))
        elif described.kind == "TensorStorageMetadata":
            view, sharded = _tensor(folder, key, described, stored, files)
            items.append(Item(key=key, path=path, view=view, sharded=sharded))
        else:
            raise FormatError(f"{folder / METADATA_NAME}: {key} is a {described.kind}, which is not known")
    return items


def _metadata_files(folder: Path) -> Iterator[Path]:
    if (folder / METADATA_NAME).is_file():
        yield folder / METADATA_NAME
        return
    ranks = {int(match.group(1)): entry for entry in folder.iterdir() if (match := _RANK_METADATA.match(entry.name))}
    for rank in sorted(ranks):
        yield ranks[rank]


def _accelerate_folders(path: Path) -> list[Path]:
    """accelerate writes the model and the optimizer as two checkpoints, side by side."""
    names = ("pytorch_model_fsdp_*", "optimizer_*", "model_fsdp_*")
    folders = [entry for name in names for entry in sorted(path.glob(name)) if (entry / METADATA_NAME).is_file()]
    return folders if any("model" in entry.name for entry in folders) else []


def _merge(result: dict[str, Any], found: Record, file: Path) -> None:
    version = found.get("version")
    if version not in VERSIONS:
        raise FormatError(f"{file} has version {version!r:.40}; this program reads 1.0.0: update snapshotd")
    items, storage, paths = found.get("state_dict_metadata"), found.get("storage_data"), found.get("planner_data")
    if not isinstance(items, dict) or not isinstance(storage, dict):
        raise FormatError(f"{file} lacks state_dict_metadata or storage_data: not written by torch's FileSystemWriter")
    result["version"] = version
    for key, value in items.items():
        if not isinstance(key, str) or not isinstance(value, Record):
            raise FormatError(f"{file}: the entry {key!r:.80} makes no sense")
        known = result["items"].get(key)
        if known is None:
            result["items"][key] = value
        elif isinstance(known.get("chunks"), list) and isinstance(value.get("chunks"), list):
            there = {tuple(chunk.get("offsets")) for chunk in known.get("chunks")}
            known.get("chunks").extend(c for c in value.get("chunks") if tuple(c.get("offsets")) not in there)
    for index, info in storage.items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise FormatError(f"{file}: storage_data makes no sense")
        result["storage"].setdefault(index.get("fqn"), []).append((index.get("offset"), info))
    if isinstance(paths, dict):
        result["paths"].update(paths)
    # The planner's mapping has the order of a whole rank; the list of items is shuffled by the removal of duplicates.
    order = [key for key in (paths or {}) if key in items]
    result["order"] = list(dict.fromkeys([*result["order"], *order, *items]))


def _file_of(folder: Path, key: str, info: Record, files: dict[str, FileSource]) -> tuple[FileSource, int, int]:
    name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise FormatError(f"{folder / METADATA_NAME}: the place of {key} makes no sense")
    if info.get("transform_descriptors"):
        raise FormatError(
            f"{folder / name}: {key} was written through {info.get('transform_descriptors')!r:.80}, which is not read "
            "here; save without stream extensions"
        )
    source = files.get(name)
    if source is None:
        if name.startswith("/") or ".." in Path(name).parts:
            raise FormatError(f"{folder / METADATA_NAME}: {name!r:.100} is not a file inside the checkpoint")
        source = files[name] = FileSource(folder / name)
        if not source.path.is_file():
            raise FormatError(f"{source.path} is missing; it should hold {key} and more. Copy it again from the source")
    if offset + length > source.size:
        raise FormatError(
            f"{source.path} has {source.size} bytes, but {key} should be at [{offset}, {offset + length}): it was cut "
            "short; copy it again, or take an older checkpoint"
        )
    return source, offset, length


def _object(folder: Path, key: str, stored: list[tuple[Any, Record]], files: dict[str, FileSource]) -> Any:
    if not stored:
        raise FormatError(f"{folder / METADATA_NAME}: {key} is listed, but is in no file")
    source, offset, length = _file_of(folder, key, stored[0][1], files)
    return load_part(source, offset, length)


def _tensor(
    folder: Path, key: str, described: Record, stored: list[tuple[Any, Record]], files: dict[str, FileSource]
) -> tuple[View, bool]:
    dtype, shape, chunks = _describe(folder, key, described)
    places = {tuple(offset) if offset is not None else (): info for offset, info in stored}
    parts: list[tuple[tuple[int, ...], View]] = []
    for chunk in chunks:
        at, lengths = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if 0 in lengths:
            continue
        info = places.get(at)
        if info is None:
            raise FormatError(f"{folder / METADATA_NAME}: the chunk of {key} at {list(at)} is in no file")
        parts.append((at, _chunk(*_file_of(folder, key, info, files), dtype, lengths)))
    if not parts and 0 in shape:
        return stored_bytes(b"", dtype, shape, str(folder)), len(chunks) > 1
    if len(parts) == 1 and parts[0][1].shape == shape:
        return parts[0][1], len(chunks) > 1
    return Joined(dtype, shape, parts), True


def _chunk(source: FileSource, offset: int, length: int, dtype: str, lengths: tuple[int, ...]) -> View:
    return Deferred(dtype, lengths, lambda: tensor_of_part(source, offset, length), source.label)


def _describe(folder: Path, key: str, described: Record) -> tuple[str, tuple[int, ...], list[Record]]:
    properties, shape, chunks = described.get("properties"), described.get("size"), described.get("chunks")
    dtype = properties.get("dtype") if isinstance(properties, Record) else None
    if dtype is None and isinstance(properties, Record) and isinstance(properties.state, tuple) and properties.state:
        dtype = properties.state[0]  # TensorProperties pickles itself as a tuple
    if not isinstance(dtype, str) or not isinstance(shape, tuple) or not isinstance(chunks, list):
        raise FormatError(f"{folder / METADATA_NAME}: the description of {key} makes no sense")
    return str(dtype), shape, chunks


def _is_hf_storage(path: Path) -> bool:
    for entry in sorted(path.glob("*.safetensors"))[:1]:
        try:
            return _SHARDING_INFO in read_header(FileSource(entry))[1]
        except FormatError:
            return False
    return False


def _hf_items(path: Path) -> list[Item]:
    """HuggingFaceStorageWriter: each rank's shards with their offsets; the global shape is what they reach."""
    parts: dict[str, list[tuple[tuple[int, ...], View]]] = {}
    for entry in sorted(path.glob("*.safetensors")):
        tensors, metadata = read_header(FileSource(entry))
        if _SHARDING_INFO not in metadata:
            raise FormatError(f"{entry} has no {_SHARDING_INFO}, the others here have: it is of another checkpoint")
        info = decode_json(metadata[_SHARDING_INFO], f"{_SHARDING_INFO} of {entry}")
        for key, view in tensors.items():
            saved = info.get(key)
            offsets = saved.get("saved_offsets") if isinstance(saved, dict) else None
            if not isinstance(offsets, list) or len(offsets) != len(view.shape):
                raise FormatError(f"{entry}: {key} has no offsets: {json.dumps(saved)[:100]}")
            parts.setdefault(key, []).append((tuple(offsets), view))
    _check_hf_files(path)
    items: list[Item] = []
    for key, pieces in parts.items():
        ends = [[o + n for o, n in zip(at, view.shape, strict=True)] for at, view in pieces]
        shape = [max(sizes) for sizes in zip(*ends, strict=True)]
        joined = Joined(pieces[0][1].dtype, shape, pieces)
        items.append(Item(key=key, path=(key,), view=joined, sharded=len(pieces) > 1))
    return items


def _check_hf_files(path: Path) -> None:
    """The names say how many files each rank has: ``shard-00001-model-00001-of-00002``."""
    seen: dict[int, dict[int, set[int]]] = {}
    for entry in path.glob("shard-*.safetensors"):
        match = re.match(r"shard-([0-9]+)-model-([0-9]+)-of-([0-9]+)\.safetensors\Z", entry.name)
        if match:
            rank, number, count = map(int, match.groups())
            seen.setdefault(rank, {}).setdefault(count, set()).add(number)
    for rank in range(1, max(seen, default=0) + 1):
        if rank not in seen:
            raise FormatError(f"{path}: the files of shard {rank} are missing, those of shard {max(seen)} are there")
        for count, numbers in seen[rank].items():
            if lost := set(range(1, count + 1)) - numbers:
                raise FormatError(f"{path}: shard {rank} lacks file {min(lost)} of {count}")
