"""
Where each tensor of a trainer's state dict will lie in the files of a universal checkpoint, before a byte is written.

What the tensors are is found by the rules for DCP's keys, with nothing but names, shapes and dtypes known. The values
(groups, and which weights are equal) may show later that two names are one weight: what may turn out so gets a file of
its own, which is then left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers.dcp_keys import Item, assemble
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import OutFile
from snapshotd.universal.writers.universal import plan_files

__all__ = ["FileLayout", "Place", "lay_out_files"]

_MAX_APART: Final = 64
"""Weights that get files of their own; a model has a few tied ones, not thousands."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of ``dtype`` and ``shape`` begins at byte ``offset`` of ``file``, where it is called ``key``."""

    file: str
    key: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The files with their headers, and the place of each tensor by the trainer's key."""

    files: list[OutFile]
    places: dict[str, Place]


def lay_out_files(items: Sequence[Item]) -> FileLayout:
    """Return the layout for ``items``, whose views are descriptions and whose values are not known."""
    keys = {id(item.view): item.key for item in items if item.view is not None}
    try:
        state = assemble(items, compare=False)
    except FormatError:  # numbers in place of names, which only the values can tell: the keys will do
        state = State(format="dcp", tensors=[])
    known = {id(tensor.view) for tensor in state.tensors}
    tensors = [tensor for tensor in state.tensors if id(tensor.view) in keys]
    tensors += [Tensor("extra", i.key, i.view) for i in items if i.view is not None and id(i.view) not in known]
    apart = _maybe_tied(state)
    alone = [tensor for tensor in tensors if tensor.kind == "model" and tensor.name in apart]
    groups = [([tensor for tensor in tensors if tensor not in alone], "")]
    groups += [([tensor], f"model.{i}.") for i, tensor in enumerate(alone)]
    files: list[OutFile] = []
    places: dict[str, Place] = {}
    for members, prefix in groups:
        made, _ = plan_files(members, prefix=prefix)
        files += made
        for file in made:
            for placed in file.tensors:
                view = placed.view
                places[keys[id(view)]] = Place(file.name, placed.key, placed.offset, view.dtype, view.shape)
    return FileLayout(files, places)


def _maybe_tied(state: State) -> set[str]:
    """Names of weights without optimizer state that have the dtype and shape of one that has: maybe its other name."""
    trained = {tensor.name for tensor in state.tensors if tensor.kind in state.optimizer_kinds}
    weights = state.of_kind("model")
    shapes = {(t.dtype, t.shape) for name, t in weights.items() if name in trained}
    found = [name for name, t in weights.items() if trained and name not in trained and (t.dtype, t.shape) in shapes]
    return set(found) if len(found) <= _MAX_APART else set()
