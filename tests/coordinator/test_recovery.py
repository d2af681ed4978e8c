"""Recovery decisions of the coordinator core: what an epoch goes on from, what is rebuilt, what tools are told."""

from __future__ import annotations

from typing import Any

import pytest

from snapshotd.coordinator.events import (
    AgentSessionEnded,
    ForgetWanted,
    NodeSessionEnded,
    SessionId,
    SnapshotWanted,
)
from snapshotd.v1 import control_pb2 as control
from tests.coordinator.bench import JOB, Bench, running, slot_ref


def broken(bench: Bench, *, lost: str = "") -> Bench:
    """Epoch 2 begins on the same nodes, or with n2 in the place of the lost one."""
    if lost:
        bench.hello("n2")
        bench.join("a2")
        agent = lost.replace("n", "a")
        bench.handle(NodeSessionEnded(session=SessionId(lost)))
        bench.handle(AgentSessionEnded(session=SessionId(agent)))
        bench.tick(1.0)
        bench.tick(1.0)
    agents = [agent for agent in ("a0", "a1") if agent != lost.replace("n", "a")]
    for agent in agents:
        bench.join(agent, round_=2)
    return bench


def test_a_new_job_starts_afresh() -> None:
    bench = running()
    assert bench.to_node("n0", "restore_plan").kind == control.RESTORE_KIND_FRESH


def test_a_restarted_worker_goes_on_from_the_newest_sealed_step_even_if_it_is_not_committed() -> None:
    bench = running()
    bench.commit(5)
    bench.sealed("n0", 6, 0)
    bench.sealed("n1", 6, 1)
    broken(bench)
    bench.attach("n0", 0, epoch=2)
    bench.attach("n1", 1, epoch=2)
    plan = bench.to_node("n0", "restore_plan")
    assert (plan.kind, plan.source_epoch, plan.source_step) == (control.RESTORE_KIND_MEMORY, 1, 6)
    assert plan.lost_steps == 0
    # Step 6 has no parity: the protected step 5 stays until step 6 is as safe, or a newer one is.
    assert [(keep.epoch, keep.step) for keep in bench.to_node("n0", "drop").keep] == [(1, 5), (1, 6)]


def worker_gone_while_hashing(bench: Bench) -> None:
    gone = control.WorkerDetached(job=JOB, epoch=1, rank=1, nonce="w1.1", sealing=[slot_ref(6, 1)])
    bench.node("n1", worker_detached=gone)
    broken(bench)
    bench.attach("n0", 0, epoch=2)
    bench.attach("n1", 1, epoch=2)


def still_hashing(bench: Bench) -> None:
    """All ranks have handed over step 6; n1 hashes it when its worker dies, and epoch 2 begins."""
    bench.commit(5)
    bench.sealed("n0", 6, 0)
    worker_gone_while_hashing(bench)
    bench.tick(1.0)
    assert bench.to_node("n0", "restore_plan") is None
    assert "waiting for n1: what its workers sealed last is being hashed" in bench.notes


def test_a_decision_waits_for_what_a_dead_worker_handed_over_and_is_still_being_hashed() -> None:
    bench = running()
    still_hashing(bench)
    bench.node("n1", inventory_change=control.InventoryChange(slots_added=[slot_ref(6, 1)]))
    plan = bench.to_node("n0", "restore_plan")
    assert (plan.kind, plan.source_step, plan.lost_steps) == (control.RESTORE_KIND_MEMORY, 6, 0)


def test_a_decision_does_not_wait_for_a_slot_that_was_not_sealed_after_all() -> None:
    bench = running()
    still_hashing(bench)
    bench.node("n1", freed=control.InventoryChange(slots_removed=[slot_ref(6, 1)]))
    bench.tick(0.1)
    assert bench.to_node("n0", "restore_plan").source_step == 5


def test_a_slot_that_is_known_before_its_promise_is_not_waited_for() -> None:
    """Breaks: a promise that comes late is never redeemed, for the slot was told already."""
    bench = running()
    bench.commit(5)
    bench.sealed("n0", 6, 0)
    bench.sealed("n1", 6, 1)
    worker_gone_while_hashing(bench)
    assert bench.to_node("n0", "restore_plan").source_step == 6


def test_a_decision_does_not_wait_for_ever_for_a_hash() -> None:
    bench = running()
    still_hashing(bench)
    bench.tick(60.0)
    assert bench.to_node("n0", "restore_plan").source_step == 5


