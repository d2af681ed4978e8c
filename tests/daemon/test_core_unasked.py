"""An order that stands: which steps a node protects without being told, and what it says of them."""

from __future__ import annotations

from typing import Any

import pytest

from snapshotd.daemon import events
from snapshotd.daemon.core_state import HOLD_S
from snapshotd.stripesets import set_digest
from snapshotd.v1 import control_pb2 as control
from tests.daemon.test_core import JOB, Bench, slot_ref, training

HELD = (events.BuildParity,)


def told_once(**options: Any) -> Bench:
    """Step 5 was protected because the coordinator said so, and is committed."""
    bench = training(**options)
    bench.seal(1, 5)
    bench.protect(5)
    for build in bench.done(events.BuildParity) if options else ():
        finish(bench, build.protect)
    bench.committed(5)
    return bench


def finish(bench: Bench, order: control.Protect) -> control.ParityRef:
    """The build ends well; the slots of the other nodes are known by then."""
    one = control.StripeSet()
    one.CopyFrom(order.sets[0])
    for rank, member in enumerate(one.members):
        member.slot.root_digest = f"{order.step}.{rank}"
    ref = control.ParityRef(set=one, position=0, file_bytes=64)
    bench.handle(events.ParityFinished(job=JOB, epoch=1, step=order.step, parities=(ref,), seconds=0.1))
    return ref


def begun(step: int = 6) -> tuple[Bench, control.Protect]:
    """A later step is sealed, and its parity is being built."""
    bench = told_once(held=HELD)
    bench.seal(1, step)
    (build,) = bench.done(events.BuildParity)
    return bench, build.protect


def test_the_next_step_is_built_without_an_order_and_said_in_one_message() -> None:
    bench, order = begun()
    assert (order.step, order.epoch, len(order.peers)) == (6, 1, 0)
    mine, other = order.sets[0].members
    assert mine.slot == slot_ref(6, 0)
    assert (other.slot.step, other.slot.rank, other.slot.root_digest) == (6, 1, "")
    assert bench.reports("sealed") == []
    ref = finish(bench, order)
    (report,) = bench.reports("sealed")
    assert (report.step, report.protecting, [shard.slot for shard in report.shards]) == (6, False, [slot_ref(6)])
    built = report.built
    assert (built.step, built.unasked, list(built.lanes), list(built.sets)) == (6, True, [0], [set_digest(ref.set)])
    assert bench.reports("parity_built") == []


def test_a_report_does_not_wait_longer_than_a_tick() -> None:
    bench, order = begun()
    bench.now += HOLD_S / 2
    bench.handle(events.Ticked())
    assert bench.reports("sealed") == []
    bench.now += HOLD_S
    bench.handle(events.Ticked())
    assert [(report.step, report.protecting) for report in bench.reports("sealed")] == [(6, True)]
    ref = finish(bench, order)
    (built,) = bench.reports("parity_built")
    assert (built.unasked, list(built.lanes), list(built.sets)) == (True, [0], [set_digest(ref.set)])


def test_a_report_goes_before_the_next_word() -> None:
    """Or the coordinator would decide without what it is about to hear."""
    bench, _ = begun()
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    said = [one.message.WhichOneof("body") for one in bench.effects if isinstance(one, events.ToCoordinator)]
    assert said == ["sealed", "worker_detached"]
    assert bench.reports("sealed")[0].protecting


def test_what_cannot_be_built_is_sealed_all_the_same_and_asked_for() -> None:
    bench, order = begun()
    bench.handle(events.ParityAborted(job=JOB, epoch=1, step=6, reason="n1 has not sealed it"))
    assert [(report.step, report.protecting) for report in bench.reports("sealed")] == [(6, False)]
    assert not bench.reports("sealed")[0].HasField("built")
    assert bench.reports("parity_failed") == []
    # It is told from now on, until an order was carried out again.
    bench.protect(6)
    (build,) = bench.done(events.BuildParity)
    assert build.protect.sets[0].members[1].slot == slot_ref(6, 1)
    finish(bench, build.protect)
    assert [list(built.lanes) for built in bench.reports("parity_built")] == [[0]]
    bench.committed(6)
    bench.seal(1, 7)
    assert [build.protect.step for build in bench.done(events.BuildParity)] == [7]


def test_after_a_failure_nothing_is_begun_before_an_order_was_carried_out() -> None:
    bench, _ = begun()
    bench.handle(events.ParityAborted(job=JOB, epoch=1, step=6, reason="n1 has not sealed it"))
    bench.said(abandon=control.Abandon(job=JOB, epoch=1, up_to_step=6, min_step=7))
    bench.seal(1, 7)
    assert bench.done(events.BuildParity) == []
    assert [report.protecting for report in bench.reports("sealed")] == [False]


def other_bytes(bench: Bench, step: int) -> None:
    """The coordinator orders a step of which the other node has sealed something else than was read from it."""
    other = slot_ref(step, 1)
    other.root_digest = "other"
    members = [control.StripeMember(node_id="n0", slot=slot_ref(step)), control.StripeMember(node_id="n1", slot=other)]
    one = control.StripeSet(job=JOB, epoch=1, step=step, m=1, members=members)
    bench.said(protect=control.Protect(job=JOB, epoch=1, step=step, sets=[one]))


def test_an_order_for_the_same_step_comes_first() -> None:
    bench, _ = begun()
    bench.protect(6)
    assert [cancel.step for cancel in bench.done(events.CancelParity)] == [6]
    assert bench.done(events.BuildParity) == []  # it begins when the cancelled one has ended
    bench.handle(events.ParityAborted(job=JOB, epoch=1, step=6, reason="cancelled"))
    assert [build.protect.sets[0].members[1].slot for build in bench.done(events.BuildParity)] == [slot_ref(6, 1)]


