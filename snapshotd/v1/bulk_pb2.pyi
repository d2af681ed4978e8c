from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ByteRange(_message.Message):
    __slots__ = ("begin", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: int
    end: int
    def __init__(self, begin: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("begin", "run_bytes", "repeats")
    class Repeat(_message.Message):
        __slots__ = ("count", "stride")
        COUNT_FIELD_NUMBER: _ClassVar[int]
        STRIDE_FIELD_NUMBER: _ClassVar[int]
        count: int
        stride: int
        def __init__(self, count: _Optional[int] = ..., stride: _Optional[int] = ...) -> None: ...
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    RUN_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPEATS_FIELD_NUMBER: _ClassVar[int]
    begin: int
    run_bytes: int
    repeats: _containers.RepeatedCompositeFieldContainer[Block.Repeat]
    def __init__(self, begin: _Optional[int] = ..., run_bytes: _Optional[int] = ..., repeats: _Optional[_Iterable[_Union[Block.Repeat, _Mapping]]] = ...) -> None: ...

class ObjectKey(_message.Message):
    __slots__ = ("job", "epoch", "step", "slot", "parity")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    slot: SlotKey
    parity: ParityKey
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., slot: _Optional[_Union[SlotKey, _Mapping]] = ..., parity: _Optional[_Union[ParityKey, _Mapping]] = ...) -> None: ...

class SlotKey(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class ParityKey(_message.Message):
    __slots__ = ("group", "lane", "position")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    group: int
    lane: int
    position: int
    def __init__(self, group: _Optional[int] = ..., lane: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class BulkRequest(_message.Message):
    __slots__ = ("protocol", "object", "digests", "ranges", "suspect", "blocks", "hold", "exact", "wait_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    object: ObjectKey
    digests: bool
    ranges: _containers.RepeatedCompositeFieldContainer[ByteRange]
    suspect: bool
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    hold: bool
    exact: bool
    wait_ms: int
    def __init__(self, protocol: _Optional[int] = ..., object: _Optional[_Union[ObjectKey, _Mapping]] = ..., digests: _Optional[bool] = ..., ranges: _Optional[_Iterable[_Union[ByteRange, _Mapping]]] = ..., suspect: _Optional[bool] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., hold: _Optional[bool] = ..., exact: _Optional[bool] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class BulkResponse(_message.Message):
    __slots__ = ("ok", "code", "message", "file_bytes", "root_digest", "payload_bytes", "held", "digests", "exact")
    OK_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROOT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    code: str
    message: str
    file_bytes: int
    root_digest: str
    payload_bytes: int
    held: bool
    digests: bytes
    exact: bool
    def __init__(self, ok: _Optional[bool] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., file_bytes: _Optional[int] = ..., root_digest: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., held: _Optional[bool] = ..., digests: _Optional[bytes] = ..., exact: _Optional[bool] = ...) -> None: ...