@pytest.mark.parametrize("restarted", [True, False])
def test_a_new_hello_says_what_is_still_being_hashed(restarted: bool) -> None:
    bench = running()
    still_hashing(bench)
    bench.handle(NodeSessionEnded(session=SessionId("n1")))
    bench.now += 1.0
    worker = control.WorkerAttached(job=JOB, epoch=2, rank=1, world_size=2, nonce="w2.1")
    sealing = [] if restarted else [slot_ref(6, 1)]
    nonce = "n1#2" if restarted else "n1#1"
    bench.hello("n1", nonce=nonce, slots=[slot_ref(5, 1)], sealing=sealing, workers=[worker], epochs={JOB: 2})
    if restarted:
        assert bench.to_node("n0", "restore_plan").source_step == 5
    else:
        assert bench.to_node("n0", "restore_plan") is None


def test_a_lost_node_is_decoded_onto_the_spare_before_the_plan_goes_out() -> None:
    bench = running()
    bench.commit(5)
    broken(bench, lost="n1")
    bench.attach("n0", 0, epoch=2)
    bench.attach("n2", 1, epoch=2)
    (order,) = [order.message for order in bench.core.jobs[JOB].rebuilds.orders.values() if order.target == "n2"]
    assert (order.slot, order.position, list(order.slot_nodes)) == (True, 1, ["n0", ""])
    assert bench.to_node("n0", "restore_plan") is None
    done = control.RebuildDone(job=JOB, epoch=1, step=5, position=1, ok=True, slot=slot_ref(5, 1))
    bench.node("n2", rebuild_done=done)
    plan = bench.to_node("n0", "restore_plan")
    assert list(plan.nodes) == ["n0", "n2"]
    assert plan.reason == "from memory, step 5, rank 1 decoded from parity"
    # Its parity is rebuilt too, in the background, at the same place.
    assert bench.to_node("n2", "rebuild").parity


def test_more_losses_than_parity_fall_back_to_the_durable_snapshot_and_say_what_is_lost() -> None:
    bench = running()
    durable = control.DurableRef(job=JOB, epoch=1, step=2, world_size=2, path="/d/2")
    bench.commit(2)
    bench.node("n0", persist_sealed=control.PersistSealed(durable=durable, ok=True))
    bench.commit(5)
    plan = lose_everything(bench)
    assert (plan.kind, plan.source_step, plan.lost_steps) == (control.RESTORE_KIND_DURABLE, 2, 3)
    assert "3 steps are lost" in plan.reason
    assert "lost nodes: n0, n1" in plan.reason


def test_with_nothing_durable_the_restore_is_refused_until_the_job_is_forgotten() -> None:
    bench = running()
    bench.commit(5)
    plan = lose_everything(bench)
    assert plan.kind == control.RESTORE_KIND_REFUSED
    assert "nothing is on the durable tier" in plan.reason
    assert bench.to_agent("a2", "closed").exit_code == 6
    bench.handle(ForgetWanted(request_id="r", job=JOB))
    assert bench.last.answer[0].forgotten is not None
    bench.join("a2", round_=3)
    bench.join("a3", round_=3)
    epoch = bench.to_agent("a2", "formed").epoch
    assert epoch > 2
    bench.attach("n2", 0, epoch=epoch)
    bench.attach("n3", 1, epoch=epoch)
    assert bench.to_node("n2", "restore_plan").kind == control.RESTORE_KIND_FRESH


def lose_everything(bench: Bench) -> Any:
    for node in ("n0", "n1"):
        bench.handle(NodeSessionEnded(session=SessionId(node)))
        bench.handle(AgentSessionEnded(session=SessionId(node.replace("n", "a"))))
    for node in ("n2", "n3"):
        bench.hello(node)
        bench.join(node.replace("n", "a"))
    bench.tick(1.0)
    bench.tick(2.0)
    bench.tick(5.0)
    epoch = bench.job["epoch"]
    assert epoch == 2
    bench.attach("n2", 0, epoch=2)
    bench.attach("n3", 1, epoch=2)
    return bench.to_node("n2", "restore_plan")


