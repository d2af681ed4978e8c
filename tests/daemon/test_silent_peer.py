"""A process that is stopped, as a host that froze: its sockets are open, and nothing comes. Nobody else may wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context

import pytest

from snapshotd.daemon.protect import build_parity
from snapshotd.daemon.restore import Restore
from snapshotd.daemon.windows import SourceFailed
from snapshotd.errors import PeerError
from snapshotd.transfer import BulkServer
from snapshotd.v1 import control_pb2 as control

TIMEOUT_S = 5.0  # of the nodes' clients


@contextmanager
def served_by_a_process(node) -> Iterator[tuple[control.PeerAddress, int]]:
    """What the node has, served by a process of its own: its address and pid."""
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        theirs.send(BulkServer(("127.0.0.1", 0), node.arena.acquire).address_text)
        threading.Event().wait()

    child = context.Process(target=run)
    child.start()
    try:
        yield control.PeerAddress(node_id=node.node_id, bulk=ours.recv()), child.pid
    finally:
        child.kill()
        child.join()
        ours.close()
        theirs.close()


def restore_plan(slots, nodes, peers) -> control.RestorePlan:
    return control.RestorePlan(
        job="job",
        epoch=2,
        kind=control.RESTORE_KIND_MEMORY,
        source_epoch=1,
        source_step=7,
        source_world_size=len(slots),
        nodes=nodes,
        slots=slots,
        peers=peers,
    )


def test_a_silent_peer_holds_up_those_who_need_it_and_not_for_long(cluster) -> None:
    here, good, silent = cluster.add("n0", "n1", "n2")
    slots = [cluster.seal_random(node, 600_000, rank=rank) for rank, node in enumerate((here, good, silent))]
    orders = [
        control.Protect(
            job="job",
            epoch=1,
            step=7,
            sets=[cluster.stripe_set([slots[0], slots[other]], 1, lane=other, nodes=["n0", f"n{other}"])],
        )
        for other in (1, 2)
    ]
    with served_by_a_process(silent) as (address, pid), ThreadPoolExecutor(2) as pool:
        peers = [good.address, address]
        here.sources.learn(peers)
        with closing(here.sources.slot(slots[2], "n2")) as source:
            source.digests()  # the connection is there and works
        os.kill(pid, signal.SIGSTOP)

        began = time.monotonic()
        waiting = pool.submit(build_parity, orders[1], "n0", here.arena, here.sources, cluster.codec)
        restoring = pool.submit(Restore, restore_plan(slots, ["n0", "n1", "n2"], peers), 3, here.arena, here.sources)
        refs = build_parity(orders[0], "n0", here.arena, here.sources, cluster.codec)
        with Restore(restore_plan(slots[:2], ["n0", "n1"], peers), 2, here.arena, here.sources) as restore:
            assert restore.manifest(1)
        assert ([1], False, False) == ([ref.set.lane for ref in refs], waiting.done(), restoring.done())

        with pytest.raises(SourceFailed, match="n2.*silent"):
            waiting.result(60)
        with pytest.raises(PeerError, match="silent"):
            restoring.result(60)
        assert TIMEOUT_S < time.monotonic() - began
