"""
What a node knows: its workers, its jobs, its slots. Plain records; `core` and `core_slots` decide over them.

The life of a slot::

    CREATING -> FREE -> GRANTED -> SEALING -> SEALED -> VOIDING -> FREE
                                      a rebuilt slot begins as SEALED; any state but CREATING may end in DeleteSlot
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

from snapshotd.daemon.events import (
    Effect,
    NodeSettings,
    Note,
    SlotId,
    ToCoordinator,
    ToWorker,
    WorkerConn,
)
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["HOLD_S", "JobState", "NodeState", "ParityKey", "Slot", "SnapshotKey", "State", "Worker", "parity_key"]

SnapshotKey: TypeAlias = tuple[int, int]
"""epoch, step"""
ParityKey: TypeAlias = tuple[int, int, int, int, int]
"""epoch, step, group, lane, position; of one job"""

_MAX_DISPLACED: Final = 64
HOLD_S: Final = 0.1
"""What is being built longer than this is not waited for by the word that its step is sealed."""


def parity_key(ref: control.ParityRef) -> ParityKey:
    return (ref.set.epoch, ref.set.step, ref.set.group, ref.set.lane, ref.position)


class State(Enum):
    CREATING = "creating"
    FREE = "free"
    GRANTED = "granted"
    SEALING = "sealing"
    SEALED = "sealed"
    VOIDING = "voiding"


@dataclass(slots=True)
class Slot:
    """One slot file. doomed: to be freed as soon as what holds it is over. voided_at: when that was begun."""

    slot: SlotId
    job: str
    rank: int
    state: State
    layout_hash: str
    file_bytes: int
    path: str = ""
    conn: WorkerConn | None = None
    ref: control.SlotRef | None = None
    shard: control.NodeSealed.Shard | None = None
    doomed: bool = False
    promised: bool = False
    voided_at: float = 0.0
    rebuilt: bool = False

    @property
    def key(self) -> SnapshotKey:
        assert self.ref is not None
        return (self.ref.epoch, self.ref.step)


@dataclass(slots=True)
class Worker:
    """
    One worker's connection. epoch 0: its launcher did not know, and EpochFormed has not come yet. layout_id: the
    request that registered its layout; layout_request: the same as long as it has no answer.
    """

    conn: WorkerConn
    hello: worker.WorkerHello
    epoch: int
    header: bytes = b""
    layout_hash: str = ""
    file_bytes: int = 0
    replica_group: str = ""
    replica_hash: str = ""
    layout_id: int = 0
    layout_request: int | None = None
    refused_at: float | None = None
    granted: SlotId | None = None
    query: tuple[int, float] | None = None
    last_sealed: int = -1
    last_digest: str = ""
    restoring: bool = False
    first_step_due: bool = False
    finished: bool = False
    local_bytes: int = 0
    remote_bytes: int = 0
    decoded_bytes: int = 0

    @property
    def job(self) -> str:
        return self.hello.job

    @property
    def rank(self) -> int:
        return self.hello.rank

    @property
    def world_size(self) -> int:
        return self.hello.world_size

    def attached(self) -> control.WorkerAttached:
        return control.WorkerAttached(
            job=self.hello.job,
            epoch=self.epoch,
            formation=self.hello.formation,
            rank=self.hello.rank,
            world_size=self.hello.world_size,
            local_rank=self.hello.local_rank,
            nonce=self.hello.nonce,
            pid=self.hello.pid,
        )


@dataclass(slots=True)
class JobState:
    """
    One job on this node.

    formed: the epoch's membership, once it is complete, and ranks_here: which of them are on this node.
    progress: the highest step that each rank sealed or skipped in the epoch. unsure: snapshots found at the start of
    the daemon; until the coordinator commits or abandons it, each of them may be the committed one. displaced: nonces
    of processes whose rank another one has taken; they do not take it back from one that is there. standing: the order
    to protect that was carried out last, in this epoch. unasked: the report of the step `building` without one.
    built_unasked: steps built so, of whose stripe sets the coordinator may know nothing yet.
    """

    name: str
    epoch: int = 0
    formed: control.EpochFormed | None = None
    ranks_here: set[int] | None = None
    committed: SnapshotKey | None = None
    line_epoch: int = 0
    kept: set[SnapshotKey] = field(default_factory=set)
    min_step: int = 0
    split: bool = True
    split_reason: str = ""
    plan: control.RestorePlan | None = None
    plan_asked: bool = False
    building: control.Protect | None = None
    standing: control.Protect | None = None
    unasked: control.NodeSealed | None = None
    built_unasked: set[SnapshotKey] = field(default_factory=set)
    cancelling: set[SnapshotKey] = field(default_factory=set)
    build_next: control.Protect | None = None
    parities: dict[ParityKey, control.ParityRef] = field(default_factory=dict)
    built: set[SnapshotKey] = field(default_factory=set)
    reported: set[SnapshotKey] = field(default_factory=set)
    pledged: set[SnapshotKey] = field(default_factory=set)
    unsure: set[SnapshotKey] = field(default_factory=set)
    rebuilding: dict[tuple[int, int, int, int, int, bool, bool], SlotId] = field(default_factory=dict)
    persisting: set[SnapshotKey] = field(default_factory=set)
    persisted: dict[SnapshotKey, control.PersistDone] = field(default_factory=dict)
    sealing_durable: set[SnapshotKey] = field(default_factory=set)
    durables_done: dict[SnapshotKey, control.PersistSealed] = field(default_factory=dict)
    progress: dict[int, int] = field(default_factory=dict)
    assigned: dict[int, str] = field(default_factory=dict)
    displaced: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_DISPLACED))

    def enter(self, epoch: int) -> bool:
        """Go to a newer epoch: what belonged to the older one's membership is over. False if it is not newer."""
        if epoch <= self.epoch:
            return False
        self.epoch, self.plan, self.plan_asked = epoch, None, False
        self.formed, self.ranks_here, self.standing = None, None, None
        self.min_step, self.split, self.split_reason = 0, True, ""
        self.progress, self.assigned, self.built, self.reported, self.pledged = {}, {}, set(), set(), set()
        return True


