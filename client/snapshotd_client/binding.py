"""
The live tensors behind a plan: what the copy thread reads, and what tells whether it changed under it.

Rule 1: ``bind`` is called for each capture, after the fence of the one before. Where nothing is another object or lies
elsewhere, no line of Python runs per tensor (``Held``'s rule), and as soon as they stay where they are, none is asked
where that is, nor of what shape: a ``Sight`` of them holds.
Rule 2: a view keeps the memory that it shows, so memory at the same address is the same memory.
Rule 3: only what is another object, or elsewhere, is looked at again: some optimizers replace a tensor in each step.
Rule 4: what ``bind`` can only find out slowly without one (the same memory under another shape) is found by ``moved``,
behind the copy and off the training thread. Then this step is not kept, and the next ``bind`` looks at everything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from snapshotd_client.arrays import Array, carrier_dtype, version_of, view_of
from snapshotd_client.dtensors import is_dtensor, local_of
from snapshotd_client.leaves import Leaf
from snapshotd_client.plan import Plan
from snapshotd_client.sight import Sight

__all__ = ["Binding"]

_NOTHING: Final[torch.Tensor] = torch.empty(0, device="cpu")
_NOWHERE: Final = -1
_AT_ONCE: Final = 250
"""Tensors of one ``Sight``, and that ``moved`` looks at before it lets the training thread go on: some 0.1 ms."""

_RESTLESS_FOR: Final = 3
"""So many captures a tensor is let go of behind each of them, after one that has found it elsewhere."""

_pointer_of: Final = torch.Tensor.data_ptr
_shape_of: Final = torch.Tensor.size
_strides_of: Final = torch.Tensor.stride


class Binding:
    """
    Which tensor lies behind which part of a plan now.

    Attributes:
        sources: for each part of the plan a view of host memory, or a tensor on an accelerator.
        copies: what was made of ``sources``, by the slot that it is for; emptied whenever one of them is another.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self.sources: list[Array | torch.Tensor] = [_NOTHING] * len(plan.parts)
        self._parts_of: list[list[int]] = [[] for _ in plan.planned]
        for number, part in enumerate(plan.parts):
            self._parts_of[part.index].append(number)
        self._names = [item.name for item in plan.planned]
        self._num_lasting = sum(not item.sync for item in plan.planned)
        self._scratch: list[torch.Tensor] = []
        self._lasting: Sequence[Leaf | None] | None = None  # None: forgotten
        self._locals: list[torch.Tensor] = []
        self._sharded: dict[int, torch.Tensor] = {}
        self._pointers: list[int] = []
        self._shapes: list[object] = [None] * self._num_lasting
        self._strides: list[object] = [None] * self._num_lasting
        self._batches: list[slice] = []
        self._sights: list[Sight | None] = []  # of each batch
        self._blind: set[int] = set()  # batches of which there is none to be had
        self._restless: dict[int, int] = {}  # tensors that leave their memory, and for how many captures more
        self._left: dict[int, int] = {}  # where they lay when they were let go of
        self._versions: list[Array] = []

    def bind(self, lasting: list[Leaf], sync: Sequence[Leaf]) -> bool:
        """
        Take the leaves of this step, in the plan's order, and clone the ``sync`` ones, which may change.

        False when their names, shapes or types are not the plan's: then a new plan is needed.
        """
        if not self.follow(lasting) or not self._clone(sync):
            return False
        self._versions = self._look_at_versions()
        return True

    def follow(self, lasting: list[Leaf]) -> bool:
        """Look where the tensors of these leaves lie now; False where one is not what the plan says."""
        if lasting is not self._lasting and not self._take(lasting):
            return False
        changed: list[int] = []
        for number, part in enumerate(self._batches):
            sight = self._sights[number]
            if sight is not None and sight.holds():
                continue
            others = self._others(part, number in self._blind)
            if others:
                self._sights[number] = None
                self._blind.discard(number)
                changed += others
            elif sight is not None or number not in self._blind:
                self._sights[number] = self._see(number, part)
        if not changed:
            return True
        self.copies.clear()
        for index in changed:
            if not self._look(index, self._locals[index]):
                self._lasting = None
                return False
        return True

    def moved(self) -> list[str]:
        """Return the names of the tensors that are not what they were at ``bind``: changed in place, or reshaped."""
        moved: list[str] = []
        for number, part in enumerate(self._batches):
            tensors, names = self._locals[part], self._names[part]
            changed = _versions(tensors) != self._versions[number]
            if changed.any():
                moved += [names[index] for index in np.flatnonzero(changed)]
            if self._sights[number] is None and (reshaped := self._reshaped(part)):
                self._lasting = None
                moved += [self._names[index] for index in reshaped]
            time.sleep(0)
        return moved

    def let_go(self, gone: Sequence[Leaf]) -> None:
        """
        Let go of the tensors of ``gone``, and of memory that parameters leave with each update: it would stay alive
        beside the new. The next ``bind`` finds them again.
        """
        places = [index for index in self._restless if self._pointers[index] != _NOWHERE]
        if gone and self._lasting is not None:
            known = set(map(id, gone))
            leaves = [None if id(leaf) in known else leaf for leaf in self._lasting]
            places += [index for index, leaf in enumerate(leaves) if leaf is None]
            self._lasting = leaves
        if places:
            self.copies.clear()
        for index in places:
            if self._lasting is None or self._lasting[index] is None:
                self._sharded.pop(index, None)
                self._locals[index] = _NOTHING
            elif index in self._sharded:
                self._locals[index] = _NOTHING  # its local part is another tensor each time
            self._left[index], self._pointers[index] = self._pointers[index], _NOWHERE
            self._sights[index // _AT_ONCE] = None
            for number in self._parts_of[index]:
                self.sources[number] = _NOTHING

    def reads(self, begin: int, end: int) -> bool:
        """Whether a tensor lay between these addresses of host memory when it was looked at last."""
        return any(begin <= pointer < end for pointer in self._pointers)

    def replicated(self) -> list[torch.Tensor]:
        """Return the local parts of all replicated tensors of the main group."""
        tensors = [*self._locals, *self._scratch]
        return [tensors[index] for index in self.plan.replicated]

    def _take(self, lasting: list[Leaf]) -> bool:
        """Other leaves than before: by their objects, or because there was a doubt."""
        if [leaf.name for leaf in lasting] != self._names[: self._num_lasting]:
            return False
        known, self._lasting = self._lasting, lasting
        if known is None:
            self._locals = [local_of(leaf.tensor) for leaf in lasting]
            self._sharded = {index: leaf.tensor for index, leaf in enumerate(lasting) if is_dtensor(leaf.tensor)}
            self._pointers = [_NOWHERE] * len(lasting)
            self._batches = [slice(begin, begin + _AT_ONCE) for begin in range(0, len(lasting), _AT_ONCE)]
            self._sights, self._blind = [None] * len(self._batches), set()
            return True
        for index, (leaf, before) in enumerate(zip(lasting, known, strict=True)):
            if leaf is not before and (before is None or leaf.tensor is not before.tensor):
                self._locals[index], self._pointers[index] = local_of(leaf.tensor), _NOWHERE
                self._restless.pop(index, None)
                self._sharded.pop(index, None)
                if is_dtensor(leaf.tensor):
                    self._sharded[index] = leaf.tensor
                self._sights[index // _AT_ONCE] = None
        return True

    def _others(self, part: slice, is_blind: bool) -> list[int]:
        """
        Return which tensors are others, lie elsewhere or are of another shape than when they were looked at last.

        Where nothing but torch tells (``is_blind``), they are not asked for their shapes in each step: see ``moved``.
        """
        for index in self._sharded.keys() & range(*part.indices(len(self._locals))) if self._sharded else ():
            local = local_of(self._sharded[index])  # that of a DTensor can be another tensor at any time
            if local is not self._locals[index]:
                self._note(index, _NOWHERE)
                self._locals[index], self._pointers[index] = local, _NOWHERE
        pointers = list(map(_pointer_of, self._locals[part]))
        if pointers == self._pointers[part]:
            return [] if is_blind else self._reshaped(part)
        looks = zip(pointers, self._pointers[part], strict=True)
        others = {index for index, (a, b) in enumerate(looks, part.start) if a != b}
        for index in others:
            self._note(index, pointers[index - part.start])
        self._pointers[part] = pointers
        return sorted(others.union(self._reshaped(part)))

    def _note(self, index: int, pointer: int) -> None:
        """Remember which tensors have other memory at one capture than at the one before, until they stay for some."""
        if self._pointers[index] != _NOWHERE:
            self._restless[index] = _RESTLESS_FOR
        elif index in self._restless and pointer != _NOWHERE:
            self._restless[index] = self._restless[index] - 1 if pointer == self._left.get(index) else _RESTLESS_FOR
            if not self._restless[index]:
                del self._restless[index]

    def _reshaped(self, part: slice) -> list[int]:
        """Return which tensors have another shape, or other strides, than they had when they were looked at last."""
        tensors = self._locals[part]
        shapes, strides = list(map(_shape_of, tensors)), list(map(_strides_of, tensors))
        if shapes == self._shapes[part] and strides == self._strides[part]:
            return []
        looks = zip(shapes, self._shapes[part], strides, self._strides[part], strict=True)
        return [index for index, (a, b, c, d) in enumerate(looks, part.start) if a != b or c != d]

    def _see(self, number: int, part: slice) -> Sight | None:
        """Look at a batch in such a way that one look tells whether its tensors are what they were; None if not."""
        assert self._lasting is not None
        objects = [leaf.tensor for leaf in self._lasting[part] if leaf is not None]  # that is of all
        try:
            return Sight(objects, self._locals[part], self._pointers[part])
        except (ValueError, OSError):
            self._blind.add(number)
            return None

    def _look_at_versions(self) -> list[Array]:
        seen = [sight.versions() if sight is not None else None for sight in self._sights]
        return [
            _versions(self._locals[part]) if found is None else found
            for part, found in zip(self._batches, seen, strict=True)
        ]

    def _look(self, index: int, tensor: torch.Tensor) -> bool:
        if not self._is_planned(index, tensor):
            return False
        self._shapes[index], self._strides[index] = _shape_of(tensor), _strides_of(tensor)
        self._view(index, tensor)
        return True

    def _is_planned(self, index: int, tensor: torch.Tensor) -> bool:
        item = self.plan.planned[index]
        return tuple(tensor.shape) == item.local_shape and tensor.dtype == getattr(torch, item.dtype)

    def _clone(self, sync: Sequence[Leaf]) -> bool:
        begin = self._num_lasting
        if [leaf.name for leaf in sync] != self._names[begin:]:
            return False
        if not sync:
            return True
        found = [local_of(leaf.tensor).detach() for leaf in sync]
        if not all(self._is_planned(begin + number, tensor) for number, tensor in enumerate(found)):
            return False
        # What is made in inference mode can be written to in inference mode only; the next capture may be outside it.
        with torch.inference_mode(False), torch.no_grad():
            if [tensor.device for tensor in found] != [tensor.device for tensor in self._scratch]:
                self.copies.clear()
                self._scratch = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in found]
                for number, tensor in enumerate(self._scratch):
                    self._view(begin + number, tensor)
            torch._foreach_copy_(self._scratch, found)
        return True

    def _view(self, index: int, tensor: torch.Tensor) -> None:
        on_host = tensor.device.type == "cpu"
        whole = view_of(tensor) if on_host else _device_view(tensor)
        for number in self._parts_of[index]:
            part = self.plan.parts[number]
            # A 0-d index would give a scalar, not a view.
            self.sources[number] = whole[part.slices] if part.slices else whole


def _versions(tensors: Sequence[torch.Tensor]) -> Array:
    """How often each was changed in place; -1 where nobody counts (inference tensors)."""
    try:
        return np.array([tensor._version for tensor in tensors])
    except RuntimeError:
        return np.array([version_of(tensor) for tensor in tensors])


def _device_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(carrier_dtype(tensor.element_size()))
