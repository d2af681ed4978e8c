"""Decisions of the node core on slots that outlive their worker while they are hashed: nothing of them may be lost."""

from __future__ import annotations

import pytest

from snapshotd.daemon import events
from snapshotd.v1 import control_pb2 as control
from tests.daemon.test_core import Bench, training

HELD = (events.SealSlot,)


def handed_over(*, ranks_here: int = 1) -> tuple[Bench, list[events.SealSlot]]:
    """All ranks here have sealed step 5, nothing of it is hashed, and their workers are gone."""
    if ranks_here == 1:
        bench = training(held=HELD)
    else:
        bench = Bench(held=HELD)
        for conn in (1, 2):
            bench.hello(conn, conn - 1, here=2)
        bench.formed("n0", "n0")
        for conn in (1, 2):
            bench.register(conn)
    orders = []
    for conn in range(1, ranks_here + 1):
        bench.seal(conn, 5)
        orders += bench.done(events.SealSlot)
    for conn in range(1, ranks_here + 1):
        bench.handle(events.WorkerGone(conn=events.WorkerConn(conn)))
        (gone,) = bench.reports("worker_detached")
        assert [(ref.epoch, ref.step, ref.rank) for ref in gone.sealing] == [(1, 5, conn - 1)]
    return bench, orders


def hashed(bench: Bench, order: events.SealSlot) -> list[tuple[int, int]]:
    """End the hashing; return step and rank of the slots that the coordinator hears of then, in an inventory change."""
    done = control.SlotRef()
    done.CopyFrom(order.ref)
    done.root_digest = "digest"
    bench.handle(events.SlotSealed(slot=order.slot, ref=done, data_digest="", seconds=0.1))
    return [(ref.step, ref.rank) for change in bench.reports("inventory_change") for ref in change.slots_added]


def test_a_slot_is_told_when_it_is_hashed_after_its_worker_has_gone() -> None:
    bench, (order,) = handed_over()
    assert hashed(bench, order) == [(5, 0)]
    assert bench.steps() == [5]


def test_it_is_told_in_an_epoch_that_has_begun_meanwhile() -> None:
    bench, (order,) = handed_over()
    bench.hello(2, 0, epoch=2)
    bench.formed("n0", "n1", epoch=2)
    assert hashed(bench, order) == [(5, 0)]
    assert bench.reports("sealed") == []


def test_the_slots_of_the_other_ranks_here_are_told_with_it() -> None:
    """They are reported together, which an epoch that begins before the last of them is hashed would prevent."""
    bench, orders = handed_over(ranks_here=2)
    assert hashed(bench, orders[0]) == [(5, 0)]
    bench.hello(3, 0, epoch=2, here=2)
    assert hashed(bench, orders[1]) == [(5, 0), (5, 1)]


def test_a_worker_that_ends_after_its_slot_was_hashed_promises_nothing() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    assert not bench.reports("worker_detached")[0].sealing


def test_all_that_a_worker_has_handed_over_is_named_but_what_is_given_up() -> None:
    """Breaks: of several steps that are still being hashed one was named, perhaps an old one that nobody wants."""
    bench = training(held=HELD)
    bench.seal(1, 5)
    (five,) = bench.done(events.SealSlot)
    bench.seal(1, 6)
    bench.committed(4)
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    assert [(ref.step, ref.rank) for ref in bench.reports("worker_detached")[0].sealing] == [(5, 0), (6, 0)]
    assert hashed(bench, five) == [(5, 0)]

    bench = training(held=HELD)
    bench.seal(1, 5)
    bench.seal(1, 6)
    bench.committed(6)
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    assert [(ref.step, ref.rank) for ref in bench.reports("worker_detached")[0].sealing] == [(6, 0)]


def test_a_hello_names_what_is_still_being_hashed() -> None:
    bench, (order,) = handed_over()
    bench.handle(events.CoordinatorDown())
    bench.handle(events.CoordinatorUp())
    (hello,) = bench.reports("hello")
    assert [(ref.step, ref.rank) for ref in hello.sealing] == [(5, 0)]
    hashed(bench, order)
    bench.handle(events.CoordinatorDown())
    bench.handle(events.CoordinatorUp())
    (hello,) = bench.reports("hello")
    assert [(ref.step, ref.rank) for ref in hello.slots] == [(5, 0)]
    assert not hello.sealing


@pytest.mark.parametrize("how", ["failed", "given up"])
def test_a_slot_that_is_not_sealed_after_all_is_told_as_freed(how: str) -> None:
    bench, (order,) = handed_over()
    if how == "failed":
        bench.handle(events.SlotSealFailed(slot=order.slot, reason="the header is another one"))
    else:
        bench.said(abandon=control.Abandon(job="job", epoch=1, up_to_step=8, min_step=9))
        assert hashed(bench, order) == []
    bench.handle(events.Ticked())
    freed = [
        (ref.step, ref.rank)
        for effect in bench.all
        if isinstance(effect, events.ToCoordinator)
        for ref in effect.message.freed.slots_removed
    ]
    assert freed == [(5, 0)]