class NodeState:
    """All that the node core knows, and the effects that it collects during one `handle`."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.now = 0.0
        self.connected = False
        self._freed = control.InventoryChange()
        self._held: list[tuple[float, control.NodeSealed]] = []
        self.workers: dict[WorkerConn, Worker] = {}
        self.jobs: dict[str, JobState] = {}
        self.slots: dict[SlotId, Slot] = {}
        self.durables: dict[tuple[str, int, int], control.DurableRef] = {}
        self.counters: dict[str, int] = {}
        self.next_slot = 1
        self._seq = 0
        self._effects: list[Effect] = []

    def job(self, name: str) -> JobState:
        job = self.jobs.get(name)
        if job is None:
            job = self.jobs[name] = JobState(name=name)
        return job

    def new_slot_id(self) -> SlotId:
        self.next_slot += 1
        return SlotId(self.next_slot - 1)

    def do(self, effect: Effect) -> None:
        self._effects.append(effect)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that status and metrics show; heartbeats carry them."""
        self.counters[name] = self.counters.get(name, 0) + amount

    def note(self, stream: str, job: str, text: str, *, epoch: int = 0, step: int = -1) -> None:
        self._effects.append(Note(stream=stream, job=job, text=text, epoch=epoch, step=step))

    def set_connected(self, connected: bool) -> None:
        """The session with the coordinator begins or ends; what was freed is known from the hello that comes next."""
        self.connected = connected
        self._freed = control.InventoryChange()
        self._held = []

    def tell(self, message: control.NodeMessage) -> None:
        """
        Say something to the coordinator, behind what is held; without a session it is dropped: the next hello says it
        all.
        """
        if self.connected:
            self.tell_held()
            self._say(message)

    def _say(self, message: control.NodeMessage) -> None:
        self._seq += 1
        message.seq = self._seq
        if self._has_freed:
            message.freed.CopyFrom(self._freed)
            self._freed = control.InventoryChange()  # a new one: a cleared message keeps its memory
        self._effects.append(ToCoordinator(message=message))

    def hold(self, report: control.NodeSealed) -> None:
        """Something may soon be added to this report: say it with the next word, or tick, unless it is taken."""
        self._held.append((self.now, report))

    def take_held(self, report: control.NodeSealed) -> bool:
        """Whether that report was still held; it is the caller's now."""
        before = len(self._held)
        self._held = [(since, one) for since, one in self._held if one is not report]
        return len(self._held) < before

    def tell_held(self, at_least_s: float = 0.0) -> None:
        """Say what has been held for so long."""
        while self._held and self.now - self._held[0][0] >= at_least_s:
            self._say(control.NodeMessage(sealed=self._held.pop(0)[1]))

    def freed(self, slots: Iterable[control.SlotRef] = (), parities: Iterable[control.ParityRef] = ()) -> None:
        """Objects are gone from here on purpose. No hurry: their names are said with the next message, or tick."""
        if not self.connected:
            return
        self.tell_held()  # it may be of what is gone now
        for slot in slots:
            self._freed.slots_removed.add(job=slot.job, epoch=slot.epoch, step=slot.step, rank=slot.rank)
        for parity in parities:
            name = self._freed.parities_removed.add(position=parity.position).set
            name.job, name.epoch, name.step = parity.set.job, parity.set.epoch, parity.set.step
            name.group, name.lane = parity.set.group, parity.set.lane

    def tell_freed(self) -> None:
        """Say now what was freed, if anything was."""
        if self._has_freed:
            self.tell(control.NodeMessage())

    @property
    def _has_freed(self) -> bool:
        return bool(self._freed.slots_removed or self._freed.parities_removed)

    def send(self, conn: WorkerConn, frame: worker.Frame) -> None:
        if conn in self.workers:
            self._effects.append(ToWorker(conn=conn, frame=frame))

    def workers_of(self, job: str) -> list[Worker]:
        return [one for one in self.workers.values() if one.job == job]

    def worker_of(self, job: str, rank: int) -> Worker | None:
        return next((one for one in self.workers.values() if one.job == job and one.rank == rank), None)

    def take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
