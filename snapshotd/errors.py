"""
Every error that snapshotd raises on purpose, with its reason code, exit code and a hint.

* SnapshotdError
  + UsageError                 exit 2   INVALID_ARGUMENT     the caller is wrong
    - LayoutError              exit 2   INVALID_LAYOUT       boxes or layouts that cannot be
    - BudgetError              exit 5   BUDGET_EXCEEDED      room that is not there
  + PeerError
    - PeerUnreachable          exit 3   UNAVAILABLE          nobody answers
    - RemoteProtocolError      exit 1   REMOTE_PROTOCOL      the peer breaks the contract
  + LocalProtocolError         exit 1   LOCAL_PROTOCOL       a bug of ours
  + CorruptionError            exit 7   DATA_LOSS            becomes an erasure inside
    - FormatError              exit 7   BAD_FORMAT           bytes that are not what they claim to be
  + Unrecoverable              exit 6   UNRECOVERABLE        names the newest good step
  + StaleEpoch                 exit 1   STALE_EPOCH          an older membership speaks
  + AccessDenied               exit 4   PERMISSION_DENIED    wrong user, job, or certificate
"""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "BudgetError",
    "CorruptionError",
    "FormatError",
    "LayoutError",
    "LocalProtocolError",
    "PeerError",
    "PeerUnreachable",
    "RemoteProtocolError",
    "SnapshotdError",
    "StaleEpoch",
    "Unrecoverable",
    "UsageError",
]


class SnapshotdError(Exception):
    """The base of all errors of snapshotd; never raised itself."""

    code = "UNKNOWN"
    exit_code = 1
    hint = ""


class UsageError(SnapshotdError):
    """A caller's argument, setting or command is wrong; the message names the fix."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class LayoutError(UsageError):
    """Boxes or layouts that contradict each other or themselves."""

    code = "INVALID_LAYOUT"


class BudgetError(UsageError):
    """More room is needed than the memory budget, the cgroup, the tmpfs or the target's disk has."""

    code = "BUDGET_EXCEEDED"
    exit_code = 5


class PeerError(SnapshotdError):
    """Another process could not do its part."""

    code = "PEER"
    exit_code = 3


class PeerUnreachable(PeerError):
    """Nobody answers at an address in time."""

    code = "UNAVAILABLE"
    hint = "check that the process runs and that the address is right"


class RemoteProtocolError(PeerError):
    """A peer sent what the contract does not allow."""

    code = "REMOTE_PROTOCOL"
    exit_code = 1


class LocalProtocolError(SnapshotdError):
    """We broke our own contract: a bug of snapshotd."""

    code = "LOCAL_PROTOCOL"


class CorruptionError(SnapshotdError):
    """Bytes whose digest does not match; inside the system this is an erasure."""

    code = "DATA_LOSS"
    exit_code = 7


class FormatError(CorruptionError):
    """Bytes that are not the format they claim to be."""

    code = "BAD_FORMAT"


class Unrecoverable(SnapshotdError):
    """More was lost than the redundancy covers; the message names what is left."""

    code = "UNRECOVERABLE"
    exit_code = 6


class StaleEpoch(SnapshotdError):
    """A message of an older membership was refused (fencing)."""

    code = "STALE_EPOCH"


class AccessDenied(SnapshotdError):
    """The wrong user, job or certificate asked."""

    code = "PERMISSION_DENIED"
    exit_code = 4
