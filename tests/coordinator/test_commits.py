"""Membership and commit decisions of the coordinator core: what is relied on, and what is given up."""

from __future__ import annotations

import json
from dataclasses import replace

from snapshotd.v1 import control_pb2 as control
from tests.coordinator.bench import JOB, SETTINGS, Bench, running, slot_ref


def test_all_ranks_attached_completes_the_epoch() -> None:
    bench = running()
    formed = bench.to_node("n0", "epoch_formed")
    assert (list(formed.nodes), formed.m, formed.world_size) == (["n0", "n1"], 1, 2)


def test_a_launch_that_knows_no_epoch_gets_one_when_all_its_ranks_are_there() -> None:
    bench = Bench()
    bench.hello("n0")
    worker = control.WorkerAttached(job=JOB, formation="h:1:0", rank=0, world_size=2, nonce="x")
    bench.node("n0", worker_attached=worker)
    worker = control.WorkerAttached(job=JOB, formation="h:1:0", rank=1, world_size=2, nonce="y", local_rank=1)
    bench.node("n0", worker_attached=worker)
    assert (bench.to_node("n0", "epoch_formed").epoch, bench.to_node("n0", "epoch_formed").formation) == (1, "h:1:0")
    assert "one node only" in bench.to_node("n0", "epoch_formed").reason
    # The same process again changes nothing; another one begins a new round, which needs all ranks again.
    bench.node("n0", worker_attached=worker)
    assert bench.job["epoch"] == 1
    worker.nonce = "z"
    bench.node("n0", worker_attached=worker)
    assert bench.job["epoch"] == 1
    bench.node("n0", worker_attached=control.WorkerAttached(job=JOB, formation="h:1:0", world_size=2, nonce="x2"))
    assert bench.to_node("n0", "epoch_formed").epoch == 2


def test_a_step_is_committed_when_all_nodes_have_built_parity() -> None:
    bench = running()
    bench.sealed("n0", 5, 0)
    assert bench.to_node("n0", "protect") is None
    bench.sealed("n1", 5, 1)
    bench.protect = bench.to_node("n0", "protect")
    assert [member.node_id for member in bench.protect.sets[0].members] == ["n0", "n1"]
    bench.built("n0")
    assert bench.to_node("n0", "committed") is None
    bench.built("n1")
    committed = bench.to_node("n1", "committed")
    assert (committed.epoch, committed.step, committed.level) == (1, 5, control.Committed.LEVEL_PROTECTED)
    assert bench.job["margin"] == 1


def sealed_by_three(**shard: object) -> Bench:
    """A rank on each of three nodes, which have sealed step 5."""
    bench = Bench()
    for index in range(3):
        bench.hello(f"n{index}")
    for index in range(3):
        bench.join(f"a{index}", least=3, most=3)
    for index in range(3):
        bench.attach(f"n{index}", index, epoch=1, world=3)
    for index in range(3):
        bench.sealed(f"n{index}", 5, index, world=3, **shard)
    return bench


def test_a_node_without_parity_of_a_step_promises_its_slot_before_the_commit() -> None:
    """Two nodes of three hold the parity of slots this small. The third may still give way to a newer step."""
    bench = sealed_by_three()
    bench.protect = bench.to_node("n2", "protect")
    bench.built("n0")
    bench.built("n1")
    assert bench.to_node("n0", "committed") is None
    # Its stream breaks, and with it the order or the answer: it is asked again.
    bench.hello("n2", session="n2 again", slots=[slot_ref(5, 2, world=3)], epochs={JOB: 1})
    assert bench.to_node("n0", "committed") is None
    assert bench.to_node("n2 again", "protect") == bench.protect
    bench.node("n2 again", parity_built=control.ParityBuilt(job=JOB, epoch=1, step=5))
    assert bench.to_node("n0", "committed").step == 5


def test_a_node_without_parity_that_has_pledged_its_slot_is_not_asked() -> None:
    bench = sealed_by_three(pledged=True)
    bench.protect = bench.to_node("n0", "protect")
    assert bench.to_node("n1", "protect") == bench.protect
    assert bench.to_node("n2", "protect") is None
    bench.built("n0")
    assert bench.to_node("n0", "committed") is None
    bench.built("n1")
    assert bench.to_node("n2", "committed").step == 5


def test_parity_that_nobody_ordered_here_is_asked_for_with_all_that_its_node_holds() -> None:
    bench = running()
    for step in (5, 6, 7, 8):
        bench.commit(step)
    bench.node("n0", parity_built=control.ParityBuilt(job=JOB, epoch=1, step=6, lanes=[0]))  # an order that is known
    assert bench.last.close == ()
    bench.node("n0", parity_built=control.ParityBuilt(job=JOB, epoch=1, step=3, lanes=[0]))
    assert bench.last.close == ("n0",)
    assert bench.job["counts"]["refused_messages"] == 1


