"""Protecting: parity is right, or it is not there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapshotd import failpoints
from snapshotd.arena import slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.protect import build_parity, geometry_of, has_part
from snapshotd.daemon.windows import SourceFailed
from snapshotd.errors import LayoutError, SnapshotdError, UsageError
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1.bulk_pb2 import ObjectKey

SIZES = {2: (30_000, 70_000), 3: (70_000, 1, 30_000), 4: (9_000, 9_000, 70_000, 200), 5: (1000, 2000, 90_000, 4, 5)}


def expected_parity(cluster, stripe_set: control.StripeSet, position: int) -> bytes:
    """The dumb twin: whole units, no windows, zfec's interface."""
    geometry = geometry_of(stripe_set)
    data = [
        cluster.nodes[member.node_id].slot_bytes(member.slot) if member.slot.file_bytes else b""
        for member in stripe_set.members
    ]
    out = bytearray(geometry.parity_bytes(position))
    for row in geometry.parity_rows(position):
        units = []
        for contributor in geometry.contributors(row.stripe):
            begin, end = geometry.unit_range(contributor, row.stripe)
            units.append(data[contributor][begin:end])
        part = bytearray(row.length)
        cluster.codec.encode_row(geometry.k, geometry.m, row.row, units, part)
        out[row.offset : row.offset + row.length] = part
    return bytes(out)


@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (4, 2), (5, 2), (5, 3)])
def test_parity_of_unequal_slots_is_what_the_codec_says(cluster, n: int, m: int, factor: int) -> None:
    """Each node computes its part alone: what they compute must fit together. Slots of one unit and of more."""
    nodes = cluster.add(*(f"n{i}" for i in range(n)))
    slots = [cluster.seal_random(node, factor * SIZES[n][i], rank=i, world_size=n) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, m)
    refs = cluster.protect(stripe_set)
    geometry = geometry_of(stripe_set)
    assert [ref.position for ref in refs] == [p for p in range(n) if geometry.parity_bytes(p)]
    for ref in refs:
        assert ref.set == stripe_set
        assert cluster.parity_bytes(ref) == expected_parity(cluster, stripe_set, ref.position)
    assert cluster.protect(stripe_set) == refs  # the order may come twice


def test_of_small_slots_not_every_node_has_a_part(cluster) -> None:
    nodes = cluster.add("n0", "n1", "n2", "n3")
    slots = [cluster.seal_random(node, 9000, rank=i) for i, node in enumerate(nodes)]
    order = order_for(cluster, cluster.stripe_set(slots, 1))
    assert [has_part(order, node.node_id) for node in nodes] == [True, True, False, False]
    assert build_parity(order, "n3", nodes[3].arena, nodes[3].sources, cluster.codec) == parities(nodes[3]) == []
    wrong = order_for(cluster, cluster.stripe_set(slots, 4))
    assert has_part(wrong, "n3")  # and to build it says what is wrong


def test_large_slots_go_window_by_window(cluster) -> None:
    """Units of many windows, the last one short, and in whole digest chunks."""
    nodes = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 2_500_000 + 100_000 * i, rank=i) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, 1)
    assert geometry_of(stripe_set).unit_bytes > 4 << 20
    for ref in cluster.protect(stripe_set):
        assert cluster.parity_bytes(ref) == expected_parity(cluster, stripe_set, ref.position)


def test_lanes_and_absent_slots(cluster) -> None:
    """Nodes with one and with two ranks in one group: the second lane has members without a slot."""
    nodes = cluster.add("n0", "n1", "n2")
    first = [cluster.seal_random(node, 500_000 * (i + 1), rank=i) for i, node in enumerate(nodes)]
    second = [cluster.seal_random(nodes[1], 700_000, rank=3, lane=1), None]
    sets = [
        cluster.stripe_set(first, 1),
        cluster.stripe_set([None, *second], 1, lane=1),
        cluster.stripe_set([None, None, None], 1, lane=2),
    ]
    refs = cluster.protect(*sets)
    assert [(ref.set.lane, ref.position) for ref in refs] == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 2)]
    for ref in refs:
        assert cluster.parity_bytes(ref) == expected_parity(cluster, sets[ref.set.lane], ref.position)


def test_without_redundancy_nothing_is_built(cluster) -> None:
    (node,) = cluster.add("n0")
    assert cluster.protect(cluster.stripe_set([cluster.seal_random(node, 100)], 0)) == []


