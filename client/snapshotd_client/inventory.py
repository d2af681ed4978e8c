"""
All of the user's training state in one place: modules, optimizers and the rest, as leaves and one JSON text per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snapshotd_client.codec import dumps
from snapshotd_client.dtensors import is_dtensor
from snapshotd_client.errors import CannotExpress
from snapshotd_client.extras import Extras
from snapshotd_client.held import is_same
from snapshotd_client.leaves import Leaf
from snapshotd_client.models import ModelTree, Param
from snapshotd_client.optim import OptimizerView, named_optimizers, unseen_state
from snapshotd_client.placement import Placement, place_dtensor, place_plain
from snapshotd_client.plan import Plan, Planned, build_plan, meta_capacity_for, plan_leaf
from snapshotd_client.rng import RngText, accelerators_of

__all__ = ["Inventory", "Reading", "check_expressible"]

META_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """
    One step's leaves, in the plan's order, and the parts of its JSON that do not depend on the step's number.

    Attributes:
        lasting: those that stay unchanged until the next update; the same list as before while they are the same.
        sync: those that may change at any time.
    """

    lasting: list[Leaf]
    sync: list[Leaf]
    optimizers: bytes
    rest: str

    @property
    def leaves(self) -> list[Leaf]:
        return [*self.lasting, *self.sync]

    def meta(self, step: int, rank: int, world_size: int, epoch: int | None) -> list[bytes]:
        """Return the text of ``__meta__``, in pieces: that of the optimizers is large and seldom another."""
        head = (
            f'{{"version":{META_VERSION},"step":{step},"rank":{rank},"world_size":{world_size},'
            f'"epoch":{dumps(epoch)},"optimizers":['
        )
        return [head.encode(), self.optimizers, f'],"rest":{self.rest}}}'.encode()]


class Inventory:
    """The user's state. Wrong arguments raise TypeError or ValueError here, with the fix."""

    def __init__(
        self, *, model: object, optimizer: object, scheduler: object, scaler: object, extra: object, world_size: int
    ) -> None:
        self._world_size = world_size
        self.tree = ModelTree.of(model, world_size)
        self.optimizers: list[OptimizerView] = named_optimizers(optimizer)
        self.extras = Extras(scheduler, scaler, extra)
        self._fixed: list[Leaf] = []
        self._lasting: list[Leaf] = []
        self._lasting_of: list[list[Leaf]] = []
        self._buffers: dict[str, Leaf] = {}
        self._rng = RngText()
        self._devices: list[torch.device] = []
        self._forgotten = False
        self._scan()

    def read(self) -> tuple[Reading, bool]:
        """Return this step's state, and whether the layout may be another one than before."""
        changed = not self.unchanged()
        if changed:
            self._scan()
        return self._read(), changed

    def unchanged(self) -> bool:
        """Look whether the layout is still that of the last scan, and take in what may change without it."""
        if self._forgotten:
            return False
        return self.tree.unchanged() and all(view.refresh() for view in self.optimizers)

    def rescan(self) -> Reading:
        """Look at everything anew."""
        self._scan()
        return self._read()

    def plan(self, reading: Reading, meta_bytes: int, rank: int, split: bool) -> Plan:
        """Lay out ``reading``. CannotExpress, ValueError or LayoutError for what cannot be."""
        planned = [plan_leaf(leaf, self.placement(leaf)) for leaf in reading.leaves]
        capacity = meta_capacity_for(meta_bytes)
        return build_plan(planned, rank=rank, split=split, ties=self.ties(planned), meta_capacity=capacity)

    def ties(self, planned: list[Planned]) -> dict[str, str]:
        """Return alias to name, for aliases whose tensor is in this rank's layout."""
        held = {item.name for item in planned if item.placement.pieces}
        return {alias: name for alias, name in self.tree.ties.items() if name in held}

    def placement(self, leaf: Leaf) -> Placement:
        """Return where ``leaf`` lies."""
        tensor = leaf.tensor
        if leaf.param is not None:
            return self.tree.placement(leaf.param, tensor)
        if is_dtensor(tensor):
            placed = place_dtensor(tensor)
            whole = all(placement.is_replicate() for placement in tensor.placements)
            return place_plain(tuple(tensor._local_tensor.shape), "rank") if whole else placed
        if leaf.sync or self._world_size > 1:
            return place_plain(tensor.shape, "rank")
        return place_plain(tensor.shape, "global")

    def devices(self) -> list[torch.device]:
        """Return the accelerators that the state lies on."""
        return self._devices

    def forget_moving(self) -> list[Leaf]:
        """Let go of optimizer state that is replaced now and then; return what that was."""
        gone = [leaf for view in self.optimizers for leaf in view.forget_moving()]
        if gone:
            self._lasting, self._lasting_of = [], []
        return gone

    def forget(self) -> None:
        """Let go of all tensors; the next look finds them again."""
        self._forgotten = True
        self._fixed, self._lasting, self._lasting_of, self._buffers = [], [], [], {}
        self.tree.forget()
        for view in self.optimizers:
            view.forget()

    def unseen(self) -> list[str]:
        """Return the paths of what looks like state, but is not captured."""
        return unseen_state(self.optimizers)

    def strays(self) -> list[Param]:
        return [param for view in self.optimizers for param in view.strays]

    def _scan(self) -> None:
        self._forgotten = False
        self.tree.scan()
        for view in self.optimizers:
            view.scan(self.tree)
        params = {id(p.tensor): p for p in (*self.tree.params.values(), *self.strays())}
        self._fixed = [Leaf(param.name, "param", param.tensor, param) for param in params.values()]
        self._devices = accelerators_of(leaf.tensor for leaf in self._fixed)
        self._lasting_of, self._buffers = [], {}

    def _read(self) -> Reading:
        parts = [self._fixed, *(view.leaves() for view in self.optimizers)]
        if not is_same(parts, self._lasting_of):
            self._lasting = [leaf for part in parts for leaf in part]
            self._lasting_of = parts
        sync: list[Leaf] = []
        for name, spot in self.tree.buffers.items():
            buffer = spot.get()
            if buffer is not None:
                known = self._buffers.get(name)
                if known is None or known.tensor is not buffer:
                    known = self._buffers[name] = Leaf(name, "buffer", buffer, None, sync=True)
                sync.append(known)
        data, extra_leaves = self.extras.encode(self.tree.extra_states)
        sync += extra_leaves
        rest = f'{dumps(data)[:-1]},"rng":{self._rng.read(self._devices)}}}'
        return Reading(self._lasting, sync, b",".join(view.text() for view in self.optimizers), rest)


def check_expressible(inventory: Inventory) -> None:
    """Raise TypeError or ValueError, naming the path, when the state as it is now could not be captured."""
    reading = inventory.rescan()
    try:
        inventory.plan(reading, 0, 0, split=False)
    except CannotExpress:
        raise
    except Exception as error:
        raise ValueError(f"this state cannot be captured: {error}") from error
