"""Rendezvous decisions of the coordinator core: who is in an epoch, and when it ends."""

from __future__ import annotations

import json

from snapshotd.coordinator.events import (
    AgentSessionEnded,
    Put,
    SessionId,
)
from snapshotd.v1 import control_pb2 as control
from tests.coordinator.bench import JOB, Bench, running


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
