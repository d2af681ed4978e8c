"""Slots and parity in tmpfs, owned by the daemon: generations, leases, seal records, digests, memory budget."""

from snapshotd.arena.arena import Arena
from snapshotd.arena.budget import (
    Headroom,
    Need,
    cgroup_headroom,
    check,
    default_budget,
    headroom,
    page_bytes,
)
from snapshotd.arena.files import AnyFile, BufferFile, ParityFile, SealableFile, SlotFile, State
from snapshotd.arena.keys import KeyId, describe, key_id, parity_key, ref_key, slot_key
from snapshotd.arena.lease import Lease

__all__ = [
    "AnyFile",
    "Arena",
    "BufferFile",
    "Headroom",
    "KeyId",
    "Lease",
    "Need",
    "ParityFile",
    "SealableFile",
    "SlotFile",
    "State",
    "cgroup_headroom",
    "check",
    "default_budget",
    "describe",
    "headroom",
    "key_id",
    "page_bytes",
    "parity_key",
    "ref_key",
    "slot_key",
]
