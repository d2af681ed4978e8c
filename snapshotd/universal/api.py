"""
``snapshotd.universal.open(path)``: any checkpoint as names, shapes and lazy slices.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np

from snapshotd.errors import UsageError
from snapshotd.universal import readers
from snapshotd.universal.places import Job, place_of
from snapshotd.universal.rules import Rules, load_rules
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.words import Words, to_float, word_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LazyTensor", "open"]

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class LazyTensor:
    """
    One tensor of a checkpoint. ``t[2:4, :8]`` reads just that and gives a numpy array; ``t.torch(...)`` a torch tensor.

    Indexes are ints and slices of step 1. numpy has no bfloat16 and no float8: there ``t[...]`` gives the raw words
    (uint16, uint8); ``t.torch()`` gives the real thing.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def kind(self) -> str:
        return self._tensor.kind

    @property
    def name(self) -> str:
        return self._tensor.name

    @property
    def dtype(self) -> str:
        """torch's name without ``torch.``."""
        return self._tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def __getitem__(self, index: Index) -> np.ndarray[Any, np.dtype[Any]]:
        words = self._read(index)
        if self.dtype == "bfloat16" or self.dtype.startswith(("float8", "float4", "complex32")):
            return words
        return to_float(words, self.dtype).reshape(words.shape)

    def torch(self, index: Index = ...) -> torch.Tensor:
        """Return the tensor, or a part of it, as torch has it."""
        import torch

        words = self._read(index)
        plain: torch.Tensor = torch.from_numpy(np.ascontiguousarray(words).reshape(-1).view(np.uint8))
        return plain.view(getattr(torch, self.dtype)).reshape(words.shape)

    def __repr__(self) -> str:
        return f"LazyTensor({self.kind} {self.name}: {self.dtype} {list(self.shape)})"

    def _read(self, index: Index) -> Words:
        begins, lengths, dropped = _box(index, self.shape)
        out = np.empty(lengths, dtype=word_dtype(self.dtype))
        self._tensor.view.read_into(begins, out)
        return out.reshape([n for d, n in enumerate(lengths) if d not in dropped])


class Checkpoint:
    """
    A checkpoint that is open for reading; nothing of its tensors has been read.

    A context manager, for snapshots of running jobs. ``state`` is all that is known of it: groups, tied and frozen
    names, extra, warnings; see state.py.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._tensors = {tensor.key: tensor for tensor in state.tensors}

    def close(self) -> None:
        """Let go of a running job's slots, which it gets back; nothing is to be done for checkpoints in files."""
        self.state.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def step(self) -> int | None:
        return self.state.step

    @property
    def kinds(self) -> list[str]:
        return self.state.kinds

    def names(self, kind: str = "model") -> list[str]:
        """Return the names of the tensors of one kind."""
        return list(self.state.of_kind(kind))

    def tensor(self, name: str, kind: str = "model") -> LazyTensor:
        """Return a tensor; tied names are followed. UsageError when there is none."""
        found = self._tensors.get((kind, name)) or self._tensors.get((kind, self.state.tied.get(name, "")))
        if found is None:
            raise UsageError(f"there is no {kind} of {name!r:.200}")
        return LazyTensor(found)

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[LazyTensor]:
        return map(LazyTensor, self.state.tensors)

    def __len__(self) -> int:
        return len(self.state.tensors)


def open(path: str | os.PathLike[str] | Job, format: str = "auto", rules: Rules | str | None = None) -> Checkpoint:
    """
    Open the checkpoint at ``path``, of any format that can be read; FormatError when it is broken.

    ``job:NAME`` and ``job:NAME@STEP`` are snapshots in a running job's memory, which keeps them until the checkpoint is
    closed, or gone. The coordinator is found as tools find it; ``Job`` takes other settings.

    ``rules`` (a file, a preset, or what ``load_rules`` gives): for ranks' files that do not say how they make a whole.
    """
    state = readers.read(place_of(path), format, load_rules(rules) if isinstance(rules, str) else rules)
    state.check()
    return Checkpoint(state)


def _box(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], set[int]]:
    """Return (offsets, lengths, dimensions that an int takes away)."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts.count(...) > 1:
        raise UsageError("one '...' is enough")
    if ... in parts:
        at = parts.index(...)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    if len(parts) != len(shape):
        raise UsageError(f"{len(parts)} indexes for {len(shape)} dimensions")
    begins: list[int] = []
    lengths: list[int] = []
    dropped: set[int] = set()
    for d, (part, size) in enumerate(zip(parts, shape, strict=True)):
        if isinstance(part, slice):
            begin, end, step = part.indices(size)
            if step != 1:
                raise UsageError("slices have a step of 1 here")
            begins.append(begin)
            lengths.append(max(0, end - begin))
        else:
            number = _number(part)
            begin = number + size if number < 0 else number
            if not 0 <= begin < size:
                raise IndexError(f"index {part} is out of range for dimension {d} of size {size}")
            begins.append(begin)
            lengths.append(1)
            dropped.add(d)
    return tuple(begins), tuple(lengths), dropped


def _number(part: object) -> int:
    try:
        return operator.index(part)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"an index is an int, a slice or '...', not {part!r:.80}") from None
