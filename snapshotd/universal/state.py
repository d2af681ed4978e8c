"""
The neutral state: what a checkpoint of any format holds, nothing of it read yet. THE SEAM of readers and writers.

A reader is one file in readers/ with two functions, and a line in the table of readers/__init__.py::

    def detect(path: Path) -> bool:        # cheap and sure: looks at names, and at first bytes where it must
    def read(path: Path) -> State:         # cheap: opens pickles and headers, reads no tensor's bytes

How to write one:

1. Open foreign files with ``torchzip.load(FileSource(path))`` (torch.save files; each tensor is a ``TensorRef``, its
   ``.view`` a lazy range of the file) or ``unpickle.unpickle(data, what=...)`` (a bare pickle). Objects of frameworks'
   classes are ``Record``s: ``.kind``, ``.args``, ``.get(field)``; names that are not known yet go into globals.py.
2. For each tensor of the undivided model make a view of its whole (views.py, derived.py):
   TP shards: ``concat([shard.view, ...], dim)`` or ``Joined(dtype, shape, [(offsets, view), ...])``;
   ZeRO 1/2: ``flat = concat([rank0.view, rank1.view, ...])``, then ``flat_part(flat, begin, shape)`` per parameter;
   a part of a fused matrix: ``Cut(view, at, shape)``; a replica: ``Merged(views, "equal", name)``; 16-bit weights that
   only exist as fp32 masters: ``Cast(view, "bfloat16")``. Padding is cut off with ``Cut`` or ``flat_part``.
   No arithmetic on bytes and no numpy is needed in a reader.
3. Return ``State(...)``. ``Tensor.kind`` is "model" (as the model holds it), "buffer", "fp32" (the master copy, only if
   there is one besides the weights), "rng" (name: the rank, then "/cuda:0" and such for others than torch's CPU
   generator), "extra" (a tensor inside ``extra``) or the optimizer state's own name ("exp_avg", "momentum_buffer",
   "step", ...), and ``Tensor.name`` the parameter's name in the undivided model. A step is a 0-d tensor per parameter:
   ``scalar(4, "int64")`` where the source has a Python int, else the dtype it has.
4. ``param_groups``: one dict per group, "names" (in the optimizer's order) and every hyperparameter as it was.
   ``tied``: alias to the name under which the tensor is. Only the latter is in ``tensors``. ``frozen``: names.
   ``extra``: everything else, put through ``plain.to_json``; nothing is dropped silently: what can't be kept is a line
   in ``warnings``.
5. Refuse with FormatError what is missing, broken or of an unknown version: which file, what was expected, what to do.
   Shapes and coverage need no check in the reader: ``State.check`` proves that each element is there exactly once.

A writer takes a State and a directory; see writers/__init__.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.format import steps_made
from snapshotd.universal.views import View, stored_bytes

__all__ = ["FIXED_KINDS", "State", "Tensor", "scalar", "tensors_of"]

FIXED_KINDS: Final = ("model", "buffer", "fp32", "rng", "extra")
"""Kinds that are no optimizer state."""

_KIND: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,63}\Z")
_PACK: Final = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i", "bool": "<?"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One whole tensor: its kind, its name in the undivided model, and the view that reads it."""

    kind: str
    name: str
    view: View

    @property
    def dtype(self) -> str:
        return self.view.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def nbytes(self) -> int:
        return self.view.nbytes

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name


@dataclass(slots=True, kw_only=True)
class State:
    """
    A checkpoint. ``tensors`` are in the source's own order, parameters as the model lists them where that is known.

    ``format`` is the reader's name, ``source`` says where it came from (JSON: versions, topology), ``step`` is as the
    source says it (see ``steps_made``), None where it does not. ``closer`` is for a source that keeps something
    open; may be called twice.
    """

    format: str
    tensors: list[Tensor]
    step: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    closer: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    def close(self) -> None:
        """Let go of what is held for this state: a running job's slots. Tensors can't be read any more after that."""
        if self.closer is not None:
            self.closer()

    @property
    def steps_made(self) -> int | None:
        """How many optimizer steps have been made."""
        return steps_made(self.step, self.format)

    def of_kind(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind by name."""
        return {tensor.name: tensor for tensor in self.tensors if tensor.kind == kind}

    @property
    def kinds(self) -> list[str]:
        """All kinds in the order of their first tensor."""
        return list(dict.fromkeys(tensor.kind for tensor in self.tensors))

    @property
    def optimizer_kinds(self) -> list[str]:
        """The names of the optimizer's states."""
        return [kind for kind in self.kinds if kind not in FIXED_KINDS]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def check(self) -> None:
        """
        Raise FormatError unless names are unique, every element is there exactly once, and names that are mentioned
        exist. Reads nothing.
        """
        seen: set[tuple[str, str]] = set()
        for tensor in self.tensors:
            if not _KIND.match(tensor.kind) or not tensor.name:
                raise FormatError(f"{tensor.kind!r:.80} / {tensor.name!r:.80} is no kind and name of a tensor")
            if not tensor.name.isprintable() and any("\ud800" <= char <= "\udfff" for char in tensor.name):
                raise FormatError(f"the {tensor.kind} {tensor.name!r:.80} has a name that is no Unicode text")
            if tensor.key in seen:
                raise FormatError(f"{tensor.kind} of {tensor.name} is there twice")
            seen.add(tensor.key)
            tensor.view.check(f"{tensor.kind} of {tensor.name}")
        names = {tensor.name for tensor in self.tensors if tensor.kind in ("model", "buffer", "fp32")}
        for alias, name in self.tied.items():
            if name not in names or name in self.tied:
                raise FormatError(f"{alias} is tied to {name}, which is not there")
        if names:
            _check_known("frozen", self.frozen, names, self.tied)
            for i, group in enumerate(self.param_groups):
                _check_known(f"parameter group {i}", group.get("names", []), names, self.tied)


def scalar(value: float, dtype: str) -> View:
    """Return a 0-d view of ``value``: float32, float64, int32, int64 or bool."""
    return stored_bytes(struct.pack(_PACK[dtype], value), dtype, ())


def tensors_of(state: State, kinds: Iterable[str]) -> Iterator[Tensor]:
    """Iterate over the tensors of some kinds, in the state's order."""
    wanted = set(kinds)
    return (tensor for tensor in state.tensors if tensor.kind in wanted)


def _check_known(what: str, listed: Iterable[str], names: set[str], tied: dict[str, str]) -> None:
    missing = [name for name in listed if name not in names and name not in tied]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FormatError(f"{what} names parameters that are not there: {', '.join(missing[:5])}{more}")
