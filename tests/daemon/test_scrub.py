"""Scrubbing: rot is found in what nobody reads, slowly, and nothing else is disturbed."""

from __future__ import annotations

import threading

import pytest

from snapshotd.arena import parity_key, slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.scrub import Scrubbed, scrub_once
from snapshotd.errors import UsageError
from snapshotd.layout import CHUNK_BYTES


def scene(cluster):
    nodes = cluster.add("n0", "n1")
    slots = [cluster.seal_random(node, 1_500_000, rank=i) for i, node in enumerate(nodes)]
    refs = cluster.protect(cluster.stripe_set(slots, 1))
    return nodes[0], slots[0], refs[0]


def test_rot_in_slot_and_parity_is_reported(cluster) -> None:
    """Decoding is possible while only one copy is rotten: it has to be found before the second."""
    node, slot, parity = scene(cluster)
    waits: list[float] = []
    nbytes = slot.file_bytes + parity.file_bytes
    found: list = []
    cancel = threading.Event()
    done = scrub_once(node.arena, 1e6, cancel, found.append, wait=waits.append)
    assert done == Scrubbed(num_objects=2, num_corrupt=0, nbytes=nbytes)
    assert sum(waits) == pytest.approx(nbytes / 1e6)
    assert found == []
    node.arena.find(slot_key(slot)).view[1_000_000] ^= 16
    node.arena.find(parity_key(parity)).view[5] ^= 1
    done = scrub_once(node.arena, 1e6, cancel, found.append, node_id="n0", wait=waits.append)
    assert (done.num_objects, done.num_corrupt) == (2, 2)
    by_kind = {"slot" if item.slot else "parity": item for item in found}
    assert by_kind["slot"].slot == slot
    assert by_kind["slot"].slot_id == node.arena.find(slot_key(slot)).slot_id
    assert by_kind["parity"].parity == parity
    assert all(item.local and item.node_id == "n0" for item in found)
    assert f"chunk {1_000_000 // CHUNK_BYTES} does not match its digest, found by the scrub" in by_kind["slot"].detail


def test_what_is_freed_meanwhile_is_left_out(cluster) -> None:
    node, slot, parity = scene(cluster)
    first = node.arena.sealed()[0]

    def wait(seconds: float) -> None:
        for ref, key in ((slot, slot_key), (parity, parity_key)):
            obj = node.arena.find(key(ref))
            if obj is not None and obj is not first:
                node.arena.delete(obj)

    found: list = []
    done = scrub_once(node.arena, 1e6, threading.Event(), found.append, wait=wait)
    assert (done.num_objects, found) == (1, [])


def test_a_step_that_is_over_is_freed_at_once_however_slow_the_scrub(cluster) -> None:
    """At 64 MB a second a slot of a gigabyte takes 16 s: no step could be captured meanwhile."""
    node, slot, parity = scene(cluster)
    freed: list[bool] = []

    def wait(seconds: float) -> None:
        for obj in node.arena.sealed():
            freed.append(node.arena.invalidate(obj))
            assert node.arena.release(obj)

    done = scrub_once(node.arena, 1e6, threading.Event(), lambda found: None, wait=wait)
    assert ([True, True], 0) == (freed, done.num_corrupt)


def test_it_stops_when_it_is_told_to(cluster) -> None:
    node, _, _ = scene(cluster)
    cancel = threading.Event()
    calls: list[float] = []

    def wait(seconds: float) -> None:
        calls.append(seconds)
        cancel.set()

    with pytest.raises(Cancelled):
        scrub_once(node.arena, 1e6, cancel, lambda found: None, wait=wait)
    assert len(calls) == 1
    with pytest.raises(UsageError):
        scrub_once(node.arena, 0, threading.Event(), lambda found: None)
    assert all(obj.num_leases == 0 for obj in node.arena.sealed())
