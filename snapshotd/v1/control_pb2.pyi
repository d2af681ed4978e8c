from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RestoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESTORE_KIND_UNSPECIFIED: _ClassVar[RestoreKind]
    RESTORE_KIND_FRESH: _ClassVar[RestoreKind]
    RESTORE_KIND_MEMORY: _ClassVar[RestoreKind]
    RESTORE_KIND_DURABLE: _ClassVar[RestoreKind]
    RESTORE_KIND_REFUSED: _ClassVar[RestoreKind]
RESTORE_KIND_UNSPECIFIED: RestoreKind
RESTORE_KIND_FRESH: RestoreKind
RESTORE_KIND_MEMORY: RestoreKind
RESTORE_KIND_DURABLE: RestoreKind
RESTORE_KIND_REFUSED: RestoreKind

class SlotRef(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank", "world_size", "lane", "file_bytes", "root_digest", "layout_hash")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROOT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    world_size: int
    lane: int
    file_bytes: int
    root_digest: str
    layout_hash: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., lane: _Optional[int] = ..., file_bytes: _Optional[int] = ..., root_digest: _Optional[str] = ..., layout_hash: _Optional[str] = ...) -> None: ...

class StripeMember(_message.Message):
    __slots__ = ("node_id", "slot")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    slot: SlotRef
    def __init__(self, node_id: _Optional[str] = ..., slot: _Optional[_Union[SlotRef, _Mapping]] = ...) -> None: ...

class StripeSet(_message.Message):
    __slots__ = ("job", "epoch", "step", "group", "lane", "m", "members")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    M_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    group: int
    lane: int
    m: int
    members: _containers.RepeatedCompositeFieldContainer[StripeMember]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., group: _Optional[int] = ..., lane: _Optional[int] = ..., m: _Optional[int] = ..., members: _Optional[_Iterable[_Union[StripeMember, _Mapping]]] = ...) -> None: ...

class ParityRef(_message.Message):
    __slots__ = ("set", "position", "file_bytes", "root_digest")
    SET_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROOT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    set: StripeSet
    position: int
    file_bytes: int
    root_digest: str
    def __init__(self, set: _Optional[_Union[StripeSet, _Mapping]] = ..., position: _Optional[int] = ..., file_bytes: _Optional[int] = ..., root_digest: _Optional[str] = ...) -> None: ...

class DurableRef(_message.Message):
    __slots__ = ("job", "epoch", "step", "world_size", "path")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    world_size: int
    path: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class PeerAddress(_message.Message):
    __slots__ = ("node_id", "bulk")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BULK_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    bulk: str
    def __init__(self, node_id: _Optional[str] = ..., bulk: _Optional[str] = ...) -> None: ...

