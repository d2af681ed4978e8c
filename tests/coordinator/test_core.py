"""Decisions of the coordinator core: events in, orders and reasons out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from snapshotd.coordinator.core import CoordinatorCore
from snapshotd.coordinator.events import (
    AgentMessageArrived,
    AgentSessionEnded,
    CoreSettings,
    Delete,
    Event,
    ForgetWanted,
    NodeMessageArrived,
    NodeSessionEnded,
    Output,
    Put,
    SessionId,
    SnapshotWanted,
    Ticked,
    ToAgent,
    ToNode,
)
from snapshotd.v1 import control_pb2 as control

JOB = "job"
SETTINGS = CoreSettings(parity=1, node_lease_s=2.0, agent_lease_s=1.0, last_call_s=5.0, protect_timeout_s=10.0)


class Bench:
    """A coordinator core on the bench: short words for what peers say, and what was said to them."""

    def __init__(self, settings: CoreSettings = SETTINGS, remembered: dict[tuple[str, str], str] | None = None) -> None:
        self.store: dict[tuple[str, str], str] = dict(remembered or {})
        self.core = CoordinatorCore(settings, [(job, key, text) for (job, key), text in self.store.items()])
        self.now = 0.0
        self.last = Output()
        self.notes: list[str] = []
        self._seq = 0

    def handle(self, event: Event) -> Output:
        self.last = self.core.handle(event, self.now)
        for effect in self.last.persist:
            if isinstance(effect, Put):
                self.store[(effect.job, effect.key)] = effect.value
            elif isinstance(effect, Delete):
                self.store = {key: text for key, text in self.store.items() if key[0] != effect.job}
        self.notes.extend(note.text for note in self.last.notes)
        return self.last

    def node(self, session: str, **body: Any) -> Output:
        self._seq += 1
        message = control.NodeMessage(seq=self._seq, **body)
        return self.handle(NodeMessageArrived(session=SessionId(session), message=message))

    def agent(self, session: str, **body: Any) -> Output:
        return self.handle(AgentMessageArrived(session=SessionId(session), message=control.AgentMessage(**body)))

    def tick(self, seconds: float) -> Output:
        self.now += seconds
        return self.handle(Ticked())

    def hello(self, node_id: str, **more: Any) -> Output:
        nonce = more.pop("nonce", f"{node_id}#1")
        hello = control.NodeHello(node_id=node_id, nonce=nonce, bulk_address=f"{node_id}:1", **more)
        return self.node(more.pop("session", node_id), hello=hello)

    def join(self, agent: str, *, least: int = 2, most: int = 2, round_: int = 1) -> Output:
        join = control.AgentJoin(
            job=JOB,
            agent=agent,
            node_id=agent.replace("a", "n"),
            min_nodes=least,
            max_nodes=most,
            host=f"host-{agent}",
            last_call_s=5.0,
            join_timeout_s=60.0,
            round=round_,
        )
        return self.agent(agent, join=join)

    def attach(self, node_id: str, rank: int, *, epoch: int, world: int = 2, nonce: str = "") -> Output:
        attached = control.WorkerAttached(
            job=JOB, epoch=epoch, rank=rank, world_size=world, nonce=nonce or f"w{epoch}.{rank}"
        )
        return self.node(node_id, worker_attached=attached)

    def sealed(self, node_id: str, step: int, rank: int, *, epoch: int = 1, world: int = 2, **more: Any) -> Output:
        shard = control.NodeSealed.Shard(slot=slot_ref(step, rank, epoch=epoch, world=world), **more)
        return self.node(node_id, sealed=control.NodeSealed(job=JOB, epoch=epoch, step=step, shards=[shard]))

    def built(self, node_id: str) -> Output:
        """The node has built its part of the Protect that it was sent last."""
        order = self.protect
        parities = [
            control.ParityRef(set=one, position=position, file_bytes=64)
            for one in order.sets
            for position, member in enumerate(one.members)
            if member.node_id == node_id
        ]
        return self.node(
            node_id, parity_built=control.ParityBuilt(job=JOB, epoch=order.epoch, step=order.step, parities=parities)
        )

    def commit(self, step: int, *, epoch: int = 1) -> None:
        """Take a step of the two nodes n0 and n1 all the way."""
        self.sealed("n0", step, 0, epoch=epoch)
        self.sealed("n1", step, 1, epoch=epoch)
        self.protect = self.to_node("n0", "protect")
        self.built("n0")
        self.built("n1")

    def to_node(self, session: str, body: str) -> Any:
        """The last message of this kind to a node in the last output."""
        return next(self._sent(session, body, ToNode), None)

    def to_agent(self, session: str, body: str) -> Any:
        return next(self._sent(session, body, ToAgent), None)

    def _sent(self, session: str, body: str, kind: type[ToNode] | type[ToAgent]) -> Iterator[Any]:
        for send in reversed(self.last.send):
            if isinstance(send, kind) and send.session == session and send.message.WhichOneof("body") == body:
                yield getattr(send.message, body)

    @property
    def job(self) -> dict[str, Any]:
        status = self.core.status(self.now)
        json.dumps(status)
        return next(job for job in status["jobs"] if job["job"] == JOB)  # type: ignore[attr-defined]


def slot_ref(step: int, rank: int, *, epoch: int = 1, world: int = 2) -> control.SlotRef:
    return control.SlotRef(
        job=JOB,
        epoch=epoch,
        step=step,
        rank=rank,
        world_size=world,
        file_bytes=1000 + rank,
        root_digest=f"{step}.{rank}",
    )


def running(settings: CoreSettings = SETTINGS) -> Bench:
    """Two nodes, two launchers, two ranks: epoch 1 is complete."""
    bench = Bench(settings)
    for node in ("n0", "n1"):
        bench.hello(node)
    bench.join("a0")
    bench.join("a1")
    bench.attach("n0", 0, epoch=1)
    bench.attach("n1", 1, epoch=1)
    return bench


# ---------------------------------------------------------------- rendezvous


def test_a_full_job_forms_at_once_and_the_epoch_is_remembered_first() -> None:
    bench = Bench()
    bench.join("a0")
    assert "1 of at least 2 nodes are there" in bench.to_agent("a0", "waiting").reason
    bench.join("a1")

    assert (bench.to_agent("a0", "formed").epoch, bench.to_agent("a0", "formed").group_rank) == (1, 0)
    assert bench.to_agent("a1", "formed").group_rank == 1
    assert bench.to_agent("a1", "formed").master_host == "host-a0"
    put = next(effect for effect in bench.last.persist if isinstance(effect, Put) and effect.key == "epoch")
    assert put.sync
    assert json.loads(put.value)["number"] == 1


def test_enough_nodes_form_after_the_last_call() -> None:
    bench = Bench()
    bench.join("a0", most=3)
    bench.join("a1", most=3)
    bench.tick(4.0)
    assert bench.to_agent("a0", "formed") is None
    bench.tick(1.0)
    assert bench.to_agent("a0", "formed").group_world_size == 2


def test_too_few_nodes_are_closed_after_the_join_timeout_in_words() -> None:
    bench = Bench()
    bench.join("a0")
    bench.tick(60.0)
    assert bench.to_agent("a0", "closed").reason == "1 of at least 2 nodes joined within 60 s"


def test_a_doubled_join_does_not_break_the_epoch() -> None:
    bench = running()
    bench.join("a0")
    assert bench.to_agent("a0", "formed").epoch == 1
    assert bench.to_agent("a1", "restart") is None


def test_a_member_that_joins_again_restarts_the_others_and_keeps_its_rank() -> None:
    bench = running()
    bench.join("a1", round_=2)
    assert "n1" in bench.to_agent("a0", "restart").reason
    bench.join("a0", round_=2)
    assert (bench.to_agent("a0", "formed").epoch, bench.to_agent("a0", "formed").group_rank) == (2, 0)
    assert bench.to_agent("a1", "formed").group_rank == 1


def test_a_spare_takes_the_rank_of_the_lost_node_at_once() -> None:
    bench = running()
    bench.join("a2")
    assert "waiting as a spare" in bench.to_agent("a2", "waiting").reason
    bench.handle(AgentSessionEnded(session=SessionId("a0")))
    bench.tick(1.0)
    assert "no connection" in bench.to_agent("a1", "restart").reason
    bench.join("a1", round_=2)
    assert bench.to_agent("a1", "formed").group_rank == 1
    assert bench.to_agent("a2", "formed").group_rank == 0
    assert bench.to_agent("a1", "formed").master_host == "host-a2"


def test_survivors_go_on_without_a_replacement_if_they_are_enough() -> None:
    bench = Bench()
    for agent in ("a0", "a1", "a2"):
        bench.join(agent, least=2, most=3)
    bench.handle(AgentSessionEnded(session=SessionId("a1")))
    bench.tick(1.0)
    bench.join("a2", least=2, most=3, round_=2)
    bench.join("a0", least=2, most=3, round_=2)
    assert bench.to_agent("a0", "formed").group_rank == 0
    assert bench.to_agent("a2", "formed").group_rank == 1
    assert bench.to_agent("a2", "formed").group_world_size == 2


def test_a_new_node_makes_the_job_grow() -> None:
    bench = Bench()
    bench.join("a0", least=1, most=2)
    bench.tick(5.0)
    bench.join("a1", least=1, most=2)
    assert "grows" in bench.to_agent("a0", "restart").reason
    bench.join("a0", least=1, most=2, round_=2)
    assert [bench.to_agent(agent, "formed").group_rank for agent in ("a0", "a1")] == [0, 1]


def test_leaving_for_good_closes_the_others_and_a_new_launch_opens_it_again() -> None:
    bench = running()
    bench.agent("a0", leave=control.AgentLeave(job=JOB, agent="a0", close=True, reason="done"))
    assert "done" in bench.to_agent("a1", "closed").reason
    bench.agent("a1", leave=control.AgentLeave(job=JOB, agent="a1"))
    bench.join("a8")
    bench.join("a9")
    assert bench.to_agent("a9", "formed").epoch == 2


def test_a_job_that_failed_is_a_failure_for_all_of_its_launchers() -> None:
    """A scheduler that looks at one launcher's exit code must not take a failed job for a finished one."""
    codes = []
    for failed in (False, True):
        bench = running()
        bench.agent("a0", leave=control.AgentLeave(job=JOB, agent="a0", close=True, reason="over", failed=failed))
        codes.append(bench.to_agent("a1", "closed").exit_code)
    assert [0, 1] == codes


def test_epochs_do_not_go_back_over_a_restart() -> None:
    before = running()
    after = Bench(remembered=before.store)
    resume = control.AgentResume(job=JOB, agent="a0", epoch=1, node_id="n0", group_rank=0, group_world_size=2)
    after.agent("a0", resume=resume)
    assert after.last.send == ()
    after.agent("a1", resume=control.AgentResume(job=JOB, agent="a1", epoch=0, node_id="n1"))
    assert after.to_agent("a1", "restart") is not None
    after.join("a0", round_=2)
    after.join("a1", round_=2)
    assert after.to_agent("a0", "formed").epoch == 2


def test_a_coordinator_that_lost_its_store_learns_the_epoch_from_the_daemons() -> None:
    bench = Bench()
    bench.hello("n0", epochs={JOB: 7})
    bench.join("a0")
    bench.join("a1")
    assert bench.to_agent("a0", "formed").epoch == 8


# ---------------------------------------------------------------- membership and commit


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


# ---------------------------------------------------------------- recovery


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


# ---------------------------------------------------------------- tools


def test_a_tool_gets_the_newest_snapshot_or_the_steps_that_exist() -> None:
    bench = running()
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