def test_a_node_that_only_reconnects_is_not_counted_lost() -> None:
    bench = running()
    bench.commit(5)
    broken(bench)
    bench.handle(NodeSessionEnded(session=SessionId("n1")))
    bench.attach("n0", 0, epoch=2)
    worker = control.WorkerAttached(job=JOB, epoch=2, rank=1, world_size=2, nonce="w2.1")
    refs = [slot_ref(5, 1)]
    assert bench.to_node("n0", "restore_plan") is None
    bench.now += 1.0
    bench.hello("n1", slots=refs, workers=[worker], epochs={JOB: 2})
    assert bench.to_node("n0", "restore_plan").source_step == 5


def test_after_a_restart_of_the_coordinator_remembered_nodes_are_waited_for() -> None:
    before = running()
    before.commit(5)
    parities = [control.ParityRef(set=before.protect.sets[0], position=p, file_bytes=64) for p in (0, 1)]
    after = Bench(remembered=before.store)
    after.hello("n0", slots=[slot_ref(5, 0)], parities=parities[:1], epochs={JOB: 1})
    after.join("a0", round_=2)
    after.join("a1", round_=2)
    after.attach("n0", 0, epoch=2)
    assert after.to_node("n0", "rebuild") is None
    after.hello("n1", slots=[slot_ref(5, 1)], parities=parities[1:], epochs={JOB: 1})
    after.attach("n1", 1, epoch=2)
    assert after.to_node("n1", "restore_plan").source_step == 5


def forgotten_commit(*, old_is_there: bool) -> Bench:
    """The power failed: the store knows step 4, the daemons know that step 5 was committed, and a slot of it rotted."""
    before = running()
    before.commit(4)
    sets = [before.protect.sets[0]]
    store = dict(before.store)
    before.commit(5)
    sets.append(before.protect.sets[0])
    after = Bench(remembered=store)
    for position, node in enumerate(("n0", "n1")):
        kept = [one for one in sets if old_is_there or one.step == 5]
        slots = [slot_ref(one.step, position) for one in kept if (one.step, position) != (5, 1)]
        parities = [control.ParityRef(set=one, position=position, file_bytes=64) for one in kept]
        worker = control.WorkerAttached(job=JOB, epoch=1, rank=position, world_size=2, nonce=f"w1.{position}")
        after.hello(node, slots=slots, parities=parities, workers=[worker], epochs={JOB: 1})
    return after


def test_a_commit_that_the_store_forgot_is_learned_from_the_daemons() -> None:
    bench = forgotten_commit(old_is_there=False)
    assert bench.to_node("n0", "committed").step == 5
    assert bench.job["committed"]["step"] == 5


def test_a_forgotten_commit_that_lacks_a_part_is_made_whole_before_the_older_one_is_given_up() -> None:
    bench = forgotten_commit(old_is_there=True)
    assert bench.to_node("n0", "committed") is None
    assert (bench.job["committed"]["step"], bench.job["fallback"]["step"]) == (5, 4)
    # Meanwhile nothing is abandoned: to one of the daemons step 5 is still uncommitted.
    bench.sealed("n0", 7, 0)
    bench.node("n1", skipped=control.NodeSkipped(job=JOB, epoch=1, step=7, rank=1, reason="NO_SLOT"))
    assert bench.to_node("n0", "abandon") is None
    bench.tick(0.5)
    done = control.RebuildDone(job=JOB, epoch=1, step=5, position=1, ok=True, slot=slot_ref(5, 1))
    bench.node("n1", rebuild_done=done)
    assert bench.to_node("n0", "committed").level == control.Committed.LEVEL_PROTECTED
    bench.tick(0.5)
    assert bench.to_node("n0", "abandon").min_step == 8


def test_a_rotten_slot_is_rebuilt_on_its_own_node_without_a_new_epoch() -> None:
    bench = running()
    bench.commit(5)
    change = control.InventoryChange(slots_removed=[slot_ref(5, 1)], reason="corrupt")
    bench.node("n1", inventory_change=change)
    order = bench.to_node("n1", "rebuild")
    assert (order.slot, order.position) == (True, 1)
    assert bench.job["margin"] == 0
    done = control.RebuildDone(job=JOB, epoch=1, step=5, position=1, ok=True, slot=slot_ref(5, 1))
    bench.node("n1", rebuild_done=done)
    assert bench.job["margin"] == 1
    assert bench.job["epoch"] == 1


