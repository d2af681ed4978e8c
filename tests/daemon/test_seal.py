"""Sealing: what counts is what the worker said it would write."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from snapshotd import failpoints
from snapshotd.arena import slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.seal import digests_of, seal_slot
from snapshotd.errors import CorruptionError
from snapshotd.layout import Box, KnownDigests, Layout, TensorBox, chunk_digests, root_digest
from snapshotd.v1 import control_pb2 as control


def make(elements: int) -> tuple[Layout, control.SlotRef]:
    box = TensorBox(
        name="w", dtype="float32", global_shape=(elements,), box=Box.whole((elements,)), scope="global", kind="param"
    )
    layout = Layout.build([box], meta_capacity=100)
    ref = control.SlotRef(job="job", epoch=1, step=3, rank=0, world_size=1, file_bytes=layout.file_bytes)
    ref.layout_hash = layout.hash
    return layout, ref


def fill(slot, layout: Layout, seed: int, meta: bytes) -> None:
    shard = layout.shards[0]
    values = np.random.default_rng(seed).random(shard.nbytes // 4, np.float32)
    slot.view[shard.begin : shard.end] = values.tobytes()
    slot.view[layout.meta[0] : layout.meta[1]] = meta.ljust(100)


@pytest.mark.parametrize("elements", [1, 1000, 65_536, 300_000])
def test_the_data_digest_sees_tensors_and_not_the_json(cluster, elements: int) -> None:
    """Two steps with the same tensors are an alarm, also in a tiny model, though the step's JSON differs."""
    (node,) = cluster.add("n0")
    layout, ref = make(elements)
    found = []
    for seed, meta in ((1, b'{"step": 3}'), (1, b'{"step": 4}'), (2, b'{"step": 4}')):
        slot = node.arena.create_slot(layout.header, layout.file_bytes)
        fill(slot, layout, seed, meta)
        data = bytes(slot.view)
        sealed = seal_slot(node.arena, slot, ref)
        assert sealed.digests == chunk_digests(data, len(data))
        assert sealed.ref.root_digest == root_digest(sealed.digests)
        assert ref.root_digest == ""
        assert node.arena.find(slot_key(ref)) is slot
        found.append((sealed.data_digest, sealed.ref.root_digest))
    assert found[0][0] == found[1][0] != found[2][0]
    assert len({root for _, root in found}) == 3


@pytest.mark.parametrize("at", [0, 9, 4000])
def test_a_worker_that_wrote_over_the_header_is_refused(cluster, at: int) -> None:
    """A stray write in the trainer must not become a snapshot that nobody can read."""
    (node,) = cluster.add("n0")
    layout, ref = make(1000)
    slot = node.arena.create_slot(layout.header, layout.file_bytes)
    slot.view[at] ^= 1
    with pytest.raises(CorruptionError, match="wrote over the slot's header"):
        seal_slot(node.arena, slot, ref)
    assert node.arena.sealed() == []
    slot.view[at] ^= 1
    assert seal_slot(node.arena, slot, ref).ref.root_digest


def test_sizes_must_agree_and_a_cancel_leaves_the_slot_open(cluster) -> None:
    (node,) = cluster.add("n0")
    layout, ref = make(1000)
    slot = node.arena.create_slot(layout.header, layout.file_bytes)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        seal_slot(node.arena, slot, ref, cancel)
    ref.file_bytes += 1
    with pytest.raises(CorruptionError, match="were to be sealed"):
        seal_slot(node.arena, slot, ref)
    assert node.arena.sealed() == []


@pytest.mark.parametrize("site", ["daemon.before_hash", "daemon.after_hash"])
def test_a_failure_before_the_record_leaves_nothing_sealed(cluster, site: str) -> None:
    (node,) = cluster.add("n0")
    layout, ref = make(1000)
    slot = node.arena.create_slot(layout.header, layout.file_bytes)
    failpoints.configure(f"{site}=raise@1")
    with pytest.raises(failpoints.FailpointError):
        seal_slot(node.arena, slot, ref)
    assert node.arena.sealed() == []


@pytest.mark.parametrize("nbytes", [0, 1, (64 << 20) - 1, 128 << 20, (192 << 20) + 5, (350 << 20) + 262_144])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_many_threads_find_the_same_digests(nbytes: int, threads: int) -> None:
    """Breaks: on a node with many cores chunks are left out, or come in another order."""
    data = np.arange(nbytes // 8 + 1, dtype=np.uint64).view(np.uint8)[:nbytes]
    found = digests_of(memoryview(data), nbytes, max_threads=threads)
    assert chunk_digests(data, nbytes) == found


def test_each_thread_hears_of_a_cancel() -> None:
    """Breaks: a daemon that is to end hashes some more gigabytes."""
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        digests_of(memoryview(np.zeros(256 << 20, np.uint8)), 256 << 20, cancel, max_threads=4)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_the_worker_has_hashed_is_not_hashed_again(threads: int) -> None:
    """Breaks: a capture costs a second reading of all its bytes; or chunks that nobody hashed have no digest."""
    nbytes = (150 << 20) + 5
    data = np.arange(nbytes // 8 + 1, dtype=np.uint64).view(np.uint8)[:nbytes]
    expected = bytearray(chunk_digests(data, nbytes))
    known = [KnownDigests(1190, b"\x02" * 80), KnownDigests(0, b"\x01" * 8), KnownDigests(3, b"\x03" * 8 * 600)]
    for first, found in known:  # other than they are: to be seen
        expected[8 * first : 8 * first + len(found)] = found
    found = digests_of(memoryview(data), nbytes, known=known, max_threads=threads)
    assert found == bytes(expected)


@pytest.mark.parametrize(
    "known",
    [
        [KnownDigests(0, bytes(7))],
        [KnownDigests(9, bytes(8))],  # the last chunk is not whole
        [KnownDigests(8, bytes(16))],
        [KnownDigests(1 << 60, bytes(8))],
        [KnownDigests(0, bytes(16)), KnownDigests(1, bytes(8))],
    ],
)
def test_digests_of_chunks_that_there_are_not_are_refused(cluster, known: list[KnownDigests]) -> None:
    """Breaks: a broken worker ends the daemon, or has digests recorded that belong to other bytes."""
    (node,) = cluster.add("n0")
    layout, ref = make((9 * 131_072 + 70_000) // 4)
    slot = node.arena.create_slot(layout.header, layout.file_bytes)
    fill(slot, layout, 1, b"{}")
    with pytest.raises(CorruptionError, match="bytes of digests from chunk"):
        seal_slot(node.arena, slot, ref, known=known)
    assert node.arena.sealed() == []
    assert seal_slot(node.arena, slot, ref).ref.root_digest
