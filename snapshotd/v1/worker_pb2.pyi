from snapshotd.v1 import bulk_pb2 as _bulk_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("request_id", "hello", "register_layout", "seal", "skip", "restore_query", "restore_want", "restore_release", "restore_done", "goodbye", "who_are_you", "restore_locate", "restore_fault", "welcome", "layout_reply", "grant", "replica_mode", "restore_decision", "restore_ready", "error", "i_am", "restore_sources")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REGISTER_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    RESTORE_QUERY_FIELD_NUMBER: _ClassVar[int]
    RESTORE_WANT_FIELD_NUMBER: _ClassVar[int]
    RESTORE_RELEASE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_DONE_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    WHO_ARE_YOU_FIELD_NUMBER: _ClassVar[int]
    RESTORE_LOCATE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FAULT_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_REPLY_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_MODE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_DECISION_FIELD_NUMBER: _ClassVar[int]
    RESTORE_READY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    I_AM_FIELD_NUMBER: _ClassVar[int]
    RESTORE_SOURCES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    hello: WorkerHello
    register_layout: RegisterLayout
    seal: Seal
    skip: Skip
    restore_query: RestoreQuery
    restore_want: RestoreWant
    restore_release: RestoreRelease
    restore_done: RestoreDone
    goodbye: Goodbye
    who_are_you: WhoAreYou
    restore_locate: RestoreLocate
    restore_fault: RestoreFault
    welcome: WorkerWelcome
    layout_reply: LayoutReply
    grant: Grant
    replica_mode: ReplicaMode
    restore_decision: RestoreDecision
    restore_ready: RestoreReady
    error: WorkerError
    i_am: IAm
    restore_sources: RestoreSources
    def __init__(self, request_id: _Optional[int] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., register_layout: _Optional[_Union[RegisterLayout, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ..., skip: _Optional[_Union[Skip, _Mapping]] = ..., restore_query: _Optional[_Union[RestoreQuery, _Mapping]] = ..., restore_want: _Optional[_Union[RestoreWant, _Mapping]] = ..., restore_release: _Optional[_Union[RestoreRelease, _Mapping]] = ..., restore_done: _Optional[_Union[RestoreDone, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., who_are_you: _Optional[_Union[WhoAreYou, _Mapping]] = ..., restore_locate: _Optional[_Union[RestoreLocate, _Mapping]] = ..., restore_fault: _Optional[_Union[RestoreFault, _Mapping]] = ..., welcome: _Optional[_Union[WorkerWelcome, _Mapping]] = ..., layout_reply: _Optional[_Union[LayoutReply, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., replica_mode: _Optional[_Union[ReplicaMode, _Mapping]] = ..., restore_decision: _Optional[_Union[RestoreDecision, _Mapping]] = ..., restore_ready: _Optional[_Union[RestoreReady, _Mapping]] = ..., error: _Optional[_Union[WorkerError, _Mapping]] = ..., i_am: _Optional[_Union[IAm, _Mapping]] = ..., restore_sources: _Optional[_Union[RestoreSources, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("protocol", "job", "rank", "world_size", "local_rank", "local_world_size", "epoch", "formation", "nonce", "pid")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FORMATION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    job: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    epoch: int
    formation: str
    nonce: str
    pid: int
    def __init__(self, protocol: _Optional[int] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., local_rank: _Optional[int] = ..., local_world_size: _Optional[int] = ..., epoch: _Optional[int] = ..., formation: _Optional[str] = ..., nonce: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class WorkerWelcome(_message.Message):
    __slots__ = ("node_id", "capture_every")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_EVERY_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    capture_every: int
    def __init__(self, node_id: _Optional[str] = ..., capture_every: _Optional[int] = ...) -> None: ...

class WhoAreYou(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IAm(_message.Message):
    __slots__ = ("node_id", "coordinator", "version")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    coordinator: str
    version: str
    def __init__(self, node_id: _Optional[str] = ..., coordinator: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class RegisterLayout(_message.Message):
    __slots__ = ("header", "replica_group", "replica_hash")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    REPLICA_GROUP_FIELD_NUMBER: _ClassVar[int]
    REPLICA_HASH_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    replica_group: str
    replica_hash: str
    def __init__(self, header: _Optional[bytes] = ..., replica_group: _Optional[str] = ..., replica_hash: _Optional[str] = ...) -> None: ...

class LayoutReply(_message.Message):
    __slots__ = ("accepted", "reason", "layout_hash")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    layout_hash: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., layout_hash: _Optional[str] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("slot_id", "path", "file_bytes", "layout_hash", "min_step")
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    MIN_STEP_FIELD_NUMBER: _ClassVar[int]
    slot_id: int
    path: str
    file_bytes: int
    layout_hash: str
    min_step: int
    def __init__(self, slot_id: _Optional[int] = ..., path: _Optional[str] = ..., file_bytes: _Optional[int] = ..., layout_hash: _Optional[str] = ..., min_step: _Optional[int] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("slot_id", "step", "layout_hash", "replica_hash", "replica_digest", "copy_ns", "stall_ns", "digests")
    class Digests(_message.Message):
        __slots__ = ("first", "digests")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        first: int
        digests: bytes
        def __init__(self, first: _Optional[int] = ..., digests: _Optional[bytes] = ...) -> None: ...
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    REPLICA_HASH_FIELD_NUMBER: _ClassVar[int]
    REPLICA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COPY_NS_FIELD_NUMBER: _ClassVar[int]
    STALL_NS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    slot_id: int
    step: int
    layout_hash: str
    replica_hash: str
    replica_digest: str
    copy_ns: int
    stall_ns: int
    digests: _containers.RepeatedCompositeFieldContainer[Seal.Digests]
    def __init__(self, slot_id: _Optional[int] = ..., step: _Optional[int] = ..., layout_hash: _Optional[str] = ..., replica_hash: _Optional[str] = ..., replica_digest: _Optional[str] = ..., copy_ns: _Optional[int] = ..., stall_ns: _Optional[int] = ..., digests: _Optional[_Iterable[_Union[Seal.Digests, _Mapping]]] = ...) -> None: ...

class Skip(_message.Message):
    __slots__ = ("step", "reason", "detail")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Skip.Reason]
        REASON_NO_SLOT: _ClassVar[Skip.Reason]
        REASON_TORN: _ClassVar[Skip.Reason]
        REASON_LATE: _ClassVar[Skip.Reason]
        REASON_ALIGNING: _ClassVar[Skip.Reason]
        REASON_REFUSED: _ClassVar[Skip.Reason]
        REASON_ERROR: _ClassVar[Skip.Reason]
    REASON_UNSPECIFIED: Skip.Reason
    REASON_NO_SLOT: Skip.Reason
    REASON_TORN: Skip.Reason
    REASON_LATE: Skip.Reason
    REASON_ALIGNING: Skip.Reason
    REASON_REFUSED: Skip.Reason
    REASON_ERROR: Skip.Reason
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    step: int
    reason: Skip.Reason
    detail: str
    def __init__(self, step: _Optional[int] = ..., reason: _Optional[_Union[Skip.Reason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ReplicaMode(_message.Message):
    __slots__ = ("split", "reason")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    split: bool
    reason: str
    def __init__(self, split: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class RestoreQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestoreDecision(_message.Message):
    __slots__ = ("kind", "epoch", "source_epoch", "source_step", "source_world_size", "source", "reason", "lost_steps", "manifest_path", "direct")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[RestoreDecision.Kind]
        KIND_FRESH: _ClassVar[RestoreDecision.Kind]
        KIND_SNAPSHOT: _ClassVar[RestoreDecision.Kind]
        KIND_REFUSED: _ClassVar[RestoreDecision.Kind]
        KIND_UNDECIDED: _ClassVar[RestoreDecision.Kind]
    KIND_UNSPECIFIED: RestoreDecision.Kind
    KIND_FRESH: RestoreDecision.Kind
    KIND_SNAPSHOT: RestoreDecision.Kind
    KIND_REFUSED: RestoreDecision.Kind
    KIND_UNDECIDED: RestoreDecision.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STEP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOST_STEPS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_PATH_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    kind: RestoreDecision.Kind
    epoch: int
    source_epoch: int
    source_step: int
    source_world_size: int
    source: str
    reason: str
    lost_steps: int
    manifest_path: str
    direct: bool
    def __init__(self, kind: _Optional[_Union[RestoreDecision.Kind, str]] = ..., epoch: _Optional[int] = ..., source_epoch: _Optional[int] = ..., source_step: _Optional[int] = ..., source_world_size: _Optional[int] = ..., source: _Optional[str] = ..., reason: _Optional[str] = ..., lost_steps: _Optional[int] = ..., manifest_path: _Optional[str] = ..., direct: _Optional[bool] = ...) -> None: ...

class RestoreBoxes(_message.Message):
    __slots__ = ("names", "cut_of", "cuts")
    class Cut(_message.Message):
        __slots__ = ("scope", "offsets", "lengths")
        SCOPE_FIELD_NUMBER: _ClassVar[int]
        OFFSETS_FIELD_NUMBER: _ClassVar[int]
        LENGTHS_FIELD_NUMBER: _ClassVar[int]
        scope: str
        offsets: _containers.RepeatedScalarFieldContainer[int]
        lengths: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, scope: _Optional[str] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...
    NAMES_FIELD_NUMBER: _ClassVar[int]
    CUT_OF_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    cut_of: _containers.RepeatedScalarFieldContainer[int]
    cuts: _containers.RepeatedCompositeFieldContainer[RestoreBoxes.Cut]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., cut_of: _Optional[_Iterable[int]] = ..., cuts: _Optional[_Iterable[_Union[RestoreBoxes.Cut, _Mapping]]] = ...) -> None: ...

class RestoreWant(_message.Message):
    __slots__ = ("boxes",)
    BOXES_FIELD_NUMBER: _ClassVar[int]
    boxes: RestoreBoxes
    def __init__(self, boxes: _Optional[_Union[RestoreBoxes, _Mapping]] = ...) -> None: ...

class RestoreReady(_message.Message):
    __slots__ = ("batch_id", "paths", "files", "offsets", "error", "local_bytes", "remote_bytes", "decoded_bytes")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REMOTE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DECODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    paths: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    error: str
    local_bytes: int
    remote_bytes: int
    decoded_bytes: int
    def __init__(self, batch_id: _Optional[int] = ..., paths: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., error: _Optional[str] = ..., local_bytes: _Optional[int] = ..., remote_bytes: _Optional[int] = ..., decoded_bytes: _Optional[int] = ...) -> None: ...

class RestoreRelease(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    def __init__(self, batch_id: _Optional[int] = ...) -> None: ...

class RestoreLocate(_message.Message):
    __slots__ = ("boxes", "known")
    BOXES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    boxes: RestoreBoxes
    known: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, boxes: _Optional[_Union[RestoreBoxes, _Mapping]] = ..., known: _Optional[_Iterable[str]] = ...) -> None: ...

class RestoreSources(_message.Message):
    __slots__ = ("slots", "others", "error")
    class Block(_message.Message):
        __slots__ = ("copy", "repeats")
        class Repeat(_message.Message):
            __slots__ = ("count", "src_stride", "dst_stride")
            COUNT_FIELD_NUMBER: _ClassVar[int]
            SRC_STRIDE_FIELD_NUMBER: _ClassVar[int]
            DST_STRIDE_FIELD_NUMBER: _ClassVar[int]
            count: int
            src_stride: int
            dst_stride: int
            def __init__(self, count: _Optional[int] = ..., src_stride: _Optional[int] = ..., dst_stride: _Optional[int] = ...) -> None: ...
        COPY_FIELD_NUMBER: _ClassVar[int]
        REPEATS_FIELD_NUMBER: _ClassVar[int]
        copy: int
        repeats: _containers.RepeatedCompositeFieldContainer[RestoreSources.Block.Repeat]
        def __init__(self, copy: _Optional[int] = ..., repeats: _Optional[_Iterable[_Union[RestoreSources.Block.Repeat, _Mapping]]] = ...) -> None: ...
    class Slot(_message.Message):
        __slots__ = ("node_id", "path", "digests", "address", "object", "file_bytes", "root_digest", "wants", "src_begins", "dst_begins", "run_bytes", "blocks")
        NODE_ID_FIELD_NUMBER: _ClassVar[int]
        PATH_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        ADDRESS_FIELD_NUMBER: _ClassVar[int]
        OBJECT_FIELD_NUMBER: _ClassVar[int]
        FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
        ROOT_DIGEST_FIELD_NUMBER: _ClassVar[int]
        WANTS_FIELD_NUMBER: _ClassVar[int]
        SRC_BEGINS_FIELD_NUMBER: _ClassVar[int]
        DST_BEGINS_FIELD_NUMBER: _ClassVar[int]
        RUN_BYTES_FIELD_NUMBER: _ClassVar[int]
        BLOCKS_FIELD_NUMBER: _ClassVar[int]
        node_id: str
        path: str
        digests: bytes
        address: str
        object: _bulk_pb2.ObjectKey
        file_bytes: int
        root_digest: str
        wants: _containers.RepeatedScalarFieldContainer[int]
        src_begins: _containers.RepeatedScalarFieldContainer[int]
        dst_begins: _containers.RepeatedScalarFieldContainer[int]
        run_bytes: _containers.RepeatedScalarFieldContainer[int]
        blocks: _containers.RepeatedCompositeFieldContainer[RestoreSources.Block]
        def __init__(self, node_id: _Optional[str] = ..., path: _Optional[str] = ..., digests: _Optional[bytes] = ..., address: _Optional[str] = ..., object: _Optional[_Union[_bulk_pb2.ObjectKey, _Mapping]] = ..., file_bytes: _Optional[int] = ..., root_digest: _Optional[str] = ..., wants: _Optional[_Iterable[int]] = ..., src_begins: _Optional[_Iterable[int]] = ..., dst_begins: _Optional[_Iterable[int]] = ..., run_bytes: _Optional[_Iterable[int]] = ..., blocks: _Optional[_Iterable[_Union[RestoreSources.Block, _Mapping]]] = ...) -> None: ...
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[RestoreSources.Slot]
    others: _containers.RepeatedScalarFieldContainer[int]
    error: str
    def __init__(self, slots: _Optional[_Iterable[_Union[RestoreSources.Slot, _Mapping]]] = ..., others: _Optional[_Iterable[int]] = ..., error: _Optional[str] = ...) -> None: ...

class RestoreFault(_message.Message):
    __slots__ = ("node_id", "detail")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    detail: str
    def __init__(self, node_id: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class RestoreDone(_message.Message):
    __slots__ = ("ok", "error", "fetch_s", "load_s", "step", "own_bytes", "peer_bytes")
    OK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    error: str
    fetch_s: float
    load_s: float
    step: int
    own_bytes: int
    peer_bytes: int
    def __init__(self, ok: _Optional[bool] = ..., error: _Optional[str] = ..., fetch_s: _Optional[float] = ..., load_s: _Optional[float] = ..., step: _Optional[int] = ..., own_bytes: _Optional[int] = ..., peer_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("finished",)
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    def __init__(self, finished: _Optional[bool] = ...) -> None: ...

class WorkerError(_message.Message):
    __slots__ = ("code", "message", "fatal")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    fatal: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., fatal: _Optional[bool] = ...) -> None: ...
