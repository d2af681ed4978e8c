"""Rebuilding: up to m losses give the very same bytes, more are refused, and doubtful bytes are never kept."""

from __future__ import annotations

import threading
from itertools import combinations

import pytest

from snapshotd import failpoints
from snapshotd.arena import parity_key, slot_key
from snapshotd.daemon import rebuild as rebuild_module
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.protect import geometry_of
from snapshotd.daemon.rebuild import rebuild
from snapshotd.daemon.seal import digests_of
from snapshotd.daemon.windows import WINDOW_BYTES
from snapshotd.layout import root_digest
from snapshotd.v1 import control_pb2 as control

SIZES = (300_000, 1, 900_000, 90_000, 500_000)
"""Of several units each; a hundredth of it is one."""
EVEN = (600_000, 600_000, 590_000, 600_000)


def protected(cluster, n: int, m: int, sizes=SIZES):
    """n members with slots and parity, and a spare with nothing."""
    nodes = cluster.add(*(f"n{i}" for i in range(n)))
    slots = [cluster.seal_random(node, sizes[i], rank=i, world_size=n) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, m)
    refs = cluster.protect(stripe_set)
    (spare,) = cluster.add("spare")
    return nodes, spare, stripe_set, refs


def objects(node) -> list[str]:
    return [obj.kind for obj in node.arena.sealed()]


def assert_clean(node) -> None:
    assert objects(node) == []
    assert node.arena.used_bytes == node.arena.pooled_bytes


