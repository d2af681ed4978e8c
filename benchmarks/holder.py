"""
Four nodes in one process: `python -m benchmarks.holder DIRECTORY OUT NBYTES` serves their slots and parity.

Rank r of 4 has the r-th quarter of the rows of each tensor, NBYTES in all; one row of parity lies over them (k = 3).
OUT: a file to write where, and what, in JSON. Plain loops serve three slots beside the bulk listener; see owner.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from base64 import b64encode
from pathlib import Path

import numpy as np

from snapshotd.arena import Arena, slot_key
from snapshotd.daemon.protect import build_parity
from snapshotd.daemon.seal import seal_slot
from snapshotd.daemon.sources import Sources
from snapshotd.erasure import load_codec
from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.transfer import BulkClient, BulkServer
from snapshotd.v1 import control_pb2 as control

from .owner import serve_plainly

JOB, RANKS, ROW = "bench", 4, 1024


def tensors(nbytes: int) -> list[tuple[str, tuple[int, int]]]:
    """Names and global shapes: about 4 MB each, of float32, as the matrices of a small transformer are."""
    count = max(2, nbytes // (4 << 20))
    rows = max(RANKS, nbytes // count // 4 // ROW)
    return [(f"w{i:04d}", (rows + 4 * (i % 3), ROW)) for i in range(count)]


def boxes_of(shape: tuple[int, int], rank: int, ranks: int) -> Box:
    """The rank's share of the rows, as torch splits them."""
    share = -(-shape[0] // ranks)
    begin = min(rank * share, shape[0])
    return Box((begin, 0), (min(begin + share, shape[0]) - begin, shape[1]))


def main(directory: str, out: str, nbytes: str) -> None:
    arena = Arena(Path(directory), budget_bytes=1 << 40)
    noise = np.random.default_rng(0)
    refs = [_seal(arena, rank, int(nbytes), noise) for rank in range(RANKS)]
    members = [control.StripeMember(node_id=f"n{rank}", slot=ref) for rank, ref in enumerate(refs)]
    stripe_set = control.StripeSet(job=JOB, epoch=1, step=1, group=0, lane=0, m=1, members=members)
    order = control.Protect(job=JOB, epoch=1, step=1, sets=[stripe_set])
    servers = [BulkServer(("127.0.0.1", 0), arena.acquire) for _ in range(RANKS)]
    codec, _ = load_codec()
    with BulkClient() as client:
        for rank in range(RANKS):
            build_parity(order, f"n{rank}", arena, Sources(f"n{rank}", arena, client), codec)
    found = {
        "addresses": [server.address_text for server in servers],
        "plain": [serve_plainly(arena.acquire(slot_key(ref)).obj.view, None) for ref in refs[:-1]],
        "plain_bytes": refs[0].file_bytes,
        "set": b64encode(stripe_set.SerializeToString()).decode(),
    }
    part = Path(f"{out}.part")
    part.write_text(json.dumps(found), encoding="ascii")
    gc.freeze()  # as a daemon does
    os.rename(part, out)
    threading.Event().wait()


def _seal(arena: Arena, rank: int, nbytes: int, noise: np.random.Generator) -> control.SlotRef:
    shards = []
    for name, shape in tensors(nbytes):
        box = boxes_of(shape, rank, RANKS)
        shards.append(
            TensorBox(name=name, dtype="float32", global_shape=shape, box=box, scope="global", kind="param")
        )
    layout = Layout.build(shards, meta_capacity=64)
    slot = arena.create_slot(layout.header, layout.file_bytes, job=JOB)
    words = np.frombuffer(slot.view, np.uint8)[len(layout.header) :]
    words[:] = noise.integers(0, 256, len(words), np.uint8)
    slot.view[layout.meta[0] : layout.meta[1]] = b"{}".ljust(layout.meta[1] - layout.meta[0])
    ref = control.SlotRef(
        job=JOB,
        epoch=1,
        step=1,
        rank=rank,
        world_size=RANKS,
        file_bytes=layout.file_bytes,
        layout_hash=layout.hash,
    )
    return seal_slot(arena, slot, ref).ref


if __name__ == "__main__":
    main(*sys.argv[1:])
