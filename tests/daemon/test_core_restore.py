"""What the node core does while workers restore: whom it asks, what it answers, what it counts."""

from __future__ import annotations

import pytest

from snapshotd.daemon import events
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.daemon.test_core import JOB, SETTINGS, Bench


def plan(kind: int, epoch: int = 2, step: int = 5) -> control.RestorePlan:
    return control.RestorePlan(
        job=JOB, epoch=epoch, kind=control.RestoreKind.ValueType(kind), source_epoch=1, source_step=step, reason="why"
    )


def test_a_query_waits_for_the_plan_of_its_epoch() -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.frame(1, 3, restore_query=worker.RestoreQuery())
    assert [asked.epoch for asked in bench.reports("restore_asked")] == [2]
    bench.said(restore_plan=plan(control.RESTORE_KIND_MEMORY))
    (serve,) = bench.done(events.ServeRestore)
    assert (serve.rank, serve.world_size, serve.frame.request_id) == (0, 2, 3)


@pytest.mark.parametrize(
    ("kind", "decision"),
    [
        (control.RESTORE_KIND_FRESH, worker.RestoreDecision.KIND_FRESH),
        (control.RESTORE_KIND_REFUSED, worker.RestoreDecision.KIND_REFUSED),
    ],
)
def test_fresh_and_refused_are_answered_at_once(kind: int, decision: int) -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.said(restore_plan=plan(kind))
    bench.frame(1, 3, restore_query=worker.RestoreQuery())
    assert [(one.kind, one.reason) for one in bench.to_worker(1, "restore_decision")] == [(decision, "why")]


def test_a_query_without_a_decision_is_answered_in_time() -> None:
    bench = Bench(connected=False)
    bench.hello(1, 0, epoch=2)
    bench.frame(1, 3, restore_query=worker.RestoreQuery())
    bench.now = SETTINGS.restore_wait_s
    bench.handle(events.Ticked())
    (decision,) = bench.to_worker(1, "restore_decision")
    assert decision.kind == worker.RestoreDecision.KIND_UNDECIDED
    assert "coordinator is away" in decision.reason


def test_a_plan_that_contradicts_the_first_is_ignored() -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.said(restore_plan=plan(control.RESTORE_KIND_MEMORY, step=5))
    bench.said(restore_plan=plan(control.RESTORE_KIND_MEMORY, step=4))
    assert bench.core.state.counters["contradicting_plans"] == 1


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"restore_want": worker.RestoreWant()}, "restore_ready"),
        ({"restore_locate": worker.RestoreLocate()}, "restore_sources"),
    ],
)
def test_bytes_are_asked_for_after_the_query(asked: dict[str, object], answer: str) -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.frame(1, 3, **asked)
    (refused,) = bench.to_worker(1, answer)
    assert "RestoreQuery" in refused.error
    bench.said(restore_plan=plan(control.RESTORE_KIND_MEMORY))
    bench.frame(1, 4, **asked)
    (serve,) = bench.done(events.ServeRestore)
    assert (0, 4, list(asked)[0]) == (serve.rank, serve.frame.request_id, serve.frame.WhichOneof("body"))


def test_bytes_that_a_worker_read_itself_are_counted_with_those_of_the_daemon() -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.said(restore_plan=plan(control.RESTORE_KIND_MEMORY))
    ready = worker.Frame(restore_ready=worker.RestoreReady(local_bytes=10, remote_bytes=200))
    bench.handle(events.RestoreServed(conn=events.WorkerConn(1), frame=ready))
    bench.frame(1, 0, restore_done=worker.RestoreDone(ok=True, own_bytes=3000, peer_bytes=40_000))
    (finished,) = bench.reports("restore_finished")
    assert (3010, 40_200) == (finished.local_bytes, finished.remote_bytes)


def test_what_a_worker_found_rotten_is_counted_and_told() -> None:
    """As when the daemon itself finds it: nobody may read wrong bytes in silence."""
    bench = Bench()
    bench.hello(1, 0, epoch=2)
    bench.frame(1, 0, restore_fault=worker.RestoreFault(node_id="n1", detail="chunk 3 does not match"))
    assert 1 == bench.core.state.counters["corrupt"]
    (note,) = bench.done(events.Note)
    assert "n1" in note.text
    assert "chunk 3" in note.text
