"""Decisions of the node core: who may write a slot, what counts, what is freed, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from snapshotd.daemon import events
from snapshotd.daemon.core import NodeCore
from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

JOB = "job"
SETTINGS = events.NodeSettings(node_id="n0", nonce="n0#1", version="1", bulk_address="n0:1", generations=2)
_BOX = TensorBox(name="w", dtype="float32", global_shape=(8,), box=Box((0,), (8,)), scope="global", kind="param")
LAYOUT = Layout.build([_BOX], meta_capacity=64)


class Bench:
    """A node core on the bench, whose shell does all work at once unless told to hold it back."""

    def __init__(
        self,
        settings: events.NodeSettings = SETTINGS,
        recovered: events.Recovered | None = None,
        *,
        connected: bool = True,
        held: tuple[type, ...] = (),
    ) -> None:
        self.core = NodeCore(settings, recovered or events.Recovered())
        self.now = 0.0
        self.effects: list[Any] = []
        self.all: list[Any] = []
        self._held = held
        if connected:
            self.handle(events.CoordinatorUp())

    def handle(self, event: events.Event) -> list[Any]:
        self.effects = []
        queue = [event]
        while queue:
            for effect in self.core.handle(queue.pop(0), self.now):
                self.effects.append(effect)
                queue.extend(self._work(effect))
        self.all.extend(self.effects)
        return self.effects

    def _work(self, effect: Any) -> list[events.Event]:
        if isinstance(effect, self._held):
            return []
        match effect:
            case events.CreateSlot(slot=slot):
                return [events.SlotCreated(slot=slot, path=f"/slots/{slot}")]
            case events.VoidSlot(slot=slot):
                return [events.SlotReady(slot=slot)]
            case events.SealSlot(slot=slot, ref=ref):
                done = control.SlotRef()
                done.CopyFrom(ref)
                done.root_digest = f"{ref.step}.{ref.rank}"
                return [events.SlotSealed(slot=slot, ref=done, data_digest=done.root_digest, seconds=0.1)]
            case events.BuildParity(protect=protect):
                parities = tuple(
                    control.ParityRef(set=one, position=position, file_bytes=64)
                    for one in protect.sets
                    for position, member in enumerate(one.members)
                    if member.node_id == "n0"
                )
                return [
                    events.ParityFinished(
                        job=JOB, epoch=protect.epoch, step=protect.step, parities=parities, seconds=0.1
                    )
                ]
            case events.PersistSlots(persist=persist):
                done_ = control.PersistDone(job=JOB, epoch=persist.epoch, step=persist.step, ok=True)
                return [events.PersistFinished(done=done_)]
        return []

    # ------------------------------------------------------------ what peers say

    def frame(self, conn: int, request_id: int = 1, **body: Any) -> list[Any]:
        frame = worker.Frame(request_id=request_id, **body)
        return self.handle(events.WorkerFrame(conn=events.WorkerConn(conn), frame=frame))

    def said(self, **body: Any) -> list[Any]:
        return self.handle(events.CoordinatorSaid(message=control.CoordinatorMessage(**body)))

    def hello(self, conn: int, rank: int, *, epoch: int = 1, world: int = 2, here: int = 1, **more: Any) -> list[Any]:
        fields = {"nonce": f"w{epoch}.{rank}", "job": JOB, **more}
        return self.frame(
            conn,
            hello=worker.WorkerHello(
                protocol=1, rank=rank, world_size=world, local_rank=0, local_world_size=here, epoch=epoch, **fields
            ),
        )

    def register(self, conn: int, header: bytes = LAYOUT.header) -> list[Any]:
        return self.frame(conn, 7, register_layout=worker.RegisterLayout(header=header))

    def formed(self, *nodes: str, epoch: int = 1, m: int = 1, formation: str = "") -> list[Any]:
        message = control.EpochFormed(
            job=JOB, epoch=epoch, world_size=len(nodes), nodes=nodes, m=m, formation=formation
        )
        return self.said(epoch_formed=message)

    def seal(self, conn: int, step: int) -> list[Any]:
        seal = worker.Seal(slot_id=self.granted(conn), step=step, layout_hash=LAYOUT.hash)
        return self.frame(conn, 0, seal=seal)

    def protect(self, step: int, epoch: int = 1) -> list[Any]:
        members = [
            control.StripeMember(node_id=node, slot=slot_ref(step, rank, epoch))
            for rank, node in enumerate(("n0", "n1"))
        ]
        one = control.StripeSet(job=JOB, epoch=epoch, step=step, m=1, members=members)
        return self.said(protect=control.Protect(job=JOB, epoch=epoch, step=step, sets=[one]))

    def committed(self, step: int, epoch: int = 1) -> list[Any]:
        level = control.Committed.LEVEL_PROTECTED
        return self.said(committed=control.Committed(job=JOB, epoch=epoch, step=step, level=level))

    # ------------------------------------------------------------ what came of it

    def granted(self, conn: int) -> int:
        grants = [grant.slot_id for grant in self.to_worker(conn, "grant", self.all)]
        return grants[-1] if grants else 999

    def to_worker(self, conn: int, body: str, effects: list[Any] | None = None) -> list[Any]:
        return [
            getattr(effect.frame, body)
            for effect in (self.effects if effects is None else effects)
            if isinstance(effect, events.ToWorker) and effect.conn == conn and effect.frame.WhichOneof("body") == body
        ]

    def reports(self, body: str) -> list[Any]:
        return [
            getattr(effect.message, body)
            for effect in self.effects
            if isinstance(effect, events.ToCoordinator) and effect.message.WhichOneof("body") == body
        ]

    def done(self, kind: type) -> list[Any]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def steps(self) -> list[int]:
        """The steps that are sealed here."""
        return sorted({slot.key[1] for slot in self.core.slots.sealed(JOB)})


def slot_ref(step: int, rank: int = 0, epoch: int = 1) -> control.SlotRef:
    return control.SlotRef(
        job=JOB,
        epoch=epoch,
        step=step,
        rank=rank,
        world_size=2,
        file_bytes=LAYOUT.file_bytes,
        root_digest=f"{step}.{rank}",
        layout_hash=LAYOUT.hash,
    )


def training(**options: Any) -> Bench:
    """One worker here (rank 0), rank 1 on n1; the epoch is complete and the first slot granted."""
    bench = Bench(**options)
    bench.hello(1, 0)
    bench.formed("n0", "n1")
    bench.register(1)
    return bench


# ---------------------------------------------------------------- grants and seals


def test_a_layout_is_accepted_with_its_first_slot_and_a_grant_follows() -> None:
    bench = training()
    assert [reply.accepted for reply in bench.to_worker(1, "layout_reply")] == [True]
    (grant,) = bench.to_worker(1, "grant")
    assert (grant.path, grant.file_bytes, grant.layout_hash) == (
        f"/slots/{grant.slot_id}",
        LAYOUT.file_bytes,
        LAYOUT.hash,
    )


def test_a_layout_that_does_not_fit_the_budget_is_refused_with_the_numbers() -> None:
    bench = Bench(held=(events.CreateSlot,))
    bench.hello(1, 0)
    bench.register(1)
    (create,) = bench.done(events.CreateSlot)
    bench.handle(events.SlotRefused(slot=create.slot, reason="2 GiB are needed, 1 GiB is left"))
    (reply,) = bench.to_worker(1, "layout_reply")
    assert (reply.accepted, reply.reason) == (False, "2 GiB are needed, 1 GiB is left")


@pytest.mark.parametrize("newest", [5, 6])
def test_a_layout_that_grows_beyond_the_room_is_refused_though_the_old_ones_slots_are_there(newest: int) -> None:
    """A model is unfrozen in the middle: no step is kept from then on, and the worker would not hear why."""
    bench = training()
    bench.seal(1, 5)
    bench.committed(5)
    if newest == 6:
        bench.seal(1, 6)
    bench._held = (events.CreateSlot,)
    wide = TensorBox(name="w", dtype="float32", global_shape=(99,), box=Box((0,), (99,)), scope="global", kind="param")
    bench.register(1, Layout.build([wide], meta_capacity=64).header)
    if newest == 6:  # there is no room for the question yet
        assert [True] == [reply.accepted for reply in bench.to_worker(1, "layout_reply")]
        bench.committed(6)
    (create,) = bench.done(events.CreateSlot)
    bench.handle(events.SlotRefused(slot=create.slot, reason="2 GiB are needed, 1 GiB is left"))
    (reply,) = bench.to_worker(1, "layout_reply")
    assert (reply.accepted, reply.reason) == (False, "2 GiB are needed, 1 GiB is left")
    assert [7] == [effect.frame.request_id for effect in bench.done(events.ToWorker)]
    assert [newest] == bench.steps()


def test_a_header_that_is_none_is_refused() -> None:
    bench = Bench()
    bench.hello(1, 0)
    bench.register(1, b"nonsense")
    assert [reply.accepted for reply in bench.to_worker(1, "layout_reply")] == [False]


def test_a_sealed_step_is_reported_when_all_ranks_here_have_sealed_it() -> None:
    bench = Bench()
    for conn in (1, 2):
        bench.hello(conn, conn - 1, here=2)
    bench.formed("n0", "n0")
    for conn in (1, 2):
        bench.register(conn)
    bench.seal(1, 5)
    assert bench.reports("sealed") == []
    bench.seal(2, 5)
    (sealed,) = bench.reports("sealed")
    assert [shard.slot.rank for shard in sealed.shards] == [0, 1]


def test_a_step_that_another_rank_here_left_out_is_reported_as_it_is() -> None:
    bench = Bench()
    for conn in (1, 2):
        bench.hello(conn, conn - 1, here=2)
    bench.formed("n0", "n0")
    for conn in (1, 2):
        bench.register(conn)
    bench.seal(1, 5)
    bench.frame(2, 0, skip=worker.Skip(step=5, reason=worker.Skip.REASON_TORN))
    assert [shard.slot.rank for shard in bench.reports("sealed")[0].shards] == [0]
    assert [(skipped.rank, skipped.reason) for skipped in bench.reports("skipped")] == [(1, "TORN")]


def test_another_jobs_slot_cannot_be_sealed() -> None:
    """A worker that guesses a slot number must not be able to touch it."""
    bench = training()
    bench.hello(9, 0, job="other")
    bench.frame(9, 0, seal=worker.Seal(slot_id=bench.granted(1), step=3))
    assert bench.done(events.SealSlot) == []
    assert bench.core.state.counters["seals_of_unknown_slots"] == 1


def test_a_worker_that_dies_while_it_writes_gives_its_slot_back_void() -> None:
    bench = training()
    slot = bench.granted(1)
    bench.handle(events.WorkerGone(conn=events.WorkerConn(1)))
    assert [effect.slot for effect in bench.done(events.VoidSlot)] == [slot]
    assert bench.core.state.slots[events.SlotId(slot)].state.value == "free"
    assert [gone.finished for gone in bench.reports("worker_detached")] == [False]


def test_two_steps_with_the_same_bytes_are_an_alarm() -> None:
    bench = training(held=(events.SealSlot,))
    for step in (5, 6):
        bench.seal(1, step)
        (order,) = bench.done(events.SealSlot)
        bench.handle(events.SlotSealed(slot=order.slot, ref=order.ref, data_digest="same", seconds=0.0))
    assert bench.core.state.counters["identical_states"] == 1
    assert any(isinstance(effect, events.Note) and "identical state" in effect.text for effect in bench.effects)


def test_a_new_layout_deletes_the_old_slots() -> None:
    bench = training()
    slot = bench.granted(1)
    box = replace(_BOX, global_shape=(9,), box=Box((0,), (9,)))
    other = Layout.build([box], meta_capacity=64)
    bench.register(1, other.header)
    assert slot in [effect.slot for effect in bench.done(events.DeleteSlot)]
    assert bench.to_worker(1, "grant")[-1].layout_hash == other.hash


def test_at_most_the_generations_are_held() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.seal(1, 6)
    assert bench.to_worker(1, "grant") == []
    assert len(bench.core.state.slots) == 2


def test_a_slot_that_a_reader_holds_gets_a_stand_in_until_the_reader_has_done() -> None:
    """A conversion of the live job takes minutes: each step in between would be unprotected."""
    bench = training(held=(events.VoidSlot,))
    bench.seal(1, 5)
    bench.committed(5)
    bench.seal(1, 6)
    bench.committed(6)
    (held,) = bench.done(events.VoidSlot)
    bench.now = 0.9  # a peer's read to protect a step takes no longer
    bench.handle(events.Ticked())
    assert [] == bench.done(events.CreateSlot) == bench.to_worker(1, "grant")
    bench.now = 1.1
    bench.handle(events.Ticked())
    (stand_in,) = bench.done(events.CreateSlot)
    assert LAYOUT.file_bytes == stand_in.held_bytes  # beside two generations with their parity
    assert [stand_in.slot] == [grant.slot_id for grant in bench.to_worker(1, "grant")]
    assert 1 == bench.core.state.counters["slots_beside_held"]
    bench.seal(1, 7)
    assert [6, 7] == bench.steps()
    assert [] == bench.done(events.CreateSlot) == bench.to_worker(1, "grant")  # generations is the limit all the same
    bench.handle(events.SlotReady(slot=held.slot))
    assert [held.slot] == [effect.slot for effect in bench.done(events.DeleteSlot)]
    assert 2 == len(bench.core.state.slots)


def test_without_memory_for_a_stand_in_steps_are_left_out_and_the_slot_comes_back() -> None:
    """Where two generations are all that fits, a long conversion costs steps; it never makes training wait."""
    bench = training(held=(events.VoidSlot,))
    for step in (5, 6):
        bench.seal(1, step)
        bench.committed(step)
    (held,) = bench.done(events.VoidSlot)
    bench._held = (events.VoidSlot, events.CreateSlot)
    bench.now = 2.0
    bench.handle(events.Ticked())
    (create,) = bench.done(events.CreateSlot)
    bench.handle(events.SlotRefused(slot=create.slot, reason="4 KiB are missing"))
    assert 1 == bench.core.state.counters["slots_refused"]
    assert ["no slot for rank 0: 4 KiB are missing"] == [note.text for note in bench.done(events.Note)]
    bench.frame(1, 0, skip=worker.Skip(step=7, reason=worker.Skip.REASON_NO_SLOT))
    assert [(7, "NO_SLOT")] == [(one.step, one.reason) for one in bench.reports("skipped")]
    assert [6] == bench.steps()
    bench.handle(events.SlotReady(slot=held.slot))
    assert [held.slot] == [grant.slot_id for grant in bench.to_worker(1, "grant")]
    bench.seal(1, 8)
    assert [6, 8] == bench.steps()


# ---------------------------------------------------------------- protect, commit, abandon


def test_parity_is_built_once_and_answered_each_time() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.protect(5)
    assert len(bench.done(events.BuildParity)) == len(bench.reports("parity_built")) == 1
    bench.protect(5)
    assert bench.done(events.BuildParity) == []
    assert len(bench.reports("parity_built")) == 1


def interrupted_build() -> tuple[Bench, events.ParityFinished]:
    """A node that lost its coordinator and has it again while it builds, and how the build ends."""
    bench = training(held=(events.BuildParity,))
    bench.seal(1, 5)
    bench.protect(5)
    (build,) = bench.done(events.BuildParity)
    bench.handle(events.CoordinatorDown())
    bench.handle(events.CoordinatorUp())
    ref = control.ParityRef(set=build.protect.sets[0], position=0, file_bytes=64)
    return bench, events.ParityFinished(job=JOB, epoch=1, step=5, parities=(ref,), seconds=0.1)


def test_a_build_that_ends_after_its_coordinator_went_says_whole_what_there_is_now() -> None:
    """Another coordinator did not order it, and knows nothing of its stripe set."""
    bench, finished = interrupted_build()
    bench.handle(finished)
    assert bench.reports("parity_built") == []
    assert [list(change.parities_added) for change in bench.reports("inventory_change")] == [list(finished.parities)]
    bench.protect(5)
    assert [list(built.lanes) for built in bench.reports("parity_built")] == [[0]]


def test_a_build_that_was_ordered_again_before_it_could_be_stopped_answers_that_order() -> None:
    bench, finished = interrupted_build()
    bench.protect(5)
    bench.handle(finished)
    assert [list(built.lanes) for built in bench.reports("parity_built")] == [[0]]


def test_a_protect_for_a_step_that_is_gone_fails_in_words() -> None:
    bench = training()
    bench.protect(5)
    assert "slot of rank 0 is not here" in bench.reports("parity_failed")[0].reason


def test_a_commit_frees_what_is_older_and_never_itself() -> None:
    bench = training()
    for step in (5, 6):
        bench.seal(1, step)
        bench.protect(step)
        bench.committed(step)
    assert bench.steps() == [6]
    assert {key[1] for key in bench.core.state.jobs[JOB].parities} == {6}
    bench.committed(5)
    assert bench.steps() == [6]


def test_an_abandoned_step_is_freed_and_the_next_grant_says_where_to_go_on() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.committed(5)
    bench.seal(1, 6)
    bench.said(abandon=control.Abandon(job=JOB, epoch=1, up_to_step=7, min_step=8))
    assert bench.steps() == [5]
    assert bench.to_worker(1, "grant")[-1].min_step == 8
    bench.seal(1, 7)
    assert bench.steps() == [5]
    assert [skipped.reason for skipped in bench.reports("skipped")] == ["ALIGNING"]
    bench.seal(1, 8)
    assert bench.steps() == [5, 8]


def test_a_slot_that_is_being_persisted_is_held_until_that_ends() -> None:
    bench = training(held=(events.PersistSlots,))
    bench.seal(1, 5)
    bench.committed(5)
    bench.said(persist=control.Persist(job=JOB, epoch=1, step=5, world_size=2))
    bench.seal(1, 6)
    bench.committed(6)
    assert bench.steps() == [5, 6]
    bench.handle(events.PersistFinished(done=control.PersistDone(job=JOB, epoch=1, step=5, ok=True)))
    assert bench.steps() == [6]


def test_orders_of_an_older_epoch_are_ignored_and_counted() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.formed("n0", "n1", epoch=2)
    bench.said(abandon=control.Abandon(job=JOB, epoch=1, up_to_step=5, min_step=6))
    bench.protect(5)
    assert bench.steps() == [5]
    assert bench.core.state.counters["stale_messages"] == 2


def test_a_worker_of_an_older_epoch_is_sent_away() -> None:
    bench = Bench()
    bench.formed("n0", "n1", epoch=3)
    bench.hello(1, 0, epoch=2)
    (error,) = bench.to_worker(1, "error")
    assert (error.code, error.fatal) == ("STALE_EPOCH", True)
    assert len(bench.done(events.CloseWorker)) == 1


def test_another_process_of_the_same_rank_takes_its_place_and_the_older_waits_until_it_is_gone() -> None:
    """Two trainings without a name would take each other's place for ever, and neither would be protected."""
    bench = Bench()
    bench.hello(1, 0, nonce="one", pid=11)
    bench.hello(2, 0, nonce="two", pid=22)
    (error,) = bench.to_worker(1, "error")
    assert ("STALE_EPOCH", False) == (error.code, error.fatal)
    assert "another process, 22, is rank 0 of job job on this node now" in error.message
    assert "SNAPSHOTD_JOB" in error.message
    assert [events.CloseWorker(conn=events.WorkerConn(1))] == bench.done(events.CloseWorker)
    bench.hello(3, 0, nonce="one", pid=11)
    assert ([error], []) == (bench.to_worker(3, "error"), bench.to_worker(3, "welcome"))
    # A process that has lost its connection and makes another one is no other process.
    bench.hello(4, 0, nonce="two", pid=22)
    assert ([], 1) == (bench.to_worker(2, "error"), len(bench.to_worker(4, "welcome")))
    bench.handle(events.WorkerGone(conn=events.WorkerConn(4)))
    bench.hello(5, 0, nonce="one", pid=11)
    assert 1 == len(bench.to_worker(5, "welcome"))


