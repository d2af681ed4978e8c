"""The simulated coordinator host: the production core, its store, its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotd.coordinator.events import (
    AgentMessageArrived,
    AgentSessionEnded,
    Answer,
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
    ToNode,
)
from snapshotd.v1 import control_pb2 as control

if TYPE_CHECKING:
    from snapshotd.coordinator.core import CoordinatorCore
    from tests.simulation.network import Link
    from tests.simulation.world import World

TICK_S = 0.5


class SimCoordinator:
    """Obeys the core in the order of Output; may be killed between persisting and sending."""

    def __init__(self, world: World) -> None:
        self.core: CoordinatorCore | None = None
        self.links: dict[str, Link] = {}
        self.answers: list[Answer] = []
        self.incarnation = 0
        self.crash_mid_output = False
        self._world = world
        self._store: dict[tuple[str, str], str] = {}
        self._undo: list[tuple[tuple[str, str], str | None]] = []

    @property
    def up(self) -> bool:
        return self.core is not None

    def start(self) -> None:
        if self.core is not None:
            return
        self.incarnation += 1
        remembered = [(job, key, value) for (job, key), value in sorted(self._store.items())]
        self.core = self._world.core_class(self._world.plan.core_settings, remembered)
        self._world.clock.tell(f"coordinator starts, incarnation {self.incarnation}")
        self._tick(self.incarnation)

    def crash(self, *, lose_unsynced: bool) -> None:
        if self.core is None:
            return
        self._world.clock.tell(f"coordinator crashes, lose_unsynced={lose_unsynced}")
        self._world.probe("coordinator_crash")
        self.core = None
        if lose_unsynced:
            for key, value in reversed(self._undo):
                if value is None:
                    self._store.pop(key, None)
                else:
                    self._store[key] = value
        self._undo.clear()
        for link in list(self.links.values()):
            link.cut()
        self.links.clear()

    def handle(self, event: Event) -> None:
        if self.core is None:
            return
        output = self.core.handle(event, self._world.clock.now)
        self._world.checks.before_persist(output)
        for effect in output.persist:
            self._persist(effect)
        if self.crash_mid_output and output.persist:
            self.crash_mid_output = False
            self._world.probe("crash_between_persist_and_send")
            self.crash(lose_unsynced=False)
            self._world.clock.after(self._world.dice.stream("faults").uniform(0.5, 4.0), self.start)
            return
        self._obey(output)

    def _obey(self, output: Output) -> None:
        for send in output.send:
            self._world.checks.on_send(send)
            link = self.links.get(send.session)
            if link is not None:
                kind = "node" if isinstance(send, ToNode) else "agent"
                self._world.clock.tell(f"C->{kind} {send.session} {send.message.WhichOneof('body')}")
                link.send("down", send.message)
        for answer in output.answer:
            self.answers.append(answer)
            self._world.clock.tell(f"answer {answer.request_id} {answer.error_code}")
        for note in output.notes:
            self._world.clock.tell(f"note {note.stream}: {note.text}")
        for session in output.close:
            link = self.links.get(session)
            if link is not None:
                link.cut()

    def _persist(self, effect: Put | Delete) -> None:
        if isinstance(effect, Delete):
            for key in [key for key in self._store if key[0] == effect.job and effect.key in (None, key[1])]:
                del self._store[key]
            self._undo.clear()
            return
        key = (effect.job, effect.key)
        self._undo.append((key, self._store.get(key)))
        self._store[key] = effect.value
        if effect.sync:
            self._undo.clear()

    # ------------------------------------------------------------ facts

    def node_said(self, sid: str, data: bytes) -> None:
        self.handle(NodeMessageArrived(session=SessionId(sid), message=control.NodeMessage.FromString(data)))

    def agent_said(self, sid: str, data: bytes) -> None:
        self.handle(AgentMessageArrived(session=SessionId(sid), message=control.AgentMessage.FromString(data)))

    def node_ended(self, sid: str) -> None:
        if self.links.pop(sid, None) is not None:
            self.handle(NodeSessionEnded(session=SessionId(sid)))

    def agent_ended(self, sid: str) -> None:
        if self.links.pop(sid, None) is not None:
            self.handle(AgentSessionEnded(session=SessionId(sid)))

    def want(self, request_id: str, step: int | None) -> None:
        self.handle(SnapshotWanted(request_id=request_id, job=self._world.job, step=step))

    def forget(self) -> None:
        if self.core is not None:
            self._world.checks.on_forget()
            self.handle(ForgetWanted(request_id="forget", job=self._world.job))

    def _tick(self, incarnation: int) -> None:
        if self.core is not None and self.incarnation == incarnation:
            self.handle(Ticked())
            self._world.clock.after(TICK_S, self._tick, incarnation)
