"""One call to the coordinator from a tool, with its errors turned into ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from snapshotd.errors import (
    AccessDenied,
    PeerUnreachable,
    RemoteProtocolError,
    SnapshotdError,
    Unrecoverable,
    UsageError,
)
from snapshotd.rpc import open_channel
from snapshotd.settings import ToolSettings
from snapshotd.v1 import control_pb2_grpc as control_grpc
from snapshotd.workersocket import ask_who

__all__ = ["ask"]

_DEFAULT = "127.0.0.1:7070"

T = TypeVar("T")

_ERRORS: dict[grpc.StatusCode, type[SnapshotdError]] = {
    grpc.StatusCode.UNAVAILABLE: PeerUnreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: PeerUnreachable,
    grpc.StatusCode.INVALID_ARGUMENT: UsageError,
    grpc.StatusCode.NOT_FOUND: UsageError,
    grpc.StatusCode.DATA_LOSS: Unrecoverable,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
}


def ask(settings: ToolSettings, call: Callable[[control_grpc.CoordinatorServiceStub], T]) -> T:
    """The answer to one call; PeerUnreachable names the address that did not answer."""
    address = settings.coordinator or _nearest()
    with open_channel(address, tls=settings.tls, insecure=settings.insecure) as channel:
        try:
            return call(control_grpc.CoordinatorServiceStub(channel))
        except grpc.RpcError as error:
            kind = _ERRORS.get(error.code(), RemoteProtocolError)
            words = error.details() or str(error.code())
            if kind is PeerUnreachable:
                words = f"no coordinator answers at {address} ({words})"
            raise kind(words) from error


def _nearest() -> str:
    """The coordinator of this node's daemon; where there is no daemon, the default address."""
    daemon = ask_who()
    return _DEFAULT if daemon is None or not daemon.coordinator else daemon.coordinator