def test_a_launch_without_epoch_is_granted_nothing_until_its_epoch_is_complete() -> None:
    bench = Bench()
    bench.hello(1, 0, epoch=0, formation="h:1:0")
    bench.register(1)
    assert bench.to_worker(1, "grant") == []
    bench.formed("n0", "n1", epoch=4, formation="h:1:0")
    assert len(bench.to_worker(1, "grant")) == 1
    # Another process of the same launch is not of that epoch, whatever the node was told before.
    bench.hello(2, 0, epoch=0, formation="h:1:0", nonce="another")
    bench.register(2)
    bench.formed("n0", "n1", epoch=4, formation="h:1:0")
    assert bench.to_worker(2, "grant") == []


# ---------------------------------------------------------------- the coordinator is away


def test_capture_goes_on_without_a_coordinator_and_the_committed_step_stays() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.committed(5)
    bench.handle(events.CoordinatorDown())
    for step in (6, 7, 8):
        bench.seal(1, step)
    assert bench.steps() == [5]
    assert bench.core.state.counters["overwritten_uncommitted"] == 3
    bench.handle(events.CoordinatorUp())
    assert [ref.step for ref in bench.reports("hello")[0].slots] == [5]


def test_a_step_whose_parity_is_whole_is_not_overwritten_while_the_coordinator_is_away() -> None:
    """The coordinator may have committed it in its last moment; its own older step may be freed elsewhere by now."""
    bench = training()
    bench.seal(1, 5)
    bench.committed(5)
    bench.seal(1, 6)
    bench.protect(6)
    bench.handle(events.CoordinatorDown())
    for step in (7, 8):
        bench.seal(1, step)
    assert {5, 6} <= set(bench.steps())