@pytest.mark.parametrize("part", [1, 100])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (4, 2), (5, 2)])
def test_every_loss_of_up_to_m_members_is_rebuilt(cluster, n: int, m: int, part: int) -> None:
    """Nodes die in any combination. A spare decodes what they had, slot and parity, to the same bytes."""
    _, spare, stripe_set, refs = protected(cluster, n, m, [max(1, size // part) for size in SIZES])
    held = {ref.position: ref for ref in refs}
    for count in range(1, m + 1):
        for lost in combinations(range(n), count):
            for position in lost:
                order = cluster.rebuild_order(stripe_set, position, lost=lost, parity=position in held)
                result = cluster.rebuild(spare, order)
                assert (result.done.ok, result.done.reason) == (True, "")
                ref = stripe_set.members[position].slot
                owner = cluster.nodes[f"n{position}"]
                assert result.done.slot == ref
                assert result.slot is spare.arena.find(slot_key(ref))
                assert bytes(result.slot.view) == owner.slot_bytes(ref)
                if position in held:
                    assert result.done.parity == held[position]
                    rebuilt = spare.arena.find(parity_key(held[position]))
                    assert bytes(rebuilt.view) == cluster.parity_bytes(held[position])
                assert (result.done.position, result.done.seconds > 0) == (position, True)
            for obj in spare.arena.sealed():
                spare.arena.delete(obj)
    lost = tuple(range(m + 1))
    result = cluster.rebuild(spare, cluster.rebuild_order(stripe_set, 0, lost=lost))
    assert (result.done.ok, result.slot) == (False, None)
    assert f"needs {n - m} other parts, but there are" in result.done.reason
    assert_clean(spare)


def test_dead_nodes_that_the_coordinator_does_not_know_of_yet(cluster) -> None:
    """Two nodes die within the same second: the order still names the second one."""
    nodes, spare, stripe_set, _ = protected(cluster, 4, 2)
    want = [node.slot_bytes(member.slot) for node, member in zip(nodes, stripe_set.members, strict=True)]
    order = cluster.rebuild_order(stripe_set, 1, lost=(1,))
    nodes[1].kill()
    nodes[2].kill()
    result = cluster.rebuild(spare, order)
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want[1]
    nodes[3].kill()
    spare.arena.delete(result.slot)
    result = cluster.rebuild(spare, order)
    assert not result.done.ok
    assert "lost on the way" in result.done.reason
    assert "on n2: " in result.done.reason
    assert "on n3: " in result.done.reason
    assert_clean(spare)


def test_a_surviving_member_rebuilds_from_what_it_has_itself(cluster) -> None:
    """No spare: a survivor takes the lost slot in, and its own slot and parity are read where they are."""
    nodes, _, stripe_set, _ = protected(cluster, 3, 1)
    want = nodes[2].slot_bytes(stripe_set.members[2].slot)
    order = cluster.rebuild_order(stripe_set, 2, lost=(2,))
    nodes[2].kill()
    result = cluster.rebuild(nodes[0], order)
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    # The order may come twice, and again after the rebuilt slot has rotted.
    assert cluster.rebuild(nodes[0], order).slot is result.slot
    result.slot.view[5000] ^= 1
    again = cluster.rebuild(nodes[0], order)
    assert again.slot is not result.slot
    assert bytes(again.slot.view) == want
    # And what it took in serves as a source for the next loss.
    lost_parity = cluster.rebuild_order(stripe_set, 2, lost=(2,), slot=False, parity=True)
    assert cluster.rebuild(nodes[0], lost_parity).done.ok


def rot(node, ref, every: int = 1) -> None:
    obj = node.arena.find(slot_key(ref) if isinstance(ref, control.SlotRef) else parity_key(ref))
    for at in range(0, obj.file_bytes, every * 1024):
        obj.view[at] ^= 1


@pytest.mark.parametrize("what", ["slot", "parity", "wire"])
def test_rot_in_a_source_is_decoded_around(cluster, what: str) -> None:
    """One node is lost and another has a bad memory module."""
    nodes, spare, stripe_set, refs = protected(cluster, 4, 2, EVEN)
    want = nodes[0].slot_bytes(stripe_set.members[0].slot)
    if what == "slot":
        rot(nodes[1], stripe_set.members[1].slot)
    elif what == "parity":
        rot(nodes[1], refs[1])
    else:
        failpoints.configure("transfer.corrupt_send=corrupt@3")
    result = cluster.rebuild(spare, cluster.rebuild_order(stripe_set, 0, lost=(0,)))
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    assert spare.corruptions
    assert not any(found.local for found in spare.corruptions)


def test_rot_in_different_stripes_of_two_nodes_is_decoded_around(cluster) -> None:
    """One node is lost, and two have one rotten chunk each, in different stripes: no stripe lacks more than two."""
    nodes, spare, stripe_set, _ = protected(cluster, 5, 2, (1_000_000,) * 5)
    geometry = geometry_of(stripe_set)
    want = nodes[0].slot_bytes(stripe_set.members[0].slot)
    # Stripe 1 has the data of 0, 3, 4 and stripe 2 that of 0, 1, 4: without 1 and 4 altogether stripe 2 is lost.
    for position, stripe in ((4, 1), (1, 2)):
        ref = stripe_set.members[position].slot
        begin, end = geometry.unit_range(position, stripe)
        nodes[position].arena.find(slot_key(ref)).view[(begin + end) // 2] ^= 1
    result = cluster.rebuild(spare, cluster.rebuild_order(stripe_set, 0, lost=(0,)))
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    assert len(spare.corruptions) == 2


def test_a_local_source_that_is_rotten_is_reported_as_ours(cluster) -> None:
    nodes, _, stripe_set, _ = protected(cluster, 4, 2, EVEN)
    want = nodes[0].slot_bytes(stripe_set.members[0].slot)
    rot(nodes[1], stripe_set.members[1].slot)
    order = cluster.rebuild_order(stripe_set, 0, lost=(0,))
    nodes[0].kill()
    result = cluster.rebuild(nodes[1], order)
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    local = [found for found in nodes[1].corruptions if found.local]
    assert local[0].slot == stripe_set.members[1].slot
    assert local[0].slot_id == nodes[1].arena.find(slot_key(local[0].slot)).slot_id


def reseal_wrong(node, ref: control.ParityRef) -> None:
    """Parity that was computed wrongly: its digests are valid, and nobody was told its root."""
    obj = node.arena.find(parity_key(ref))
    wrong = node.arena.create_parity(ref, ref.file_bytes)
    wrong.view[:] = bytes(255 - byte for byte in obj.view)
    digests = digests_of(wrong.view, wrong.file_bytes)
    changed = control.ParityRef()
    changed.CopyFrom(ref)
    changed.root_digest = root_digest(digests)
    node.arena.seal(wrong, changed, digests)


def test_wrong_parity_with_right_digests_never_makes_wrong_bytes(cluster) -> None:
    """A daemon with a bug or a bad processor: the root of the lost slot tells, and another parity is tried."""
    nodes, spare, stripe_set, refs = protected(cluster, 4, 2)
    want = nodes[0].slot_bytes(stripe_set.members[0].slot)
    order = cluster.rebuild_order(stripe_set, 0, lost=(0,))
    reseal_wrong(nodes[1], refs[1])
    result = cluster.rebuild(spare, order)
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    spare.arena.delete(result.slot)
    for position in (2, 3):
        reseal_wrong(nodes[position], refs[position])
    result = cluster.rebuild(spare, order)
    assert (result.done.ok, result.slot) == (False, None)
    assert "cannot be decoded to the right bytes" in result.done.reason
    assert_clean(spare)


def test_large_units_with_a_source_that_dies_half_way(cluster, monkeypatch) -> None:
    """The work goes on where it was, with other sources."""
    sizes = (2_600_000, 2_500_000, 2_400_000, 100_000)
    nodes, spare, stripe_set, _ = protected(cluster, 4, 2, sizes)
    want = nodes[0].slot_bytes(stripe_set.members[0].slot)
    order = cluster.rebuild_order(stripe_set, 0, lost=(0,))
    hits = []

    def kill_after_three(name: str) -> None:
        hits.append(name)
        if len(hits) == 3:
            nodes[1].kill()

    monkeypatch.setattr(rebuild_module, "failpoint", kill_after_three)
    result = cluster.rebuild(spare, order)
    assert result.done.ok, result.done.reason
    assert bytes(result.slot.view) == want
    geometry = geometry_of(stripe_set)
    units = [geometry.unit_range(0, geometry.stripe_of(0, unit)) for unit in range(geometry.k)]
    assert len(hits) == sum(-(-(end - begin) // WINDOW_BYTES) for begin, end in units)


def test_cancel_and_failpoints_leave_nothing(cluster) -> None:
    _, spare, stripe_set, _ = protected(cluster, 3, 1)
    order = cluster.rebuild_order(stripe_set, 0, lost=(0,), parity=True)
    failpoints.configure("daemon.mid_rebuild=raise@2")
    with pytest.raises(failpoints.FailpointError):
        cluster.rebuild(spare, order)
    assert_clean(spare)
    failpoints.configure(None)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        rebuild(order, "spare", spare.arena, spare.sources, cluster.codec, cancel)
    assert_clean(spare)


def test_the_slot_stays_when_only_its_parity_cannot_be_made(cluster) -> None:
    """Half of the order is better than nothing: the data is what counts."""
    _, spare, stripe_set, _ = protected(cluster, 3, 1)
    order = cluster.rebuild_order(stripe_set, 0, lost=(0,), parity=True)
    # Its parity rows need the slots of 1 and 2; its slot needs the parity of both, too. Lose slot 2 after the slot.
    alone = cluster.rebuild(spare, cluster.rebuild_order(stripe_set, 0, lost=(0,)))
    assert alone.done.ok
    order.slot_nodes[1] = ""
    order.slot_nodes[2] = ""
    result = cluster.rebuild(spare, order)
    assert (result.done.ok, result.slot) == (False, alone.slot)
    assert result.done.slot == stripe_set.members[0].slot
    assert not result.done.HasField("parity")
    assert "parity row 0 of stripe 0 needs 2 other parts" in result.done.reason
    assert objects(spare) == ["slot"]


def test_orders_that_cannot_be(cluster) -> None:
    _, spare, stripe_set, _ = protected(cluster, 3, 1)
    order = cluster.rebuild_order(stripe_set, 0)
    order.position = 3
    assert "does not fit 3 members" in cluster.rebuild(spare, order).done.reason
    empty = cluster.stripe_set([None, stripe_set.members[1].slot, None], 1)
    assert "had no slot" in cluster.rebuild(spare, cluster.rebuild_order(empty, 0)).done.reason
    without = cluster.stripe_set([member.slot for member in stripe_set.members], 0)
    assert (
        "has no parity"
        in cluster.rebuild(spare, cluster.rebuild_order(without, 0, slot=False, parity=True)).done.reason
    )
    assert_clean(spare)
