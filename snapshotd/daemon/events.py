"""
What happens to the node core (past facts) and what it wants done (imperatives).

The node core owns the life of every slot and parity file of a node: who may write it, when its
bytes count, when it may be freed. The shell does the work (memory, hashing, sockets) and says how
it ended. Rule: every work order ends in exactly one of the endings that its docstring names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, TypeAlias

from snapshotd.layout import CHUNK_BYTES, KnownDigests
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

WorkerConn = NewType("WorkerConn", int)
SlotId = NewType("SlotId", int)

# ---------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFrame:
    conn: WorkerConn
    frame: worker.Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """The worker's connection ended, or its process died."""

    conn: WorkerConn


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorUp:
    """A new session with the coordinator began; NodeHello must be the first message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorDown:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSaid:
    message: control.CoordinatorMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCreated:
    slot: SlotId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRefused:
    """No memory for a slot; the reason has the numbers."""

    slot: SlotId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotReady:
    """The slot's old contents are void (its record is gone): it may be granted."""

    slot: SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSealed:
    """Digests are computed and the record is written. data_digest leaves out the per-step JSON."""

    slot: SlotId
    ref: control.SlotRef
    data_digest: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSealFailed:
    slot: SlotId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityFinished:
    """BuildParity ended well: all parity files of this node for that step are there."""

    job: str
    epoch: int
    step: int
    parities: tuple[control.ParityRef, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityAborted:
    job: str
    epoch: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildFinished:
    """Rebuild ended: `done` says how; the slot (its id in this arena) and parity that are now here."""

    done: control.RebuildDone
    slot: SlotId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistFinished:
    done: control.PersistDone


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistSealFinished:
    done: control.PersistSealed


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptionFound:
    """Digests of an object here do not match: it is an erasure from now on."""

    slot: SlotId | None
    ref: control.SlotRef | None
    parity: control.ParityRef | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreServed:
    """A RestoreQuery or RestoreWant was worked off; the frame is the answer for the worker."""

    conn: WorkerConn
    frame: worker.Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    pass


Event: TypeAlias = (
    WorkerFrame
    | WorkerGone
    | CoordinatorUp
    | CoordinatorDown
    | CoordinatorSaid
    | SlotCreated
    | SlotRefused
    | SlotReady
    | SlotSealed
    | SlotSealFailed
    | ParityFinished
    | ParityAborted
    | RebuildFinished
    | PersistFinished
    | PersistSealFinished
    | CorruptionFound
    | RestoreServed
    | Ticked
)

# ---------------------------------------------------------------- imperatives


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWorker:
    conn: WorkerConn
    frame: worker.Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseWorker:
    conn: WorkerConn


@dataclass(frozen=True, slots=True, kw_only=True)
class ToCoordinator:
    """Dropped by the shell when there is no session: the next NodeHello says it all."""

    message: control.NodeMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSlot:
    """
    Ends in SlotCreated or SlotRefused. header: the head of the slot file (layout).

    lane_bytes: the slots of all of the job's ranks on this node, in one generation; with generations, k and m, and the
    bytes of slots that readers hold besides, they say what the job needs here in all, which is compared with what there
    is before the first byte is taken.
    """

    slot: SlotId
    job: str
    header: bytes
    file_bytes: int
    lane_bytes: tuple[int, ...] = ()
    generations: int = 2
    k: int = 1
    m: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VoidSlot:
    """Remove the slot's record (and rewrite its header if given) so that it can be granted. Ends in SlotReady."""

    slot: SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class SealSlot:
    """
    Hash the slot and write its record. Ends in SlotSealed or SlotSealFailed. ref lacks root_digest; ``known`` is what
    the worker has hashed.
    """

    slot: SlotId
    ref: control.SlotRef
    known: tuple[KnownDigests, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteSlot:
    """Free the slot's file (when its last reader is done). No ending."""

    slot: SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParity:
    """Pull the stripes, encode, seal the parity. Ends in ParityFinished or ParityAborted."""

    protect: control.Protect


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelParity:
    """Stop BuildParity of that step if it still runs (it then ends in ParityAborted)."""

    job: str
    epoch: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteParity:
    parity: control.ParityRef


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildObject:
    """Ends in RebuildFinished. slot: the id under which a rebuilt slot will be known here."""

    rebuild: control.Rebuild
    slot: SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistSlots:
    """Ends in PersistFinished."""

    persist: control.Persist


@dataclass(frozen=True, slots=True, kw_only=True)
class SealPersisted:
    """Write the marker and prune. Ends in PersistSealFinished."""

    seal: control.PersistSeal


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRestore:
    """
    Work off a RestoreQuery (write the manifest) or a RestoreWant (assemble the bytes) under the plan.

    Ends in RestoreServed. rank, world_size: of the epoch that restores.
    """

    conn: WorkerConn
    rank: int
    world_size: int
    plan: control.RestorePlan
    frame: worker.Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRestore:
    """Free the buffers of a batch (batch_id) or (None) all restore buffers of that worker."""

    conn: WorkerConn
    batch_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """For the log. stream: "membership", "commit", "recovery", "capture" or "integrity"."""

    stream: str
    job: str
    text: str
    epoch: int = 0
    step: int = -1


Effect: TypeAlias = (
    ToWorker
    | CloseWorker
    | ToCoordinator
    | CreateSlot
    | VoidSlot
    | SealSlot
    | DeleteSlot
    | BuildParity
    | CancelParity
    | DeleteParity
    | RebuildObject
    | PersistSlots
    | SealPersisted
    | ServeRestore
    | ReleaseRestore
    | Note
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What the arena held when the daemon started: (slot id, ref, path), parity, and durable snapshots."""

    slots: tuple[tuple[SlotId, control.SlotRef, str], ...] = ()
    parities: tuple[control.ParityRef, ...] = ()
    durables: tuple[control.DurableRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """
    Policy of a node. generations: slots per local rank (at least 2). Times in seconds.

    pledge_bytes: slots of up to so many bytes are pledged when they are reported; one more may be made for it while the
    coordinator is away.

    verified: slots that were re-attached after a restart are hashed before they are reported.
    """

    node_id: str
    nonce: str
    version: str
    bulk_address: str
    domain: str = ""
    generations: int = 2
    capture_every: int = 1
    budget_bytes: int = 0
    persist_every_steps: int = 0
    persist_every_s: float = 0.0
    restore_wait_s: float = 10.0
    pledge_bytes: int = 8 * CHUNK_BYTES
