"""
``dcp.load`` from any checkpoint: each rank opens it, and reads just the boxes that its own tensors need.

Rule 1: the trainer's keys are answered whatever it calls its sections; see keys.py.
Rule 2: bytes go straight into the trainer's tensors where these are in host memory and have the stored dtype, else
through a bounded buffer, and torch casts. A float32 tensor gets the float32 master copy where the checkpoint has one.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import storage as torch_storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from snapshotd.universal import readers
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.storage.boxes import read_box, real_value
from snapshotd.universal.storage.keys import KeyLookup
from snapshotd.universal.views import View
from snapshotd.universal.writers.dcp import flat_items

__all__ = ["StorageReader"]

_THREADS: Final = 4


class StorageReader(torch_storage.StorageReader):
    """
    Reads the checkpoint at ``path``, of any format that snapshotd knows; ``format`` says which where that is not seen.

    FormatError and CorruptionError when it is broken, as everywhere; dcp.load's own errors when it does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], format: str = "auto") -> None:
        self.path = Path(path)
        self.format = format
        self._keys: KeyLookup | None = None

    @property
    def checkpoint_id(self) -> Path:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).exists()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self._keys = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        keys = self._open()
        described = _Described(keys)
        return Metadata(
            state_dict_metadata=described,
            planner_data=described.paths,
            storage_data={},
            storage_meta=StorageMeta(checkpoint_id=str(self.path)),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._open()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        keys = self._open()
        # Where the trainer's own keys have numbers for parameters, its groups list numbers too.
        numbered = any(_is_numbered(item.dest_index) for item in plan.items)
        tensors: list[tuple[ReadItem, Tensor | View, torch.Tensor]] = []
        for item in plan.items:
            found = keys.find(item.storage_index.fqn, numbered=numbered)
            if item.type == LoadItemType.BYTE_IO:
                buffer = io.BytesIO()
                torch.save(real_value(found.view if isinstance(found, Tensor) else found), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
            else:
                tensors.append((item, found, planner.resolve_tensor(item).detach()))
        with ThreadPoolExecutor(_THREADS, "snapshotd-dcp") as pool:
            for _ in pool.map(lambda job: _fill(keys, *job), tensors):
                pass
        for item, _, target in tensors:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self) -> KeyLookup:
        if self._keys is None:
            state: State = readers.read(self.path, self.format)
            state.check()
            self._keys = KeyLookup(state)
        return self._keys


class _Described(dict[str, Any]):
    """
    What the planner is told of each key: the keys that our own DCP writer would use are listed, any other that can be
    answered is found when it is asked for.
    """

    def __init__(self, keys: KeyLookup) -> None:
        super().__init__()
        self._lookup = keys
        self.paths: dict[str, Any] = {}
        for path, value in flat_items(keys.state):
            key = ".".join(map(str, path))
            self.paths[key] = path
            self[key] = _describe(value)

    def __missing__(self, key: str) -> Any:
        found = self._lookup.find(key)
        self[key] = _describe(found.view if isinstance(found, Tensor) else found)
        return self[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._lookup

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def _describe(value: Any) -> Any:
    if isinstance(value, View):
        size = torch.Size(value.shape)
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, value.dtype)),
            size=size,
            chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
        )
    return BytesStorageMetadata()


def _is_numbered(index: MetadataIndex) -> bool:
    parts = index.fqn.split(".")
    return any(part == "state" and after.isdigit() for part, after in zip(parts, parts[1:], strict=False))


def _fill(keys: KeyLookup, item: ReadItem, found: Tensor | View, target: torch.Tensor) -> None:
    """``found``: a View is a tensor inside plain values."""
    master = keys.master_of(found) if isinstance(found, Tensor) else None
    if master is not None and target.dtype == torch.float32 != getattr(torch, found.dtype):
        found = master
    view = found.view if isinstance(found, Tensor) else found
    read_box(view, tuple(item.storage_offsets), tuple(item.lengths), target)
