"""Digest: hashing a slot's chunks, against bare xxh3 of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from snapshotd.daemon.seal import digests_of

from .. import Row, Run

GOAL = 4


def rows(run: Run) -> Iterator[Row]:
    slot = run.memory(run.size())
    found = run.rounds(
        {
            "ours": lambda: digests_of(slot, slot.nbytes) and None,
            "floor": lambda: xxhash.xxh3_64_digest(slot) and None,
        }
    )
    yield Row.speed(
        "digests of a slot, one core",
        found["ours"],
        found["floor"],
        at_least=0.9,
        against="bare xxh3",
        nbytes=slot.nbytes,
    )
