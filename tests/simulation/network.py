"""
The simulated network: sessions that keep their order, may break and lose their tail, and, in wild mode, deliver
messages twice or in another order.

One order is never broken, not even in wild mode: what the coordinator says in one session. Nodes and launchers rely on
it (a commit is said before the abandonment of what came after), and a stream keeps it. Late doubles do come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.world import World


class Link:
    """One session of a peer with the coordinator. Messages travel as bytes."""

    def __init__(
        self,
        world: World,
        sid: str,
        *,
        up: Callable[[str, bytes], None],
        down: Callable[[Link, bytes], None],
        ended_up: Callable[[str], None],
        ended_down: Callable[[Link], None],
        latency: float,
        ordered: bool = False,
    ) -> None:
        self.sid = sid
        self.open = True
        self._world = world
        self._dice = world.dice.stream("network")
        self._ends: dict[str, Callable[[bytes], None]] = {
            "up": lambda data: up(sid, data),
            "down": lambda data: down(self, data),
        }
        self._ended_up, self._ended_down = ended_up, ended_down
        self._latency = latency
        self._ordered = ordered
        self._last = {"up": 0.0, "down": 0.0}
        self._first_at: dict[str, float] = {}

    def send(self, direction: str, message: Any) -> None:
        if not self.open:
            return
        data = message.SerializeToString()
        wild = self._world.plan.wild
        now, first_at = self._world.clock.now, self._first_at.get(direction)
        delay = self._latency * self._dice.uniform(0.5, 2.0)
        # The first message of a session (the hello) is the first: without it there is no session.
        reorder = wild and self._dice.random() < 0.15
        if reorder and first_at is not None and not (self._ordered and direction == "down"):
            at = max(now + delay + self._dice.uniform(0.0, 0.5), first_at)
            self._world.probe("reordered")
        else:
            at = max(now + delay, self._last[direction])
            self._last[direction] = at
            self._first_at.setdefault(direction, at)
        self._world.clock.after(at - now, self._deliver, direction, data)
        if wild and self._dice.random() < 0.1:
            self._world.clock.after(at - now + self._dice.uniform(0.0, 1.0), self._deliver, direction, data)
            self._world.probe("doubled")

    def _deliver(self, direction: str, data: bytes) -> None:
        if self.open:
            self._ends[direction](data)

    def cut(self, *, notice_up: float | None = None, notice_down: float | None = None) -> None:
        """The stream breaks: what is under way is lost; each end notices at its own time."""
        if not self.open:
            return
        self.open = False
        up = self._dice.uniform(0.0, 0.3) if notice_up is None else notice_up
        down = self._dice.uniform(0.0, 0.3) if notice_down is None else notice_down
        self._world.clock.after(up, self._ended_up, self.sid)
        self._world.clock.after(down, self._ended_down, self)
