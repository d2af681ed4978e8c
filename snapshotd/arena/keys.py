"""Names of things in an arena: the ObjectKey of the wire, and the hashable form that dictionaries need."""

from __future__ import annotations

from typing import Literal, NamedTuple

from snapshotd.errors import UsageError
from snapshotd.v1.bulk_pb2 import ObjectKey, ParityKey, SlotKey
from snapshotd.v1.control_pb2 import ParityRef, SlotRef

__all__ = ["KeyId", "describe", "key_id", "parity_key", "ref_key", "slot_key"]


class KeyId(NamedTuple):
    """An ObjectKey as a value: hashable and ordered. ``place`` is (rank,), or (group, lane, position) for parity."""

    job: str
    epoch: int
    step: int
    kind: Literal["slot", "parity"]
    place: tuple[int, ...]


def key_id(key: ObjectKey) -> KeyId:
    """Return the hashable form of ``key``. UsageError when it says neither slot nor parity."""
    kind = key.WhichOneof("kind")
    if kind == "slot":
        return KeyId(key.job, key.epoch, key.step, "slot", (key.slot.rank,))
    if kind == "parity":
        parity = key.parity
        return KeyId(key.job, key.epoch, key.step, "parity", (parity.group, parity.lane, parity.position))
    raise UsageError("an object key names neither a slot nor a parity file")


def slot_key(ref: SlotRef) -> ObjectKey:
    """Return the key under which the slot of ``ref`` is found."""
    return ObjectKey(job=ref.job, epoch=ref.epoch, step=ref.step, slot=SlotKey(rank=ref.rank))


def parity_key(ref: ParityRef) -> ObjectKey:
    """Return the key under which the parity file of ``ref`` is found."""
    place = ParityKey(group=ref.set.group, lane=ref.set.lane, position=ref.position)
    return ObjectKey(job=ref.set.job, epoch=ref.set.epoch, step=ref.set.step, parity=place)


def ref_key(ref: SlotRef | ParityRef) -> KeyId:
    """Return the hashable key under which the file of ``ref`` is found."""
    if isinstance(ref, SlotRef):
        return KeyId(ref.job, ref.epoch, ref.step, "slot", (ref.rank,))
    of = ref.set
    return KeyId(of.job, of.epoch, of.step, "parity", (of.group, of.lane, ref.position))


def describe(key: ObjectKey) -> str:
    """Return words for messages, as in ``slot of rank 3 of job J, epoch 2, step 17``."""
    kind = key.WhichOneof("kind")
    if kind == "slot":
        what = f"slot of rank {key.slot.rank}"
    elif kind == "parity":
        what = f"parity {key.parity.position} of group {key.parity.group}, lane {key.parity.lane},"
    else:
        what = "nothing"
    return f"{what} of job {key.job[:128]!r}, epoch {key.epoch}, step {key.step}"
