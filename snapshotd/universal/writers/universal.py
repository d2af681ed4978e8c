"""
Write a universal checkpoint: safetensors files by kind, sharded, the index of the model's, and the marker last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snapshotd.universal.format import INDEX_NAME, MARKER_NAME, SHARD_BYTES, Entry, Manifest, file_group
from snapshotd.universal.safetensors import encode_header
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import OutFile, Placed, Settings, Written, remove_journal, write_files

__all__ = ["key_of", "losses", "model_index", "plan_files", "write", "write_configs", "write_manifest", "write_whole"]


def losses(state: State) -> list[str]:
    """Return what the format can not hold of ``state``: nothing."""
    return []


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write ``state`` into the directory ``target``."""
    files, places = plan_files(state.tensors)
    written = write_files(target, files, settings, identity=identity)
    write_configs(state, target)
    write_manifest(state, target, [_entry(tensor, places[tensor.key], written) for tensor in state.tensors])
    remove_journal(target)


def write_manifest(state: State, target: Path, entries: list[Entry]) -> None:
    """Write the model's index and the marker, after all files: ``entries`` says where each tensor is."""
    model = [tensor for tensor in state.tensors if file_group(tensor.kind) == "model"]
    if model:
        files = {(entry.kind, entry.name): entry.file for entry in entries}
        write_whole(target / INDEX_NAME, model_index(model, files))
    manifest = Manifest(
        step=state.step,
        source={"format": state.format, **state.source},
        tensors=entries,
        tied=state.tied,
        frozen=state.frozen,
        param_groups=state.param_groups,
        extra=state.extra,
        warnings=state.warnings,
    )
    write_whole(target / MARKER_NAME, manifest.encode())


def plan_files(
    tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None, prefix: str = ""
) -> tuple[list[OutFile], dict[tuple[str, str], str]]:
    """
    Return the files that hold ``tensors``, and in which of them each is. ``metadata`` goes into their headers,
    ``prefix`` before their names.
    """
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(file_group(tensor.kind), []).append(tensor)
    files: list[OutFile] = []
    places: dict[tuple[str, str], str] = {}
    for group, members in groups.items():
        shards = _shards(members)
        for i, shard in enumerate(shards):
            name = f"{prefix}{group}.safetensors"
            if len(shards) > 1:
                name = f"{prefix}{group}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            files.append(_file(name, shard, metadata or {}))
            places.update((tensor.key, name) for tensor in shard)
    return files, places


def model_index(model: Sequence[Tensor], places: dict[tuple[str, str], str]) -> bytes:
    """Return ``model.safetensors.index.json`` as transformers wants it."""
    metadata = {
        "total_parameters": sum(tensor.view.numel for tensor in model if tensor.kind == "model"),
        "total_size": sum(tensor.nbytes for tensor in model),
    }
    weights = {tensor.name: places[tensor.key] for tensor in sorted(model, key=lambda tensor: tensor.name)}
    return json.dumps({"metadata": metadata, "weight_map": weights}, indent=2, ensure_ascii=False).encode() + b"\n"


def write_configs(state: State, target: Path) -> None:
    """Write what a Hugging Face source had beside its weights, so that transformers needs nothing else."""
    configs = state.extra.get("configs")
    for name, value in configs.items() if isinstance(configs, dict) else ():
        if name in ("config.json", "generation_config.json", "adapter_config.json"):
            write_whole(target / name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def key_of(tensor: Tensor) -> str:
    """Return the tensor's key in its file: its name, so that any tool finds it."""
    return tensor.name


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.parent / f".{path.name}.part"
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = []
    nbytes = 0
    for tensor in tensors:
        if not shards or (nbytes and nbytes + tensor.nbytes > SHARD_BYTES):
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
    return shards


def _file(name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> OutFile:
    # Largest items first, so that each tensor is aligned without holes, which safetensors forbids.
    ordered = sorted(tensors, key=lambda tensor: -tensor.view.itemsize)
    described = [(key_of(tensor), tensor.dtype, tensor.shape) for tensor in ordered]
    header, offsets, nbytes = encode_header(described, {"format": "pt", **metadata})
    placed = [Placed(key_of(tensor), tensor.view, offset) for tensor, offset in zip(ordered, offsets, strict=True)]
    return OutFile(name=name, nbytes=nbytes, blocks=[(0, header)], tensors=placed)


def _entry(tensor: Tensor, file: str, written: dict[str, dict[str, Written]]) -> Entry:
    key = key_of(tensor)
    digest = written[file][key].digest
    return Entry(
        kind=tensor.kind, name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, file=file, key=key, digest=digest
    )