def test_pooled_parity_is_overwritten_altogether(cluster) -> None:
    """A file from the pool has old bytes between its rows: the same parity must come out again."""
    nodes = cluster.add(*(f"n{i}" for i in range(4)))
    sizes = (999, 70_003, 57, 1)
    slots = [cluster.seal_random(node, sizes[i], rank=i) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, 2)
    geometry = geometry_of(stripe_set)
    rows = [geometry.parity_rows(position) for position in range(4)]
    assert any(first.length % geometry.granule and second.length for first, second in rows)
    before = cluster.protect(stripe_set)
    for node in nodes:
        for obj in node.arena.sealed():
            if obj.kind == "parity":
                obj.view[:] = b"\xff" * obj.file_bytes
                node.arena.release(obj)
    assert cluster.protect(stripe_set) == before


def order_for(cluster, *sets: control.StripeSet) -> control.Protect:
    return control.Protect(job="job", epoch=1, step=7, sets=sets, peers=cluster.peers)


def parities(node) -> list[str]:
    return [obj.kind for obj in node.arena.sealed() if obj.kind == "parity"]


@pytest.mark.parametrize("where", ["peer", "wire"])
def test_a_flipped_bit_is_not_encoded(cluster, where: str) -> None:
    """Rot between seal and encode would be preserved for ever, with valid digests."""
    nodes = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 50_000, rank=i) for i, node in enumerate(nodes)]
    order = order_for(cluster, cluster.stripe_set(slots, 1))
    if where == "peer":
        view = nodes[1].arena.find(slot_key(slots[1])).view
        for at in range(0, view.nbytes, 1000):
            view[at] ^= 4
    else:
        failpoints.configure("transfer.corrupt_send=corrupt")
    with pytest.raises(SourceFailed, match="does not match its digest|do not make up their root"):
        build_parity(order, "n0", nodes[0].arena, nodes[0].sources, cluster.codec)
    assert parities(nodes[0]) == []
    assert [(found.local, found.node_id) for found in nodes[0].corruptions][-1][0] is False
    failpoints.configure(None)
    if where == "wire":
        assert build_parity(order, "n0", nodes[0].arena, nodes[0].sources, cluster.codec)


def test_a_slot_that_is_not_the_one_meant_is_refused(cluster) -> None:
    """The peer has sealed that step anew since the coordinator was told: another root, valid digests."""
    nodes = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 500_000, rank=i) for i, node in enumerate(nodes)]
    stale = control.SlotRef()
    stale.CopyFrom(slots[1])
    stale.root_digest = "0" * 32
    order = order_for(cluster, cluster.stripe_set([slots[0], stale, slots[2]], 1))
    with pytest.raises(SourceFailed, match="has the root digest .* expected 0000"):
        build_parity(order, "n0", nodes[0].arena, nodes[0].sources, cluster.codec)
    with pytest.raises(SourceFailed):
        build_parity(order, "n2", nodes[2].arena, nodes[2].sources, cluster.codec)


def test_a_dead_or_unknown_peer_is_named(cluster) -> None:
    nodes = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 500_000, rank=i) for i, node in enumerate(nodes)]
    order = order_for(cluster, cluster.stripe_set(slots, 1))
    nodes[0].arena.delete(nodes[0].arena.find(slot_key(slots[0])))
    with pytest.raises(SourceFailed, match="rank 0 .* on n0"):
        build_parity(order, "n2", nodes[2].arena, nodes[2].sources, cluster.codec)
    nodes[1].kill()
    with pytest.raises(SourceFailed, match="rank 1 .* on n1: "):
        build_parity(order, "n0", nodes[0].arena, nodes[0].sources, cluster.codec)
    assert parities(nodes[0]) == []


def test_cancel_and_failpoints_leave_nothing(cluster) -> None:
    """A newer step overtakes an older one: half of its parity must not eat the budget."""
    nodes = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 800_000, rank=i) for i, node in enumerate(nodes)]
    two = cluster.stripe_set(slots, 1), cluster.stripe_set([None, *slots[1:]], 1, lane=1)
    order = order_for(cluster, *two)
    node = nodes[0]
    free = node.arena.used_bytes
    for site in ("before_encode", "mid_encode", "after_encode"):
        for hit in (1, 2):
            failpoints.configure(f"daemon.{site}=raise@{hit}")
            if (site, hit) == ("before_encode", 2):
                continue
            with pytest.raises(failpoints.FailpointError):
                build_parity(order, "n0", node.arena, node.sources, cluster.codec)
            assert parities(node) == []
            assert node.arena.used_bytes - node.arena.pooled_bytes == free
    failpoints.configure(None)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        build_parity(order, "n0", node.arena, node.sources, cluster.codec, cancel)
    assert parities(node) == []


