"""Layouts that a node knows before it needs them: the right ones, or they are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from snapshotd.daemon.layouts import Layouts
from snapshotd.daemon.orders import Orders
from snapshotd.daemon.restore import Restore
from snapshotd.errors import FormatError, PeerError
from snapshotd.v1 import control_pb2 as control
from tests.daemon.test_restore import boxes, check, plan_of, sealed_state, shards_of, wants_of


@pytest.fixture
def layouts() -> Iterator[Layouts]:
    made = Layouts()
    yield made
    made.close()


@pytest.fixture
def scene(cluster) -> tuple[control.RestorePlan, control.StripeSet, object]:
    """Three ranks on three nodes, which are one parity group, and a fourth node, that has nothing."""
    plan = sealed_state(cluster, 3)
    (node,) = cluster.add("reader")
    node.sources.learn(cluster.peers)
    return plan, cluster.stripe_set(list(plan.slots), 1), node


def learn(layouts: Layouts, stripe_set: control.StripeSet, node) -> None:
    learning = layouts.learn([stripe_set], node.sources)
    assert learning is not None
    learning.result(30.0)


def num_requests(cluster) -> int:
    return sum(node.server.counters()["requests"] for node in cluster.nodes.values())


def test_what_is_known_is_not_read_again_and_gives_the_same_bytes(cluster, scene, layouts) -> None:
    plan, stripe_set, node = scene
    learn(layouts, stripe_set, node)
    before = num_requests(cluster)
    assert before
    with Restore(plan, 2, node.arena, node.sources, layouts) as restore:
        assert before == num_requests(cluster)
        for rank in range(2):
            wants = wants_of(rank, 2)
            check(restore.assemble(rank, boxes(wants)), wants)
        known = restore.manifest(1)
    with Restore(plan, 2, node.arena, node.sources) as restore:
        assert restore.manifest(1) == known
    assert layouts.learn([stripe_set], node.sources) is None


def test_another_layout_of_the_same_job_is_read(cluster, scene, layouts) -> None:
    """The job goes on with two ranks: what was known of three is not taken for theirs."""
    _, stripe_set, node = scene
    learn(layouts, stripe_set, node)
    slots = [
        cluster.seal(cluster.nodes[f"n{rank}"], shards_of(rank, 2), rank=rank, world_size=2, epoch=2)
        for rank in range(2)
    ]
    other = plan_of(cluster, slots, ["n0", "n1"])
    other.source_epoch = 2
    with Restore(other, 1, node.arena, node.sources, layouts) as restore:
        check(restore.assemble(0, boxes(wants_of(0, 1))), wants_of(0, 1))


def test_a_daemon_learns_what_it_protects(cluster) -> None:
    plan = sealed_state(cluster, 3)
    node = cluster.nodes["n0"]
    orders = Orders(
        node_id="n0",
        arena=node.arena,
        sources=node.sources,
        codec=cluster.codec,
        persist_root=None,
        persist_keep=1,
    )
    stripe_set = cluster.stripe_set(list(plan.slots), 1)
    order = control.Protect(job="job", epoch=1, step=7, sets=[stripe_set], peers=cluster.peers)
    orders.build_parity(order, threading.Event())
    learning = orders._layouts.learn([stripe_set], node.sources)
    if learning is not None:
        learning.result(30.0)
    assert {slot.layout_hash for slot in plan.slots} == set(orders._layouts._known)
    orders.close()
    stripe_set.members[0].slot.layout_hash = "0" * 32
    assert orders._layouts.learn([stripe_set], node.sources) is None


def test_no_more_than_so_much_is_kept_and_what_is_gone_is_read(cluster, scene) -> None:
    plan, stripe_set, node = scene
    layouts = Layouts(max_bytes=2 * 4096)  # two of three
    learn(layouts, stripe_set, node)
    assert 2 == len(layouts._known)
    assert layouts.learn([stripe_set], node.sources) is None  # or it would go round and round, each step
    before = num_requests(cluster)
    with Restore(plan, 1, node.arena, node.sources, layouts) as restore:
        assert before < num_requests(cluster)
        check(restore.assemble(0, boxes(wants_of(0, 1))), wants_of(0, 1))
    assert 2 == len(layouts._known)
    layouts.close()


def test_a_peer_that_is_away_is_asked_again_later(cluster, scene, layouts) -> None:
    plan, stripe_set, node = scene
    cluster.nodes["n1"].kill()
    learn(layouts, stripe_set, node)
    assert {plan.slots[0].layout_hash, plan.slots[2].layout_hash} == set(layouts._known)
    assert layouts.learn([stripe_set], node.sources) is not None
    with pytest.raises(PeerError):
        Restore(plan, 1, node.arena, node.sources, layouts)


def test_a_slot_with_another_layout_than_it_is_said_to_have_is_refused(cluster, scene, layouts) -> None:
    plan, _, node = scene
    plan.slots[1].layout_hash = plan.slots[0].layout_hash[::-1]
    with pytest.raises(FormatError, match="rank 1 of step 7 has the layout"):
        Restore(plan, 1, node.arena, node.sources, layouts)
    with pytest.raises(FormatError):
        Restore(plan_of(cluster, list(plan.slots), list(plan.nodes)), 1, node.arena, node.sources)
