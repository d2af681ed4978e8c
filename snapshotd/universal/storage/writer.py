"""
``dcp.save`` into a universal checkpoint, from any number of ranks: each writes its chunks where they lie in the whole.

The coordinator lays out the files when it sees all plans, and makes them with their headers, under temporary names.
The ranks write their chunks into them. When all have done so, the coordinator reads the values that came with the
results, finds out what is what (readers/dcp_keys.py: the same rules as for a DCP checkpoint), digests the tensors,
gives the files their names, and writes the marker last. All ranks must see the same directory, as with torch's writer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import storage as torch_storage
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.futures import Future

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.universal.format import Entry
from snapshotd.universal.readers.dcp_keys import Item, assemble
from snapshotd.universal.sources import BytesSource, FileSource
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.storage.boxes import bytes_of
from snapshotd.universal.storage.layout import FileLayout, Place, lay_out_files
from snapshotd.universal.stream import OutFile, Settings, digest_of, write_files
from snapshotd.universal.torchzip import load_part
from snapshotd.universal.views import Described, Stored
from snapshotd.universal.writers.universal import plan_files, write_manifest

__all__ = ["StorageWriter"]

_THREADS: Final = 4
_SLAB_BYTES: Final = 8 << 20


class StorageWriter(torch_storage.StorageWriter):
    """
    Writes a universal checkpoint into the directory ``path``, which must be new or empty.

    ``sync_files``: fsync each file before the marker is written, as torch's own writer does by default.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync_files: bool = True) -> None:
        self.path = Path(path)
        self.sync_files = sync_files
        self._layout: FileLayout | None = None

    @property
    def checkpoint_id(self) -> Path:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self._layout = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "a universal checkpoint is one whole of all ranks: leave out use_collectives=False, or save with "
                "torch's FileSystemWriter and convert"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        items = {item.index.fqn: item for plan in plans for item in plan.items}
        paths: dict[str, Any] = {}
        for plan in plans:
            paths.update(plan.planner_data or {})
        self._layout = lay_out_files([_described(item, paths.get(key)) for key, item in items.items()])
        self._make(self._layout.files)
        places = self._layout.places
        return [
            replace(plan, storage_data={item.index.fqn: places.get(item.index.fqn) for item in plan.items})
            for plan in plans
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[torch_storage.WriteResult]]:
        with ThreadPoolExecutor(_THREADS, "snapshotd-dcp") as pool:
            results = list(pool.map(lambda item: self._write_item(plan, planner, item), plan.items))
        if self.sync_files:
            for name in {place.file for place in plan.storage_data.values() if place is not None}:
                _sync(self.path / _part(name))
        done: Future[list[torch_storage.WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[torch_storage.WriteResult]]) -> None:
        layout = self._layout
        assert layout is not None, "finish is called where prepare_global_plan was"
        values = {result.index.fqn: result.storage_data for ranks in results for result in ranks}
        views = {
            key: Stored(FileSource(self.path / _part(place.file)), place.offset, place.dtype, place.shape)
            for key, place in layout.places.items()
        }
        state = assemble(list(_items(metadata, views, values)))
        state.source["writer"] = f"torch {torch.__version__}, torch.distributed.checkpoint"
        state.check()
        entries = self._entries(state, layout, {id(view): key for key, view in views.items()})
        used = {entry.file for entry in entries}
        for file in layout.files:
            if file.name in used:
                os.rename(self.path / _part(file.name), self.path / file.name)
            else:  # held the other name of a tied weight, and nothing else
                os.unlink(self.path / _part(file.name))
        write_manifest(state, self.path, entries)
        metadata.storage_data = {}

    def _make(self, files: Sequence[OutFile]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if there := sorted(entry.name for entry in self.path.iterdir() if not entry.name.endswith(".part")):
            raise UsageError(f"{self.path} is not empty (it has {there[0]}): save into a new directory")
        for file in files:
            with open(self.path / _part(file.name), "wb") as out:
                for offset, data in file.blocks:
                    out.seek(offset)
                    out.write(data)
                out.truncate(file.nbytes)

    def _write_item(self, plan: SavePlan, planner: SavePlanner, item: WriteItem) -> torch_storage.WriteResult:
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            raw = data.getvalue() if hasattr(data, "getvalue") else b""
            return torch_storage.WriteResult(index=item.index, size_in_bytes=len(raw), storage_data=raw)
        place: Place = plan.storage_data[item.index.fqn]
        assert isinstance(data, torch.Tensor)
        assert item.tensor_data is not None
        at = tuple(item.tensor_data.chunk.offsets)
        nbytes = _write_chunk(self.path / _part(place.file), place, at, tuple(data.shape), bytes_of(data))
        return torch_storage.WriteResult(index=item.index, size_in_bytes=nbytes, storage_data=None)

    def _entries(self, state: State, layout: FileLayout, keys: dict[int, str]) -> list[Entry]:
        """Digest all tensors; what came with the values (steps that are ints, arrays) goes into files of its own."""
        small = [tensor for tensor in state.tensors if id(tensor.view) not in keys]
        files, places = plan_files(small, prefix="values.")
        written = write_files(self.path, files, Settings(), identity="values", journal=".values.jsonl")
        (self.path / ".values.jsonl").unlink(missing_ok=True)

        def entry(tensor: Tensor) -> Entry:
            key = keys.get(id(tensor.view))
            if key is None:
                name = places[tensor.key]
                return _entry(tensor, name, tensor.name, written[name][tensor.name].digest)
            place = layout.places[key]
            return _entry(tensor, place.file, place.key, digest_of(tensor.view))

        with ThreadPoolExecutor(_THREADS, "snapshotd-digest") as pool:
            return list(pool.map(entry, state.tensors))


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes ``[begin, begin + nbytes)`` of a chunk go to byte ``offset`` of the file."""

    begin: int
    nbytes: int
    offset: int


def _write_chunk(path: Path, place: Place, at: tuple[int, ...], lengths: tuple[int, ...], data: memoryview) -> int:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for run in _runs(place, at, lengths, data.nbytes):
                rest, offset = data[run.begin : run.begin + run.nbytes], run.offset
                while rest.nbytes:
                    count = os.pwrite(fd, rest[:_SLAB_BYTES], offset)
                    rest, offset = rest[count:], offset + count
        finally:
            os.close(fd)
    except OSError as error:
        raise CorruptionError(
            f"{path} cannot be written: {error.strerror}. Do all ranks see the same directory, and is there room?"
        ) from error
    return data.nbytes


def _runs(place: Place, at: tuple[int, ...], lengths: tuple[int, ...], nbytes: int) -> Iterator[_Run]:
    """The pieces of a chunk that are contiguous in the whole tensor too."""
    if not nbytes:
        return
    itemsize = nbytes // prod(lengths)
    strides = [itemsize * prod(place.shape[d + 1 :]) for d in range(len(lengths))]
    # The dimensions behind d are taken whole, so d and what is behind it is one run.
    d = len(lengths)
    while d > 0 and (d == len(lengths) or lengths[d] == place.shape[d]):
        d -= 1
    size = itemsize * prod(lengths[d:])
    begin = 0
    for outer in product(*(range(n) for n in lengths[:d])):
        index = (*(a + i for a, i in zip(at, outer, strict=False)), *at[d:])
        yield _Run(begin, size, place.offset + sum(i * s for i, s in zip(index, strides, strict=True)))
        begin += size


def _described(item: WriteItem, path: Any) -> Item:
    """An item of a plan as the reader sees one; a tensor is its description alone."""
    if item.tensor_data is None:
        return Item(key=item.index.fqn, path=path)
    data = item.tensor_data
    view = Described(str(data.properties.dtype).removeprefix("torch."), data.size)
    return Item(key=item.index.fqn, path=path, view=view, sharded=tuple(data.chunk.sizes) != tuple(data.size))


def _items(metadata: Metadata, views: dict[str, Stored], values: dict[str, Any]) -> Iterator[Item]:
    paths, all_described = metadata.planner_data or {}, metadata.state_dict_metadata
    # The planner's mapping has the trainer's own order.
    for key in dict.fromkeys([*(key for key in paths if key in all_described), *all_described]):
        described = all_described[key]
        if isinstance(described, TensorStorageMetadata):
            yield Item(key=key, path=paths.get(key), view=views[key], sharded=len(described.chunks) > 1)
        else:
            raw = values.get(key)
            source = BytesSource(raw if isinstance(raw, bytes) else b"", f"the value of {key}")
            yield Item(key=key, path=paths.get(key), value=load_part(source, 0, source.size))


def _entry(tensor: Tensor, file: str, key: str, digest: str) -> Entry:
    return Entry(
        kind=tensor.kind, name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, file=file, key=key, digest=digest
    )


def _part(name: str) -> str:
    return f".{name}.part"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
