"""The digest of a stripe set: what two who mean the same one compare."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from snapshotd.v1 import control_pb2 as control

__all__ = ["set_digest"]


def set_digest(stripe_set: control.StripeSet) -> int:
    """
    Return the xxh3_64 of a set as it is written: of its members in their order, with the size, the root digest and the
    layout of each slot. Two nodes of the same version, and no others work together, write the same set the same way.
    """
    return xxh3_64_intdigest(stripe_set.SerializeToString(deterministic=True))
