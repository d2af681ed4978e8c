"""Digest: hashing a slot's chunks, against bare xxh3 of the same chunks, and of all bytes in one call."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from snapshotd.daemon.seal import digests_of
from snapshotd.layout import CHUNK_BYTES

from .. import Row, Run

GOAL = 4
SECONDS = 4


def rows(run: Run) -> Iterator[Row]:
    slot = run.memory(run.size())

    def chunks() -> None:
        for begin in range(0, slot.nbytes, CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(slot[begin : begin + CHUNK_BYTES])

    found = run.rounds(
        {
            "ours": lambda: digests_of(slot, slot.nbytes) and None,
            "chunks": chunks,
            "whole": lambda: xxhash.xxh3_64_digest(slot) and None,
        },
        rounds=21,
        within_s=10.0,
    )
    for against, name, at_least in (
        ("bare xxh3, chunk by chunk", "chunks", 0.9),
        # Each call finds the caches full of the bytes before it: 0.7 us of 5 on the fastest core seen.
        ("bare xxh3 of all bytes in one call", "whole", None),
    ):
        yield Row.speed(
            "digests of a slot, one core" + ("" if at_least else ", beside one digest"),
            found["ours"],
            found[name],
            at_least=at_least,
            against=against,
            nbytes=slot.nbytes,
        )