class NodeMessage(_message.Message):
    __slots__ = ("seq", "freed", "hello", "heartbeat", "worker_attached", "worker_detached", "sealed", "skipped", "parity_built", "parity_failed", "persist_done", "rebuild_done", "inventory_change", "restore_asked", "restore_finished", "first_step", "persist_sealed")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ATTACHED_FIELD_NUMBER: _ClassVar[int]
    WORKER_DETACHED_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PARITY_BUILT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FAILED_FIELD_NUMBER: _ClassVar[int]
    PERSIST_DONE_FIELD_NUMBER: _ClassVar[int]
    REBUILD_DONE_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_CHANGE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_ASKED_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FINISHED_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    PERSIST_SEALED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    freed: InventoryChange
    hello: NodeHello
    heartbeat: Heartbeat
    worker_attached: WorkerAttached
    worker_detached: WorkerDetached
    sealed: NodeSealed
    skipped: NodeSkipped
    parity_built: ParityBuilt
    parity_failed: ParityFailed
    persist_done: PersistDone
    rebuild_done: RebuildDone
    inventory_change: InventoryChange
    restore_asked: RestoreAsked
    restore_finished: RestoreFinished
    first_step: FirstStep
    persist_sealed: PersistSealed
    def __init__(self, seq: _Optional[int] = ..., freed: _Optional[_Union[InventoryChange, _Mapping]] = ..., hello: _Optional[_Union[NodeHello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., worker_attached: _Optional[_Union[WorkerAttached, _Mapping]] = ..., worker_detached: _Optional[_Union[WorkerDetached, _Mapping]] = ..., sealed: _Optional[_Union[NodeSealed, _Mapping]] = ..., skipped: _Optional[_Union[NodeSkipped, _Mapping]] = ..., parity_built: _Optional[_Union[ParityBuilt, _Mapping]] = ..., parity_failed: _Optional[_Union[ParityFailed, _Mapping]] = ..., persist_done: _Optional[_Union[PersistDone, _Mapping]] = ..., rebuild_done: _Optional[_Union[RebuildDone, _Mapping]] = ..., inventory_change: _Optional[_Union[InventoryChange, _Mapping]] = ..., restore_asked: _Optional[_Union[RestoreAsked, _Mapping]] = ..., restore_finished: _Optional[_Union[RestoreFinished, _Mapping]] = ..., first_step: _Optional[_Union[FirstStep, _Mapping]] = ..., persist_sealed: _Optional[_Union[PersistSealed, _Mapping]] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_id", "nonce", "version", "bulk_address", "domain", "budget_bytes", "persist_every_steps", "persist_every_s", "slots", "parities", "durables", "workers", "epochs", "sealing")
    class EpochsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PERSIST_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    PERSIST_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    DURABLES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    nonce: str
    version: str
    bulk_address: str
    domain: str
    budget_bytes: int
    persist_every_steps: int
    persist_every_s: float
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    parities: _containers.RepeatedCompositeFieldContainer[ParityRef]
    durables: _containers.RepeatedCompositeFieldContainer[DurableRef]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerAttached]
    epochs: _containers.ScalarMap[str, int]
    sealing: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, node_id: _Optional[str] = ..., nonce: _Optional[str] = ..., version: _Optional[str] = ..., bulk_address: _Optional[str] = ..., domain: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., persist_every_steps: _Optional[int] = ..., persist_every_s: _Optional[float] = ..., slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ..., parities: _Optional[_Iterable[_Union[ParityRef, _Mapping]]] = ..., durables: _Optional[_Iterable[_Union[DurableRef, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerAttached, _Mapping]]] = ..., epochs: _Optional[_Mapping[str, int]] = ..., sealing: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("counters", "arena_bytes", "budget_bytes", "resident_bytes")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    arena_bytes: int
    budget_bytes: int
    resident_bytes: int
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., arena_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ...) -> None: ...

class WorkerAttached(_message.Message):
    __slots__ = ("job", "epoch", "formation", "rank", "world_size", "local_rank", "nonce", "pid")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FORMATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    formation: str
    rank: int
    world_size: int
    local_rank: int
    nonce: str
    pid: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., formation: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., local_rank: _Optional[int] = ..., nonce: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class WorkerDetached(_message.Message):
    __slots__ = ("job", "epoch", "rank", "nonce", "finished", "sealing")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    rank: int
    nonce: str
    finished: bool
    sealing: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., nonce: _Optional[str] = ..., finished: _Optional[bool] = ..., sealing: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class NodeSealed(_message.Message):
    __slots__ = ("job", "epoch", "step", "shards", "protecting", "built")
    class Shard(_message.Message):
        __slots__ = ("slot", "replica_group", "replica_hash", "replica_digest", "pledged")
        SLOT_FIELD_NUMBER: _ClassVar[int]
        REPLICA_GROUP_FIELD_NUMBER: _ClassVar[int]
        REPLICA_HASH_FIELD_NUMBER: _ClassVar[int]
        REPLICA_DIGEST_FIELD_NUMBER: _ClassVar[int]
        PLEDGED_FIELD_NUMBER: _ClassVar[int]
        slot: SlotRef
        replica_group: str
        replica_hash: str
        replica_digest: str
        pledged: bool
        def __init__(self, slot: _Optional[_Union[SlotRef, _Mapping]] = ..., replica_group: _Optional[str] = ..., replica_hash: _Optional[str] = ..., replica_digest: _Optional[str] = ..., pledged: _Optional[bool] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PROTECTING_FIELD_NUMBER: _ClassVar[int]
    BUILT_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    shards: _containers.RepeatedCompositeFieldContainer[NodeSealed.Shard]
    protecting: bool
    built: ParityBuilt
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[NodeSealed.Shard, _Mapping]]] = ..., protecting: _Optional[bool] = ..., built: _Optional[_Union[ParityBuilt, _Mapping]] = ...) -> None: ...

class NodeSkipped(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ParityBuilt(_message.Message):
    __slots__ = ("job", "epoch", "step", "lanes", "unasked", "sets")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    UNASKED_FIELD_NUMBER: _ClassVar[int]
    SETS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    lanes: _containers.RepeatedScalarFieldContainer[int]
    unasked: bool
    sets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., lanes: _Optional[_Iterable[int]] = ..., unasked: _Optional[bool] = ..., sets: _Optional[_Iterable[int]] = ...) -> None: ...

