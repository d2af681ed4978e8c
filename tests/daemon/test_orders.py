"""The orders bound to a node: rot that a peer meets is verified, reported and counted by its owner."""

from __future__ import annotations

from contextlib import closing

import pytest

from snapshotd.arena import slot_key
from snapshotd.daemon import events
from snapshotd.daemon.orders import Orders
from snapshotd.errors import CorruptionError
from snapshotd.transfer import BulkServer
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.daemon.conftest import flip


def orders_of(node, cluster, found: list[events.CorruptionFound], counts: dict[str, int]) -> Orders:
    orders = Orders(
        node_id=node.node_id,
        arena=node.arena,
        sources=node.sources,
        codec=cluster.codec,
        persist_root=None,
        persist_keep=1,
    )
    orders.on_corruption = found.append
    orders.on_count = lambda name, amount: counts.update({name: counts.get(name, 0) + amount})
    node.server.close()
    node.server = BulkServer(("127.0.0.1", 0), node.arena.acquire, suspected=orders.suspected)
    return orders


@pytest.mark.parametrize("rotten", [True, False])
def test_the_owner_hears_of_rot_that_a_peer_met(cluster, rotten: bool) -> None:
    """Rot that only readers know of is never rebuilt, and the next loss of a node makes it a loss of the snapshot."""
    owner, reader = cluster.add("n0", "n1")
    ref = cluster.seal_random(owner, 1000)
    found: list[events.CorruptionFound] = []
    counts: dict[str, int] = {}
    orders_of(owner, cluster, found, counts)
    if rotten:
        flip(owner.arena.find(slot_key(ref)).view, ref.file_bytes - 1)
        reader.sources.learn(cluster.peers)
        source = reader.sources.slot(ref, "n0")
        with pytest.raises(CorruptionError):
            source.fetch(0, ref.file_bytes, memoryview(bytearray(ref.file_bytes)))
        assert [ref] == [one.ref for one in found]
        assert {"corrupt": 1} == counts
        assert not reader.corruptions[-1].local
    else:
        # Hurt on the way only: the owner verifies, and finds nothing.
        reader.client.suspect(owner.server.address_text, slot_key(ref))
        assert ([], {}) == (found, counts)


def test_a_restore_that_fails_for_good_is_said_once(cluster, caplog) -> None:
    """The worker asks on, twenty times a second."""
    (node,) = cluster.add("n0")
    query = worker.Frame(request_id=1, restore_query=worker.RestoreQuery())
    with closing(orders_of(node, cluster, [], {})) as orders:
        for step in (1, 1, 2, 1):
            plan = control.RestorePlan(job="job", epoch=2, source_epoch=1, source_step=step)  # of no kind
            answer = orders.serve_restore(events.WorkerConn(1), 0, 1, plan, query)
            assert "no bytes to restore" in answer.restore_decision.reason
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert ["step 1", "step 2", "step 1"] == [text.partition("from ")[2][:6] for text in said]