def test_an_order_for_another_step_comes_first_and_what_was_begun_is_taken_back() -> None:
    """Breaks: a node that has begun step 7 by itself and is told to build 6 is believed to go on with 7."""
    settings = events.NodeSettings(node_id="n0", nonce="n0#1", version="1", bulk_address="n0:1", generations=3)
    bench = told_once(held=HELD, settings=settings)
    bench.seal(1, 6)
    (build,) = bench.done(events.BuildParity)
    finish(bench, build.protect)
    bench.seal(1, 7)
    assert [build.protect.step for build in bench.done(events.BuildParity)] == [7]
    other_bytes(bench, 6)
    assert [cancel.step for cancel in bench.done(events.CancelParity)] == [7]
    assert [(report.step, report.protecting) for report in bench.reports("sealed")] == [(7, False)]
    assert [build.protect.step for build in bench.done(events.BuildParity)] == [6]


def test_an_order_for_other_bytes_than_were_built_is_carried_out() -> None:
    bench, order = begun()
    finish(bench, order)
    bench.protect(6)
    assert bench.done(events.BuildParity) == []
    assert [list(built.lanes) for built in bench.reports("parity_built")] == [[0]]

    bench, order = begun()
    finish(bench, order)
    other_bytes(bench, 6)
    assert bench.reports("parity_built") == []
    (build,) = bench.done(events.BuildParity)
    assert build.protect.sets[0].members[1].slot.root_digest == "other"


def test_a_build_that_could_not_be_stopped_any_more_answers_the_order_if_it_is_the_same() -> None:
    bench, order = begun()
    bench.protect(6)
    finish(bench, order)
    assert bench.done(events.BuildParity) == []
    assert [(built.unasked, list(built.lanes)) for built in bench.reports("parity_built")] == [(False, [0])]


@pytest.mark.parametrize("why", ["layout", "epoch", "away", "none stands", "a part of the ranks"])
def test_when_nothing_is_begun(why: str) -> None:
    bench = training() if why == "none stands" else told_once()
    if why == "epoch":
        bench.hello(2, 0, epoch=2)
        bench.formed("n0", "n1", epoch=2)
        bench.register(2)
        bench.seal(2, 6)
    elif why == "away":
        bench.handle(events.CoordinatorDown())
        bench.seal(1, 6)
    elif why == "layout":
        bench.core.state.jobs[JOB].standing.sets[0].members[0].slot.layout_hash = "an older one"  # type: ignore[union-attr]
        bench.seal(1, 6)
    elif why == "a part of the ranks":
        bench.core.state.jobs[JOB].standing.sets[0].members[0].slot.rank = 7  # type: ignore[union-attr]
        bench.seal(1, 6)
    else:
        bench.seal(1, 6)
    assert bench.done(events.BuildParity) == []
    assert [report.protecting for report in bench.reports("sealed")] == ([] if why == "away" else [False])


def test_with_the_coordinator_back_all_is_said_as_it_is() -> None:
    bench, order = begun()
    bench.handle(events.CoordinatorDown())
    assert [cancel.step for cancel in bench.done(events.CancelParity)] == [6]
    bench.handle(events.CoordinatorUp())
    assert [(report.step, report.protecting) for report in bench.reports("sealed")] == [(6, False)]
    finish(bench, order)
    assert [change.parities_added[0].set.step for change in bench.reports("inventory_change")] == [6]


def whole(bench: Bench) -> list[int]:
    """The steps of the parity that is told with its stripe sets."""
    return [ref.set.step for change in bench.reports("inventory_change") for ref in change.parities_added]


@pytest.mark.parametrize("built", ["before", "after"])
def test_when_a_worker_goes_what_nobody_ordered_is_told_whole(built: str) -> None:
    """Breaks: the step is never whole for the coordinator, which goes on from it and does not know its parity."""
    bench, order = begun()
    if built == "before":
        finish(bench, order)
        assert whole(bench) == []
        bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
        said = [one.message.WhichOneof("body") for one in bench.effects if isinstance(one, events.ToCoordinator)]
        assert said == ["inventory_change", "worker_detached"]
    else:
        bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
        assert whole(bench) == []
        finish(bench, order)
    assert whole(bench) == [6]


def test_what_was_committed_is_known() -> None:
    bench, order = begun()
    finish(bench, order)
    bench.committed(6)
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    assert whole(bench) == []


def test_a_step_that_is_given_up_while_it_is_built_is_freed() -> None:
    bench, order = begun()
    bench.said(abandon=control.Abandon(job=JOB, epoch=1, up_to_step=6, min_step=7))
    assert [cancel.step for cancel in bench.done(events.CancelParity)] == [6]
    assert bench.steps() == [5]
    finish(bench, order)
    assert [ref.parity.set.step for ref in bench.done(events.DeleteParity)] == [6]
    # What is said of it last is that it is gone, whatever was held.
    told = [one.message for one in bench.all if isinstance(one, events.ToCoordinator)]
    bench.now += 1.0
    bench.handle(events.Ticked())
    told += [one.message for one in bench.effects if isinstance(one, events.ToCoordinator)]
    holds = False
    for message in told:
        if any(ref.step == 6 for ref in message.freed.slots_removed):
            holds = False
        holds = holds or (message.HasField("sealed") and message.sealed.step == 6)
    assert not holds
