from snapshotd.v1 import control_pb2 as _control_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Record(_message.Message):
    __slots__ = ("slot", "parity", "chunk_bytes", "chunk_digests", "sealed_at")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SEALED_AT_FIELD_NUMBER: _ClassVar[int]
    slot: _control_pb2.SlotRef
    parity: _control_pb2.ParityRef
    chunk_bytes: int
    chunk_digests: bytes
    sealed_at: float
    def __init__(self, slot: _Optional[_Union[_control_pb2.SlotRef, _Mapping]] = ..., parity: _Optional[_Union[_control_pb2.ParityRef, _Mapping]] = ..., chunk_bytes: _Optional[int] = ..., chunk_digests: _Optional[bytes] = ..., sealed_at: _Optional[float] = ...) -> None: ...