def test_orders_that_contradict_themselves_are_refused(cluster) -> None:
    nodes = cluster.add("n0", "n1")
    slots = [cluster.seal_random(node, 10, rank=i) for i, node in enumerate(nodes)]
    other = control.SlotRef()
    other.CopyFrom(slots[1])
    other.step = 8
    for stripe_set, error in (
        (cluster.stripe_set(slots, 2), LayoutError),
        (cluster.stripe_set([slots[0], other], 1), UsageError),
    ):
        with pytest.raises(error):
            build_parity(order_for(cluster, stripe_set), "n0", nodes[0].arena, nodes[0].sources, cluster.codec)
    wrong = order_for(cluster, cluster.stripe_set(slots, 1))
    wrong.step = 9
    with pytest.raises(UsageError, match="order for step 9"):
        build_parity(wrong, "n0", nodes[0].arena, nodes[0].sources, cluster.codec)


def test_a_group_with_the_bytes_of_one_member_only(cluster) -> None:
    """A rank without any state still has a header: all other units are zeros that nobody sends."""
    nodes = cluster.add("n0", "n1", "n2")
    stripe_set = cluster.stripe_set([cluster.seal(nodes[0], []), None, None], 2)
    for ref in cluster.protect(stripe_set):
        assert cluster.parity_bytes(ref) == expected_parity(cluster, stripe_set, ref.position)


# ---------------------------------------------------------------- without an order


def as_it_stands(cluster, stripe_set: control.StripeSet, node_id: str) -> control.Protect:
    """What is built without an order: the node knows its own slot, and of the others how large they are."""
    for node in cluster.nodes.values():
        node.sources.learn(cluster.peers)
    again = control.StripeSet()
    again.CopyFrom(stripe_set)
    for member in again.members:
        if member.node_id != node_id:
            member.slot.root_digest = ""
    return control.Protect(job="job", epoch=1, step=7, sets=[again])


@pytest.mark.parametrize("elements", [9000, 500_000])
def test_without_an_order_the_same_parity_and_the_same_record_come_out(cluster, elements: int) -> None:
    """Of small slots a node is a member of the set that reads nothing of some of them: it learns who they are."""
    nodes = cluster.add("n0", "n1", "n2", "n3")
    slots = [cluster.seal_random(node, elements + i, rank=i) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, 1)
    built = []
    for node in nodes:
        order = as_it_stands(cluster, stripe_set, node.node_id)
        built += build_parity(order, node.node_id, node.arena, node.sources, cluster.codec)
    assert [ref.position for ref in built] == ([0, 1] if elements == 9000 else [0, 1, 2, 3])
    for ref in built:
        assert ref.set == stripe_set
        assert cluster.parity_bytes(ref) == expected_parity(cluster, stripe_set, ref.position)
    assert cluster.protect(stripe_set) == built


@pytest.mark.parametrize("read", ["its bytes", "who it is"])
def test_a_slot_that_is_sealed_a_little_later_is_waited_for(cluster, read: str) -> None:
    nodes = cluster.add("n0", "n1", "n2", "n3")
    slots = [cluster.seal_random(node, 9000, rank=i) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, 1)
    me = nodes[0 if read == "its bytes" else 1]
    nodes[2].arena.delete(nodes[2].arena.find(slot_key(slots[2])))
    asked, wait_sealed = threading.Event(), nodes[2].arena.wait_sealed

    def wait(key: ObjectKey, timeout_s: float) -> None:
        asked.set()
        wait_sealed(key, 60.0)

    nodes[2].server._objects._wait = wait
    with ThreadPoolExecutor(1) as pool:
        order = as_it_stands(cluster, stripe_set, me.node_id)
        building = pool.submit(build_parity, order, me.node_id, me.arena, me.sources, cluster.codec)
        assert asked.wait(60.0)
        assert not building.done()
        assert cluster.seal_random(nodes[2], 9000, rank=2) == slots[2]
        (ref,) = building.result(60.0)
    assert ref.set == stripe_set
    assert cluster.parity_bytes(ref) == expected_parity(cluster, stripe_set, ref.position)


def test_a_slot_that_is_not_sealed_is_not_waited_for_for_ever(cluster) -> None:
    nodes = cluster.add("n0", "n1", "n2", "n3")
    slots = [cluster.seal_random(node, 9000, rank=i) for i, node in enumerate(nodes)]
    stripe_set = cluster.stripe_set(slots, 1)
    nodes[2].arena.delete(nodes[2].arena.find(slot_key(slots[2])))
    for node in nodes[:2]:
        order = as_it_stands(cluster, stripe_set, node.node_id)
        with pytest.raises(SnapshotdError, match=r"slot of rank 2 .* is not sealed here"):
            build_parity(order, node.node_id, node.arena, node.sources, cluster.codec)
        assert parities(node) == []
