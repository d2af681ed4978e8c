"""A tool that reads a job's snapshot keeps it, although the job trains on and needs the room."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapshotd.arena import slot_key
from snapshotd.daemon.held import hold_located
from snapshotd.daemon.persist import export_snapshot
from snapshotd.durable import open_snapshot
from snapshotd.errors import PeerUnreachable
from snapshotd.transfer import ObjectMissing
from snapshotd.v1 import control_pb2 as control


def sealed_step(cluster, step: int) -> control.RestorePlan:
    """A step of two ranks on two nodes, and where it is."""
    for node_id in ("n0", "n1"):
        if node_id not in cluster.nodes:
            cluster.add(node_id)
    nodes = ["n0", "n1"]
    slots = [
        cluster.seal_random(cluster.nodes[node], 300_000, rank=rank, world_size=2, step=step)
        for rank, node in enumerate(nodes)
    ]
    return control.RestorePlan(
        job="job",
        kind=control.RESTORE_KIND_MEMORY,
        source_epoch=1,
        source_step=step,
        source_world_size=2,
        nodes=nodes,
        slots=slots,
        peers=cluster.peers,
    )


def frees(cluster, plan: control.RestorePlan, rank: int) -> bool:
    """What a daemon does when a newer step is committed; says whether the slot may be written again."""
    arena = cluster.nodes[plan.nodes[rank]].arena
    file = arena.find(slot_key(plan.slots[rank]))
    return file is None or arena.invalidate(file)


def test_without_a_hold_the_job_writes_over_what_is_read(cluster, tmp_path: Path) -> None:
    """The fault itself: a restore of minutes finds the second rank's slot gone."""
    plan = sealed_step(cluster, 7)
    (tool,) = cluster.add("tool")
    assert frees(cluster, plan, 1)
    with pytest.raises(ObjectMissing, match="rank 1"):
        export_snapshot(plan, tmp_path / "a", tool.sources)


def test_what_is_held_is_read_to_the_end_while_newer_steps_come(cluster, tmp_path: Path) -> None:
    plan = sealed_step(cluster, 7)
    (tool,) = cluster.add("tool")
    with ExitStack() as stack:
        assert plan == hold_located(tool.client, lambda: plan, stack)
        sealed_step(cluster, 8)
        assert [False, False] == [frees(cluster, plan, rank) for rank in (0, 1)]
        arena = cluster.nodes["n1"].arena
        assert not arena.delete(arena.find(slot_key(plan.slots[1])))  # as a rebuilt slot, or a forgotten job's
        export_snapshot(plan, tmp_path / "a", tool.sources)
    with open_snapshot(tmp_path / "a") as snapshot:
        assert sum(slot.file_bytes for slot in plan.slots) == snapshot.verify()


def test_a_step_that_was_freed_meanwhile_is_asked_for_again(cluster) -> None:
    """A job of short steps frees a slot in the moment between the coordinator's answer and the hold."""
    old, new = sealed_step(cluster, 7), sealed_step(cluster, 8)
    (tool,) = cluster.add("tool")
    frees(cluster, old, 1)
    answers = [old, old, new]
    with ExitStack() as stack:
        assert new == hold_located(tool.client, lambda: answers.pop(0), stack)
        assert [] == answers
        assert not frees(cluster, new, 0)
        deadline = time.monotonic() + 10
        while not frees(cluster, old, 0):  # half of a snapshot is not held, as soon as the server hears of it
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_what_cannot_be_held_is_refused_after_some_tries(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sealed_step(cluster, 7)
    (tool,) = cluster.add("tool")
    frees(cluster, plan, 0)
    monkeypatch.setattr("snapshotd.daemon.held._PAUSE_S", 0.0)
    asked: list[int] = []
    with ExitStack() as stack:
        with pytest.raises(ObjectMissing, match="step 7"):
            hold_located(tool.client, lambda: asked.append(1) or plan, stack)
        assert 50 == len(asked)
        plan.peers.pop(1)
        with pytest.raises(PeerUnreachable, match="n1, which has no known address"):
            hold_located(tool.client, lambda: plan, stack)