def test_without_peers_a_sealed_step_is_committed_as_sealed() -> None:
    bench = running(replace(SETTINGS, parity=0))
    bench.sealed("n0", 5, 0)
    bench.sealed("n1", 5, 1)
    assert bench.to_node("n0", "committed").level == control.Committed.LEVEL_SEALED


def test_messages_of_an_older_epoch_are_fenced_and_counted() -> None:
    bench = running()
    bench.join("a1", round_=2)
    bench.join("a0", round_=2)
    bench.sealed("n0", 5, 0)
    bench.sealed("n1", 5, 1)
    assert bench.to_node("n0", "protect") is None
    assert bench.job["counts"]["fenced_messages"] == 2
    assert any("refused: step 5" in text for text in bench.notes)


def test_parity_that_fails_gives_the_step_up_with_the_reason() -> None:
    bench = running()
    bench.sealed("n0", 5, 0)
    bench.sealed("n1", 5, 1)
    failed = control.ParityFailed(job=JOB, epoch=1, step=5, reason="disk on fire")
    bench.node("n0", parity_failed=failed)
    abandon = bench.to_node("n1", "abandon")
    assert (abandon.up_to_step, abandon.min_step) == (5, 6)
    assert "disk on fire" in abandon.reason


def test_a_protect_that_takes_too_long_is_given_up() -> None:
    bench = running()
    bench.sealed("n0", 5, 0)
    bench.sealed("n1", 5, 1)
    bench.tick(10.0)
    assert "no parity from n0, n1 within 10 s" in bench.to_node("n0", "abandon").reason


def test_a_step_that_a_rank_left_out_is_abandoned_and_the_slack_grows() -> None:
    bench = running()
    steps = []
    at = 3
    for _ in range(4):
        bench.sealed("n0", at, 0)
        bench.node("n1", skipped=control.NodeSkipped(job=JOB, epoch=1, step=at, rank=1, reason="NO_SLOT"))
        steps.append(bench.to_node("n0", "abandon").min_step - at)
        at = bench.to_node("n0", "abandon").min_step
    assert steps == [1, 2, 3, 5]
    bench.commit(at)
    at += 1
    bench.sealed("n0", at, 0)
    bench.node("n1", skipped=control.NodeSkipped(job=JOB, epoch=1, step=at, rank=1, reason="NO_SLOT"))
    assert bench.to_node("n0", "abandon").min_step == at + 1


def test_of_several_whole_steps_the_latest_wins() -> None:
    bench = running()
    bench.sealed("n0", 5, 0)
    bench.sealed("n1", 5, 1)
    bench.protect = bench.to_node("n0", "protect")
    for step in (6, 7):
        bench.sealed("n0", step, 0)
        bench.sealed("n1", step, 1)
    assert bench.to_node("n0", "protect") is None
    bench.built("n0")
    bench.built("n1")
    assert bench.to_node("n0", "committed").step == 5
    assert bench.to_node("n0", "protect").step == 7


def test_replicas_that_differ_are_not_committed_and_capture_all_from_then_on() -> None:
    bench = running()
    bench.sealed("n0", 5, 0, replica_group="0,1", replica_hash="h", replica_digest="one")
    bench.sealed("n1", 5, 1, replica_group="0,1", replica_hash="h", replica_digest="two")
    mode = bench.to_node("n0", "set_replica_mode")
    assert not mode.split
    assert "differ between ranks 0 and 1" in mode.reason
    assert bench.to_node("n0", "abandon") is not None
    # One rank has heard of it, the other splits still: together they are not the whole state.
    bench.sealed("n0", 8, 0)
    bench.sealed("n1", 8, 1, replica_group="0,1", replica_hash="h")
    assert "rank 1 splits its replicated state with ranks that do not" in bench.to_node("n1", "abandon").reason
    bench.commit(20)
    assert 20 == bench.job["committed"]["step"]


def test_persisting_follows_the_commit_that_is_due_and_is_remembered() -> None:
    bench = Bench()
    for node in ("n0", "n1"):
        bench.hello(node, persist_every_steps=3)
    bench.join("a0")
    bench.join("a1")
    bench.attach("n0", 0, epoch=1)
    bench.attach("n1", 1, epoch=1)
    bench.commit(1)
    assert bench.to_node("n0", "persist") is None
    bench.commit(2)
    assert bench.to_node("n0", "persist").step == 2
    for node in ("n0", "n1"):
        bench.node(node, persist_done=control.PersistDone(job=JOB, epoch=1, step=2, ok=True))
    seal = bench.to_node("n0", "persist_seal")
    assert [slot.rank for slot in seal.slots] == [0, 1]
    durable = control.DurableRef(job=JOB, epoch=1, step=2, world_size=2, path="/d/2")
    bench.node("n0", persist_sealed=control.PersistSealed(durable=durable, ok=True))
    assert json.loads(bench.store[(JOB, "durable")]) == {"durables": [[1, 2, 2, "/d/2"]]}