@pytest.mark.parametrize("pledged", [True, False])
def test_what_was_pledged_stays_while_the_coordinator_is_away_and_until_it_decides(pledged: bool) -> None:
    """A step that it may commit without another word to this node."""
    nbytes = LAYOUT.file_bytes
    bench = training(settings=replace(SETTINGS, pledge_bytes=nbytes if pledged else nbytes - 1))
    bench.seal(1, 5)
    bench.committed(5)
    bench.seal(1, 6)
    (sealed,) = bench.reports("sealed")
    assert [pledged] == [shard.pledged for shard in sealed.shards]
    bench.handle(events.CoordinatorDown())
    for step in (7, 8, 9):
        bench.seal(1, step)
    assert ([5, 6] if pledged else [5]) == [step for step in bench.steps() if step < 7]
    bench.handle(events.CoordinatorUp())
    bench.said(abandon=control.Abandon(job=JOB, epoch=1, up_to_step=9, min_step=10))
    assert [5] == bench.steps()


def test_a_build_is_cancelled_when_the_coordinator_goes_and_begins_again_after_it_ended() -> None:
    bench = training(held=(events.BuildParity,))
    bench.seal(1, 5)
    bench.protect(5)
    bench.handle(events.CoordinatorDown())
    assert len(bench.done(events.CancelParity)) == 1
    bench.handle(events.CoordinatorUp())
    bench.protect(5)
    assert bench.done(events.BuildParity) == []
    bench.handle(events.ParityAborted(job=JOB, epoch=1, step=5, reason="cancelled"))
    assert len(bench.done(events.BuildParity)) == 1
    assert bench.reports("parity_failed") == []