class ParityFailed(_message.Message):
    __slots__ = ("job", "epoch", "step", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PersistDone(_message.Message):
    __slots__ = ("job", "epoch", "step", "ok", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    ok: bool
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., ok: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class PersistSealed(_message.Message):
    __slots__ = ("durable", "removed", "ok", "reason")
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    durable: DurableRef
    removed: _containers.RepeatedCompositeFieldContainer[DurableRef]
    ok: bool
    reason: str
    def __init__(self, durable: _Optional[_Union[DurableRef, _Mapping]] = ..., removed: _Optional[_Iterable[_Union[DurableRef, _Mapping]]] = ..., ok: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class RebuildDone(_message.Message):
    __slots__ = ("job", "epoch", "step", "group", "lane", "position", "ok", "reason", "slot", "parity", "seconds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    group: int
    lane: int
    position: int
    ok: bool
    reason: str
    slot: SlotRef
    parity: ParityRef
    seconds: float
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., group: _Optional[int] = ..., lane: _Optional[int] = ..., position: _Optional[int] = ..., ok: _Optional[bool] = ..., reason: _Optional[str] = ..., slot: _Optional[_Union[SlotRef, _Mapping]] = ..., parity: _Optional[_Union[ParityRef, _Mapping]] = ..., seconds: _Optional[float] = ...) -> None: ...

class InventoryChange(_message.Message):
    __slots__ = ("slots_added", "slots_removed", "parities_added", "parities_removed", "reason")
    SLOTS_ADDED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    PARITIES_ADDED_FIELD_NUMBER: _ClassVar[int]
    PARITIES_REMOVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    slots_added: _containers.RepeatedCompositeFieldContainer[SlotRef]
    slots_removed: _containers.RepeatedCompositeFieldContainer[SlotRef]
    parities_added: _containers.RepeatedCompositeFieldContainer[ParityRef]
    parities_removed: _containers.RepeatedCompositeFieldContainer[ParityRef]
    reason: str
    def __init__(self, slots_added: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ..., slots_removed: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ..., parities_added: _Optional[_Iterable[_Union[ParityRef, _Mapping]]] = ..., parities_removed: _Optional[_Iterable[_Union[ParityRef, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class RestoreAsked(_message.Message):
    __slots__ = ("job", "epoch", "rank")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    rank: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class RestoreFinished(_message.Message):
    __slots__ = ("job", "epoch", "rank", "ok", "error", "fetch_s", "load_s", "step", "local_bytes", "remote_bytes", "decoded_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REMOTE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DECODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    rank: int
    ok: bool
    error: str
    fetch_s: float
    load_s: float
    step: int
    local_bytes: int
    remote_bytes: int
    decoded_bytes: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., ok: _Optional[bool] = ..., error: _Optional[str] = ..., fetch_s: _Optional[float] = ..., load_s: _Optional[float] = ..., step: _Optional[int] = ..., local_bytes: _Optional[int] = ..., remote_bytes: _Optional[int] = ..., decoded_bytes: _Optional[int] = ...) -> None: ...

class FirstStep(_message.Message):
    __slots__ = ("job", "epoch", "rank", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    rank: int
    step: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "epoch_formed", "protect", "committed", "abandon", "persist", "persist_seal", "rebuild", "restore_plan", "drop", "set_replica_mode")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FORMED_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    PERSIST_SEAL_FIELD_NUMBER: _ClassVar[int]
    REBUILD_FIELD_NUMBER: _ClassVar[int]
    RESTORE_PLAN_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    SET_REPLICA_MODE_FIELD_NUMBER: _ClassVar[int]
    welcome: NodeWelcome
    epoch_formed: EpochFormed
    protect: Protect
    committed: Committed
    abandon: Abandon
    persist: Persist
    persist_seal: PersistSeal
    rebuild: Rebuild
    restore_plan: RestorePlan
    drop: DropSnapshots
    set_replica_mode: SetReplicaMode
    def __init__(self, welcome: _Optional[_Union[NodeWelcome, _Mapping]] = ..., epoch_formed: _Optional[_Union[EpochFormed, _Mapping]] = ..., protect: _Optional[_Union[Protect, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., abandon: _Optional[_Union[Abandon, _Mapping]] = ..., persist: _Optional[_Union[Persist, _Mapping]] = ..., persist_seal: _Optional[_Union[PersistSeal, _Mapping]] = ..., rebuild: _Optional[_Union[Rebuild, _Mapping]] = ..., restore_plan: _Optional[_Union[RestorePlan, _Mapping]] = ..., drop: _Optional[_Union[DropSnapshots, _Mapping]] = ..., set_replica_mode: _Optional[_Union[SetReplicaMode, _Mapping]] = ...) -> None: ...

class NodeWelcome(_message.Message):
    __slots__ = ("coordinator_nonce", "committed", "error")
    COORDINATOR_NONCE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    coordinator_nonce: int
    committed: _containers.RepeatedCompositeFieldContainer[Committed]
    error: str
    def __init__(self, coordinator_nonce: _Optional[int] = ..., committed: _Optional[_Iterable[_Union[Committed, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class EpochFormed(_message.Message):
    __slots__ = ("job", "epoch", "world_size", "nodes", "m", "reason", "formation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    M_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FORMATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    world_size: int
    nodes: _containers.RepeatedScalarFieldContainer[str]
    m: int
    reason: str
    formation: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., world_size: _Optional[int] = ..., nodes: _Optional[_Iterable[str]] = ..., m: _Optional[int] = ..., reason: _Optional[str] = ..., formation: _Optional[str] = ...) -> None: ...

class Protect(_message.Message):
    __slots__ = ("job", "epoch", "step", "sets", "peers")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SETS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    sets: _containers.RepeatedCompositeFieldContainer[StripeSet]
    peers: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., sets: _Optional[_Iterable[_Union[StripeSet, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("job", "epoch", "step", "level")
    class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LEVEL_UNSPECIFIED: _ClassVar[Committed.Level]
        LEVEL_SEALED: _ClassVar[Committed.Level]
        LEVEL_PROTECTED: _ClassVar[Committed.Level]
        LEVEL_PERSISTED: _ClassVar[Committed.Level]
    LEVEL_UNSPECIFIED: Committed.Level
    LEVEL_SEALED: Committed.Level
    LEVEL_PROTECTED: Committed.Level
    LEVEL_PERSISTED: Committed.Level
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    level: Committed.Level
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., level: _Optional[_Union[Committed.Level, str]] = ...) -> None: ...

class Abandon(_message.Message):
    __slots__ = ("job", "epoch", "up_to_step", "min_step", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UP_TO_STEP_FIELD_NUMBER: _ClassVar[int]
    MIN_STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    up_to_step: int
    min_step: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., up_to_step: _Optional[int] = ..., min_step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Persist(_message.Message):
    __slots__ = ("job", "epoch", "step", "world_size")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    world_size: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ...) -> None: ...

class PersistSeal(_message.Message):
    __slots__ = ("job", "epoch", "step", "world_size", "slots")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    world_size: int
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ...) -> None: ...

class Rebuild(_message.Message):
    __slots__ = ("set", "position", "slot", "parity", "slot_nodes", "parity_nodes", "peers")
    SET_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    SLOT_NODES_FIELD_NUMBER: _ClassVar[int]
    PARITY_NODES_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    set: StripeSet
    position: int
    slot: bool
    parity: bool
    slot_nodes: _containers.RepeatedScalarFieldContainer[str]
    parity_nodes: _containers.RepeatedScalarFieldContainer[str]
    peers: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    def __init__(self, set: _Optional[_Union[StripeSet, _Mapping]] = ..., position: _Optional[int] = ..., slot: _Optional[bool] = ..., parity: _Optional[bool] = ..., slot_nodes: _Optional[_Iterable[str]] = ..., parity_nodes: _Optional[_Iterable[str]] = ..., peers: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ...) -> None: ...

class RestorePlan(_message.Message):
    __slots__ = ("job", "epoch", "kind", "source_epoch", "source_step", "source_world_size", "reason", "lost_steps", "nodes", "slots", "peers", "durable_path")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STEP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOST_STEPS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_PATH_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    kind: RestoreKind
    source_epoch: int
    source_step: int
    source_world_size: int
    reason: str
    lost_steps: int
    nodes: _containers.RepeatedScalarFieldContainer[str]
    slots: _containers.RepeatedCompositeFieldContainer[SlotRef]
    peers: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    durable_path: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., kind: _Optional[_Union[RestoreKind, str]] = ..., source_epoch: _Optional[int] = ..., source_step: _Optional[int] = ..., source_world_size: _Optional[int] = ..., reason: _Optional[str] = ..., lost_steps: _Optional[int] = ..., nodes: _Optional[_Iterable[str]] = ..., slots: _Optional[_Iterable[_Union[SlotRef, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ..., durable_path: _Optional[str] = ...) -> None: ...

class DropSnapshots(_message.Message):
    __slots__ = ("job", "epoch", "keep", "reason")
    class Keep(_message.Message):
        __slots__ = ("epoch", "step")
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        epoch: int
        step: int
        def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    keep: _containers.RepeatedCompositeFieldContainer[DropSnapshots.Keep]
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., keep: _Optional[_Iterable[_Union[DropSnapshots.Keep, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class SetReplicaMode(_message.Message):
    __slots__ = ("job", "epoch", "split", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    split: bool
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., split: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("join", "resume", "leave", "ping")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    join: AgentJoin
    resume: AgentResume
    leave: AgentLeave
    ping: AgentPing
    def __init__(self, join: _Optional[_Union[AgentJoin, _Mapping]] = ..., resume: _Optional[_Union[AgentResume, _Mapping]] = ..., leave: _Optional[_Union[AgentLeave, _Mapping]] = ..., ping: _Optional[_Union[AgentPing, _Mapping]] = ...) -> None: ...

class AgentJoin(_message.Message):
    __slots__ = ("job", "agent", "node_id", "min_nodes", "max_nodes", "host", "last_call_s", "join_timeout_s", "round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MIN_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    LAST_CALL_S_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    node_id: str
    min_nodes: int
    max_nodes: int
    host: str
    last_call_s: float
    join_timeout_s: float
    round: int
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., node_id: _Optional[str] = ..., min_nodes: _Optional[int] = ..., max_nodes: _Optional[int] = ..., host: _Optional[str] = ..., last_call_s: _Optional[float] = ..., join_timeout_s: _Optional[float] = ..., round: _Optional[int] = ...) -> None: ...

class AgentResume(_message.Message):
    __slots__ = ("job", "agent", "epoch", "node_id", "group_rank", "group_world_size")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    GROUP_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    epoch: int
    node_id: str
    group_rank: int
    group_world_size: int
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., epoch: _Optional[int] = ..., node_id: _Optional[str] = ..., group_rank: _Optional[int] = ..., group_world_size: _Optional[int] = ...) -> None: ...

class AgentLeave(_message.Message):
    __slots__ = ("job", "agent", "close", "reason", "failed")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    close: bool
    reason: str
    failed: bool
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., close: _Optional[bool] = ..., reason: _Optional[str] = ..., failed: _Optional[bool] = ...) -> None: ...

class AgentPing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AgentUpdate(_message.Message):
    __slots__ = ("formed", "restart", "closed", "waiting")
    FORMED_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    formed: AgentFormed
    restart: AgentRestart
    closed: AgentClosed
    waiting: AgentWaiting
    def __init__(self, formed: _Optional[_Union[AgentFormed, _Mapping]] = ..., restart: _Optional[_Union[AgentRestart, _Mapping]] = ..., closed: _Optional[_Union[AgentClosed, _Mapping]] = ..., waiting: _Optional[_Union[AgentWaiting, _Mapping]] = ...) -> None: ...

class AgentFormed(_message.Message):
    __slots__ = ("job", "epoch", "group_rank", "group_world_size", "master_host", "round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    GROUP_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MASTER_HOST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    group_rank: int
    group_world_size: int
    master_host: str
    round: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., group_rank: _Optional[int] = ..., group_world_size: _Optional[int] = ..., master_host: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class AgentRestart(_message.Message):
    __slots__ = ("job", "epoch", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    reason: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AgentClosed(_message.Message):
    __slots__ = ("job", "reason", "exit_code")
    JOB_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    job: str
    reason: str
    exit_code: int
    def __init__(self, job: _Optional[str] = ..., reason: _Optional[str] = ..., exit_code: _Optional[int] = ...) -> None: ...

class AgentWaiting(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class KvSetRequest(_message.Message):
    __slots__ = ("job", "epoch", "entries")
    class EntriesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    entries: _containers.ScalarMap[str, bytes]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., entries: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class KvSetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvGetRequest(_message.Message):
    __slots__ = ("job", "epoch", "keys", "timeout_ms")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    keys: _containers.RepeatedScalarFieldContainer[str]
    timeout_ms: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., keys: _Optional[_Iterable[str]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class KvGetResponse(_message.Message):
    __slots__ = ("found", "values")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    found: bool
    values: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, found: _Optional[bool] = ..., values: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvAddRequest(_message.Message):
    __slots__ = ("job", "epoch", "key", "amount", "request_id")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    key: str
    amount: int
    request_id: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., key: _Optional[str] = ..., amount: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class KvAddResponse(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class LocateSnapshotRequest(_message.Message):
    __slots__ = ("job", "step", "latest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    latest: bool
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., latest: _Optional[bool] = ...) -> None: ...

class LocateSnapshotResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: RestorePlan
    def __init__(self, plan: _Optional[_Union[RestorePlan, _Mapping]] = ...) -> None: ...

class ForgetJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class ForgetJobResponse(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...
