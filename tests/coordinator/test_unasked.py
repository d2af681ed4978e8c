"""Parity that nobody ordered: it counts when it is what would have been ordered, and nothing depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.stripesets import set_digest
from snapshotd.v1 import control_pb2 as control
from tests.coordinator.bench import JOB, SETTINGS, Bench, running, slot_ref

NODES = ("n0", "n1")


def what_is_built(step: int, node_id: str, *, epoch: int = 1) -> control.ParityBuilt:
    """What a node says that has built its part as it was ordered for the step before."""
    members = [
        control.StripeMember(node_id=name, slot=slot_ref(step, rank, epoch=epoch)) for rank, name in enumerate(NODES)
    ]
    one = control.StripeSet(job=JOB, epoch=epoch, step=step, m=1, members=members)
    built = control.ParityBuilt(job=JOB, epoch=epoch, step=step, lanes=[0], unasked=True)
    built.sets.append(set_digest(one))
    return built


def sealed(bench: Bench, node_id: str, step: int, **more: object) -> None:
    rank = NODES.index(node_id)
    shard = control.NodeSealed.Shard(slot=slot_ref(step, rank))
    report = control.NodeSealed(job=JOB, epoch=1, step=step, shards=[shard], **more)  # type: ignore[arg-type]
    bench.node(node_id, sealed=report)


def after_a_commit() -> Bench:
    bench = running()
    bench.commit(5)
    return bench


def test_a_step_that_all_have_built_is_committed_without_an_order() -> None:
    bench = after_a_commit()
    sealed(bench, "n0", 6, built=what_is_built(6, "n0"))
    assert bench.to_node("n0", "committed") is None
    sealed(bench, "n1", 6, built=what_is_built(6, "n1"))
    assert bench.to_node("n1", "protect") is None
    committed = bench.to_node("n1", "committed")
    assert (committed.step, committed.level) == (6, control.Committed.LEVEL_PROTECTED)
    assert bench.job["margin"] == 1


@pytest.mark.parametrize("whole_before", [True, False])
def test_what_is_being_built_is_waited_for(whole_before: bool) -> None:
    bench = after_a_commit()
    sealed(bench, "n0", 6, protecting=True)
    if not whole_before:
        bench.node("n0", parity_built=what_is_built(6, "n0"))
    sealed(bench, "n1", 6, protecting=True)
    assert bench.to_node("n0", "protect") is None
    if whole_before:
        bench.node("n0", parity_built=what_is_built(6, "n0"))
    assert bench.to_node("n0", "committed") is None
    bench.node("n1", parity_built=what_is_built(6, "n1"))
    assert bench.to_node("n0", "committed").step == 6


def test_who_has_begun_nothing_is_told() -> None:
    bench = after_a_commit()
    sealed(bench, "n0", 6, built=what_is_built(6, "n0"))
    sealed(bench, "n1", 6)
    assert bench.to_node("n0", "protect") is None
    bench.protect = bench.to_node("n1", "protect")
    assert bench.protect.step == 6
    bench.built("n1")
    assert bench.to_node("n0", "committed").step == 6


@pytest.mark.parametrize("whole_before", [True, False])
def test_what_was_taken_back_is_ordered(whole_before: bool) -> None:
    """Its report comes again, and says no more than that the step is sealed."""
    bench = after_a_commit()
    sealed(bench, "n0", 6, protecting=True)
    if not whole_before:
        sealed(bench, "n0", 6)
        assert bench.to_node("n0", "protect") is None
    sealed(bench, "n1", 6, built=what_is_built(6, "n1"))
    if whole_before:
        assert bench.to_node("n0", "protect") is None
        sealed(bench, "n0", 6)
    bench.protect = bench.to_node("n0", "protect")
    assert bench.protect.step == 6
    bench.built("n0")
    assert bench.to_node("n1", "committed").step == 6


@pytest.mark.parametrize("whole_before", [True, False])
@pytest.mark.parametrize("wrong", ["another digest", "no digest", "another lane"])
def test_other_parity_than_would_be_ordered_does_not_count(wrong: str, whole_before: bool) -> None:
    bench = after_a_commit()
    built = what_is_built(6, "n0")
    if wrong == "another digest":
        built.sets[0] ^= 1
    elif wrong == "no digest":
        del built.sets[:]
    else:
        built.lanes[0] = 1
    sealed(bench, "n0", 6, protecting=True)
    if not whole_before:
        bench.node("n0", parity_built=built)
    sealed(bench, "n1", 6, built=what_is_built(6, "n1"))
    if whole_before:
        bench.node("n0", parity_built=built)
    assert bench.to_node("n0", "committed") is None
    bench.protect = bench.to_node("n0", "protect")
    bench.built("n0")
    assert bench.to_node("n0", "committed").step == 6


def test_a_node_that_was_away_says_all_that_it_holds_and_is_told() -> None:
    """What it was building is not known to go on: it is not waited for, as one that has begun would be."""
    bench = after_a_commit()
    sealed(bench, "n0", 6, protecting=True)
    bench.hello("n0", session="n0 again", slots=[slot_ref(5, 0), slot_ref(6, 0)], epochs={JOB: 1})
    shard = control.NodeSealed.Shard(slot=slot_ref(6, 0))
    bench.node("n0 again", sealed=control.NodeSealed(job=JOB, epoch=1, step=6, shards=[shard]))
    sealed(bench, "n1", 6, built=what_is_built(6, "n1"))
    assert bench.to_node("n0 again", "protect").step == 6


def test_a_node_that_was_away_while_it_was_waited_for_is_told_once() -> None:
    bench = after_a_commit()
    sealed(bench, "n0", 6, protecting=True)
    sealed(bench, "n1", 6, built=what_is_built(6, "n1"))
    bench.hello("n0", session="n0 again", slots=[slot_ref(5, 0), slot_ref(6, 0)], epochs={JOB: 1})
    assert bench.to_node("n0 again", "protect").step == 6
    shard = control.NodeSealed.Shard(slot=slot_ref(6, 0))
    bench.node("n0 again", sealed=control.NodeSealed(job=JOB, epoch=1, step=6, shards=[shard]))
    assert bench.to_node("n0 again", "protect") is None
    bench.node("n0 again", parity_built=control.ParityBuilt(job=JOB, epoch=1, step=6, lanes=[0]))
    assert bench.to_node("n0 again", "committed").step == 6


def test_of_a_step_that_was_given_up_nothing_is_remembered() -> None:
    bench = after_a_commit()
    sealed(bench, "n0", 6, built=what_is_built(6, "n0"))
    bench.node("n1", skipped=control.NodeSkipped(job=JOB, epoch=1, step=6, rank=1, reason="NO_SLOT"))
    assert bench.to_node("n0", "abandon").min_step == 7
    bench.node("n0", parity_built=what_is_built(6, "n0"))
    assert bench.last.close == ()  # it is no answer to an order, which would have to be known
    sealed(bench, "n0", 7, built=what_is_built(7, "n0"))
    sealed(bench, "n1", 7, built=what_is_built(7, "n1"))
    assert bench.to_node("n0", "committed").step == 7


def test_a_step_that_only_one_group_has_built_is_protected_after_a_restart_of_the_coordinator() -> None:
    """Breaks: it is taken for one that was committed and has lost parity, and nothing is committed for a minute."""
    settings = replace(SETTINGS, group_size=2)
    bench = Bench(settings)
    names = [f"n{index}" for index in range(4)]
    for name in names:
        bench.hello(name)
    for index in range(4):
        bench.join(f"a{index}", least=4, most=4)
    for rank, name in enumerate(names):
        bench.attach(name, rank, epoch=1, world=4)
    for rank, name in enumerate(names):
        bench.sealed(name, 5, rank, world=4)
    orders = {name: bench.to_node(name, "protect") for name in names}
    for name, order in orders.items():
        bench.protect = order
        bench.built(name)
    assert bench.to_node("n0", "committed").step == 5

    again = Bench(settings, remembered=bench.store)
    group = {member.node_id for member in orders["n0"].sets[0].members}
    assert len(group) == 2
    for rank, name in enumerate(names):
        parities = [parity_of(orders[name], name, 5)] + ([parity_of(orders[name], name, 6)] if name in group else [])
        worker = control.WorkerAttached(job=JOB, epoch=1, rank=rank, world_size=4, nonce=f"w1.{rank}")
        slots = [slot_ref(step, rank, world=4) for step in (5, 6)]
        again.hello(name, slots=slots, parities=parities, workers=[worker], epochs={JOB: 1})
    for rank, name in enumerate(names):
        again.sealed(name, 6, rank, world=4)
    assert {again.to_node(name, "protect").step for name in names} == {6}
    for name in names:
        again.node(name, parity_built=control.ParityBuilt(job=JOB, epoch=1, step=6, lanes=[0]))
    assert again.to_node("n0", "committed").step == 6


def parity_of(order: control.Protect, node_id: str, step: int) -> control.ParityRef:
    """What a node holds that has built its part of that order, for another step."""
    one = control.StripeSet()
    one.CopyFrom(order.sets[0])
    one.step = step
    for member in one.members:
        member.slot.CopyFrom(slot_ref(step, member.slot.rank, world=4))
    position = [member.node_id for member in one.members].index(node_id)
    return control.ParityRef(set=one, position=position, file_bytes=64)