def test_the_hello_says_all_that_is_here_and_sealed_steps_are_reported_again() -> None:
    recovered = events.Recovered(slots=((events.SlotId(4), slot_ref(5), "/slots/4"),))
    bench = Bench(recovered=recovered, connected=False)
    bench.hello(1, 0)
    bench.handle(events.CoordinatorUp())
    (hello,) = bench.reports("hello")
    assert ([ref.step for ref in hello.slots], dict(hello.epochs)) == ([5], {JOB: 1})
    assert [attached.rank for attached in hello.workers] == [0]
    assert [sealed.step for sealed in bench.reports("sealed")] == [5]


def test_what_was_found_at_the_start_is_not_overwritten_before_the_coordinator_is_heard() -> None:
    slots = tuple((events.SlotId(4 + step), slot_ref(step), "") for step in (5, 6))
    bench = Bench(recovered=events.Recovered(slots=slots), connected=False)
    bench.hello(1, 0)
    bench.register(1)
    for step in (7, 8):
        bench.seal(1, step)
    assert {5, 6} <= set(bench.steps())
    # A coordinator that knows of no commit (its store may have forgotten it) settles nothing by its welcome alone.
    bench.handle(events.CoordinatorUp())
    bench.said(welcome=control.NodeWelcome())
    bench.handle(events.CoordinatorDown())
    for step in (9, 10):
        bench.seal(1, step)
    assert {5, 6} <= set(bench.steps())
    bench.committed(6)
    assert 5 not in bench.steps()