def test_a_rebuild_that_fails_is_tried_on_another_node() -> None:
    bench = running()
    bench.commit(5)
    bench.hello("n2")
    change = control.InventoryChange(slots_removed=[slot_ref(5, 1)], reason="corrupt")
    bench.node("n1", inventory_change=change)
    failed = control.RebuildDone(job=JOB, epoch=1, step=5, position=1, ok=False, reason="no memory")
    bench.node("n1", rebuild_done=failed)
    assert bench.to_node("n2", "rebuild").position == 1
    assert any("could not be rebuilt on n1: no memory" in text for text in bench.notes)


def test_a_tool_gets_the_newest_snapshot_or_the_steps_that_exist() -> None:
    bench = running()
    bench.handle(SnapshotWanted(request_id="r", job=JOB, step=None))
    answer = bench.last.answer[0]
    assert (answer.error_code, "has no snapshot yet" in answer.error) == ("INVALID_ARGUMENT", True)
    bench.commit(5)
    bench.handle(SnapshotWanted(request_id="r", job=JOB, step=None))
    located = bench.last.answer[0].located
    assert located is not None
    assert (located.plan.source_step, list(located.plan.nodes)) == (5, ["n0", "n1"])
    bench.handle(SnapshotWanted(request_id="r", job=JOB, step=4))
    assert (bench.last.answer[0].error_code, "steps 5" in bench.last.answer[0].error) == ("INVALID_ARGUMENT", True)
    bench.handle(SnapshotWanted(request_id="r", job="other", step=None))
    assert "there is no job 'other'" in bench.last.answer[0].error


def test_the_phases_of_a_recovery_are_timed() -> None:
    bench = running()
    bench.commit(5)
    bench.now += 1.0
    bench.node("n0", worker_detached=control.WorkerDetached(job=JOB, epoch=1, rank=0, nonce="w1.0"))
    bench.now += 0.5
    broken(bench)
    bench.now += 2.0
    bench.attach("n0", 0, epoch=2)
    bench.attach("n1", 1, epoch=2)
    finished = control.RestoreFinished(job=JOB, epoch=2, ok=True, fetch_s=0.25, load_s=0.125)
    bench.node("n0", restore_finished=finished)
    bench.now += 1.5
    bench.node("n0", first_step=control.FirstStep(job=JOB, epoch=2, step=6))
    phases = bench.job["recoveries"][-1]["phases"]
    expected = {
        "detect": 0.5,
        "agree": 0.0,
        "start": 2.0,
        "decode": 0.0,
        "fetch": 0.25,
        "load": 0.125,
        "first_step": 1.5,
    }
    assert phases == pytest.approx(expected)


def test_after_a_restart_of_the_coordinator_nothing_is_rebuilt_before_all_have_been_heard() -> None:
    """A node that only reconnects a moment later than the others is no loss: its slot must not be decoded elsewhere."""
    before = running()
    before.commit(5)
    one = before.protect.sets[0]
    after = Bench(remembered=before.store)

    def hello(position: int) -> None:
        worker = control.WorkerAttached(job=JOB, epoch=1, rank=position, world_size=2, nonce=f"w1.{position}")
        parity = control.ParityRef(set=one, position=position, file_bytes=64)
        slots = [slot_ref(5, position)]
        after.hello(f"n{position}", slots=slots, parities=[parity], workers=[worker], epochs={JOB: 1})

    hello(0)
    assert after.to_node("n0", "rebuild") is None
    after.tick(0.5)
    assert after.to_node("n0", "rebuild") is None
    hello(1)
    assert after.to_node("n0", "rebuild") is None
    after.tick(0.5)
    assert after.to_node("n0", "rebuild") is None
    assert 0 == after.job["counts"].get("rebuilt_slots", 0)


def test_after_a_restart_what_a_node_that_never_comes_held_is_rebuilt() -> None:
    before = running()
    before.commit(5)
    one = before.protect.sets[0]
    after = Bench(remembered=before.store)
    worker = control.WorkerAttached(job=JOB, epoch=1, rank=0, world_size=2, nonce="w1.0")
    parity = control.ParityRef(set=one, position=0, file_bytes=64)
    after.hello("n0", slots=[slot_ref(5, 0)], parities=[parity], workers=[worker], epochs={JOB: 1})
    orders = []
    for _ in range(20):
        after.tick(0.5)
        orders.append(after.to_node("n0", "rebuild"))
    assert any(orders)
