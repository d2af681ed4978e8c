"""Deliberate defects in the production cores: the simulator must find each of them within 400 seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from snapshotd.coordinator.commits import Commits
from snapshotd.coordinator.core import CoordinatorCore
from snapshotd.coordinator.events import SessionId
from snapshotd.coordinator.inventory import Inventory, Node
from snapshotd.coordinator.membership import Epoch
from snapshotd.daemon.core_protect import Protects
from snapshotd.daemon.core_slots import Slots
from snapshotd.daemon.core_state import JobState, Slot
from snapshotd.daemon.events import ParityFinished
from snapshotd.v1 import control_pb2 as control
from tests.simulation.checks import InvariantBroken
from tests.simulation.world import World

SEEDS = 400


def accept_old_epochs(patch: pytest.MonkeyPatch) -> None:
    """What a node says of an older epoch counts as if it were said of the current one."""
    job_message, hello = CoordinatorCore._on_job_message, CoordinatorCore._on_hello

    def renew(self: CoordinatorCore, said: Any) -> None:
        parts = self.jobs.get(said.job)
        if parts is not None and 0 < said.epoch < parts.job.number:
            said.epoch = parts.job.number

    def on_job_message(self: CoordinatorCore, node: Node, body: str, message: control.NodeMessage) -> None:
        if body != "persist_sealed":
            renew(self, getattr(message, body))
        job_message(self, node, body, message)

    def on_hello(self: CoordinatorCore, session: SessionId, message: control.NodeHello) -> None:
        for worker in message.workers:
            renew(self, worker)
        hello(self, session, message)

    patch.setattr(CoordinatorCore, "_on_job_message", on_job_message)
    patch.setattr(CoordinatorCore, "_on_hello", on_hello)


def commit_with_a_node_missing(patch: pytest.MonkeyPatch) -> None:
    """The last node that builds parity is not waited for."""
    note_built = Commits._note_built

    def hasty(self: Commits, node: Node) -> None:
        note_built(self, node)
        if self.in_flight is not None and len(self.in_flight.waiting) == 1:
            self.in_flight.waiting.clear()

    patch.setattr(Commits, "_note_built", hasty)
    patch.setattr(Commits, "_missing_parts", lambda self, epoch, flight: [])


def free_the_committed_too_early(patch: pytest.MonkeyPatch) -> None:
    """A node frees the committed snapshot as soon as it has built parity of a newer one."""
    finished = Protects.on_finished

    def hasty(self: Protects, event: ParityFinished) -> None:
        finished(self, event)
        job = self._state.job(event.job)
        self._slots.free(job, lambda key: key < (event.epoch, event.step))

    patch.setattr(Protects, "on_finished", hasty)


def decide_while_slots_are_hashed(patch: pytest.MonkeyPatch) -> None:
    """What workers that are gone have handed over is not waited for."""
    patch.setattr(Inventory, "sealing", lambda self, job, now: [])


def overwrite_what_was_pledged(patch: pytest.MonkeyPatch) -> None:
    """While the coordinator is away, a node gives away what it was not asked about, because it had pledged it."""
    exposed = Slots._exposed

    def forgetful(self: Slots, job: JobState, slot: Slot) -> bool:
        pledged, job.pledged = job.pledged, set()
        found = exposed(self, job, slot)
        job.pledged = pledged
        return found

    patch.setattr(Slots, "_exposed", forgetful)


def believe_what_has_only_begun(patch: pytest.MonkeyPatch) -> None:
    """A node that builds parity without an order is not waited for."""
    begin = Commits._begin

    def hasty(self: Commits, epoch: Epoch, step: int) -> None:
        begin(self, epoch, step)
        if self.in_flight is not None:
            self.in_flight.waiting -= self.in_flight.unasked

    patch.setattr(Commits, "_begin", hasty)
    patch.setattr(Commits, "_missing_parts", lambda self, epoch, flight: [])


def overwrite_what_nobody_ordered(patch: pytest.MonkeyPatch) -> None:
    """A node that has built parity without an order gives the step's slots away, although it may be committed."""
    finished = Protects.on_finished

    def forgetful(self: Protects, event: ParityFinished) -> None:
        job = self._state.job(event.job)
        unasked = job.unasked is not None
        finished(self, event)
        if unasked:
            job.built.discard((event.epoch, event.step))

    patch.setattr(Protects, "on_finished", forgetful)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "plant",
    [
        accept_old_epochs,
        believe_what_has_only_begun,
        commit_with_a_node_missing,
        decide_while_slots_are_hashed,
        free_the_committed_too_early,
        overwrite_what_nobody_ordered,
        overwrite_what_was_pledged,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_defect_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            World(seed).run()
        except InvariantBroken as error:
            print(f"found by {error}")
            return
    pytest.fail(f"{plant.__name__} was not found within {SEEDS} seeds")