# ---------------------------------------------------------------- drop, rebuild, corruption


def test_dropping_frees_older_epochs_but_what_is_kept() -> None:
    slots = tuple((events.SlotId(4 + step), slot_ref(step), "") for step in (5, 6))
    bench = Bench(recovered=events.Recovered(slots=slots))
    keep = [control.DropSnapshots.Keep(epoch=1, step=5)]
    bench.said(drop=control.DropSnapshots(job=JOB, epoch=2, keep=keep))
    assert bench.steps() == [5]
    # A commit of the older epoch that was under way says nothing any more.
    bench.committed(6)
    assert bench.steps() == [5]


def test_after_an_older_epochs_snapshot_is_kept_one_slot_can_still_be_granted() -> None:
    slots = tuple((events.SlotId(4 + step), slot_ref(step), "") for step in (5, 6))
    bench = Bench(recovered=events.Recovered(slots=slots))
    bench.hello(1, 0, epoch=2)
    bench.register(1)
    assert len(bench.to_worker(1, "grant")) == 1
    assert bench.steps() == [5, 6]


def test_a_rebuilt_slot_counts_as_held_and_is_deleted_when_it_is_old() -> None:
    bench = training()
    members = [control.StripeMember(node_id=n, slot=slot_ref(5, r)) for r, n in enumerate(("n0", "n1"))]
    one = control.StripeSet(job=JOB, epoch=1, step=5, m=1, members=members)
    order = control.Rebuild(set=one, position=1, slot=True, slot_nodes=["n0", ""], parity_nodes=["n0", ""])
    bench.said(rebuild=order)
    (work,) = bench.done(events.RebuildObject)
    bench.said(rebuild=order)
    assert bench.done(events.RebuildObject) == []
    done = control.RebuildDone(job=JOB, epoch=1, step=5, position=1, ok=True, slot=slot_ref(5, 1))
    bench.handle(events.RebuildFinished(done=done, slot=work.slot))
    assert [report.ok for report in bench.reports("rebuild_done")] == [True]
    bench.seal(1, 6)
    bench.committed(6)
    assert work.slot in [effect.slot for effect in bench.done(events.DeleteSlot)]


def test_corrupt_bytes_are_an_erasure_from_then_on() -> None:
    bench = training()
    bench.seal(1, 5)
    slot, ref = next((slot.slot, slot.ref) for slot in bench.core.slots.sealed(JOB))
    bench.handle(events.CorruptionFound(slot=slot, ref=ref, parity=None, detail="chunk 3"))
    (change,) = bench.reports("inventory_change")
    assert ([one.step for one in change.slots_removed], change.reason) == ([5], "corrupt")
    assert bench.steps() == []


def test_heartbeats_carry_the_counters() -> None:
    bench = training()
    bench.seal(1, 5)
    bench.now = 1.0
    bench.handle(events.Ticked())
    assert bench.reports("heartbeat")[0].counters["sealed_slots"] == 1
