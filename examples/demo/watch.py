"""
What can be seen of the cluster from outside: the coordinator's status (as `snapshotd status --json` shows it) and the
training run's own record. One thread looks a few times a second; everybody reads the newest picture.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.demo.records import Loss, Start, Tail
from snapshotd.cli.status import fetch
from snapshotd.errors import SnapshotdError
from snapshotd.settings import ToolSettings

__all__ = ["Event", "Picture", "Recovery", "Watcher"]

_LOOK_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, in words. source: "demo", or a stream of the coordinator's."""

    time: float
    source: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One recovery as the coordinator timed it."""

    epoch: int
    reason: str
    lost_steps: int
    phases: Mapping[str, float]


@dataclass(slots=True)
class Picture:
    """The newest of everything. status is None while the coordinator does not answer."""

    status: dict[str, Any] | None = None
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    recoveries: dict[int, Recovery] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The newest step that was done in the present epoch; -1 when there is none."""
        if not self.losses or (self.starts and self.starts[-1].time > self.losses[-1].time):
            return self.starts[-1].first - 1 if self.starts else -1
        return self.losses[-1].step

    @property
    def committed_step(self) -> int:
        return int((self.job.get("committed") or {}).get("step", -1))

    @property
    def committed_level(self) -> str:
        return str((self.job.get("committed") or {}).get("level", ""))

    @property
    def sealed_step(self) -> int:
        """The newest step that all ranks have in their node's memory."""
        sealed = (self.job.get("pending") or {}).get("sealed") or {}
        whole = [int(step) for step, shards in sealed.items() if shards == self.job.get("world_size")]
        return max([*whole, self.committed_step])

    @property
    def epoch(self) -> int:
        return int(self.job.get("epoch", 0))

    @property
    def members(self) -> list[str]:
        return list(self.job.get("members") or ())

    def protected(self) -> bool:
        """The newest commit is in the present epoch and survives the loss of a node."""
        committed = self.job.get("committed") or {}
        return (
            self.status is not None
            and committed.get("level") == "protected"
            and committed.get("epoch") == self.epoch
            and (self.job.get("margin") or 0) > 0
        )


class Watcher:
    """Looks until `stop`. `picture` is replaced as a whole, so it may be read without a lock."""

    def __init__(self, address: Callable[[], str], job: str, run: Tail) -> None:
        self._address, self._job, self._run = address, job, run
        self._told: set[tuple[float, str]] = set()
        self._own: list[Event] = []
        self._picture = Picture()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    @property
    def picture(self) -> Picture:
        return self._picture

    def tell(self, text: str) -> None:
        """An event of the demo's own."""
        with self._lock:
            self._own.append(Event(time=time.time(), source="demo", text=text))

    def look(self) -> None:
        """Make a new picture."""
        old = self._picture
        status: dict[str, Any] | None = None
        with contextlib.suppress(SnapshotdError):
            status = fetch(_tools(self._address()))
        picture = Picture(
            status=status,
            nodes=old.nodes,
            job=old.job,
            events=list(old.events),
            recoveries=dict(old.recoveries),
            starts=list(old.starts),
            losses=list(old.losses),
        )
        for line in self._run.read():
            (picture.starts if isinstance(line, Start) else picture.losses).append(line)
        if status is not None:
            picture.nodes = {str(node["node_id"]): node for node in status["nodes"]}
            picture.job = next((job for job in status["jobs"] if job["job"] == self._job), old.job)
            self._take_recoveries(picture)
        self._take_events(picture, status)
        self._picture = picture

    def _take_recoveries(self, picture: Picture) -> None:
        for entry in picture.job.get("recoveries", ()):
            recovery = Recovery(
                epoch=int(entry["epoch"]),
                reason=str(entry["reason"]),
                lost_steps=int(entry["lost_steps"]),
                phases=dict(entry["phases"]),
            )
            known = picture.recoveries.get(recovery.epoch)
            if known is None or len(recovery.phases) >= len(known.phases):
                picture.recoveries[recovery.epoch] = recovery

    def _take_events(self, picture: Picture, status: Mapping[str, Any] | None) -> None:
        with self._lock:
            new, self._own = self._own, []
        for note in (status or {}).get("events", ()):
            key = (float(note["time"]), str(note["text"]))
            if key not in self._told:
                self._told.add(key)
                new.append(Event(time=key[0], source=str(note["stream"]), text=key[1]))
        picture.events.extend(sorted(new, key=lambda event: event.time))

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            self.look()


def _tools(address: str) -> ToolSettings:
    return ToolSettings(coordinator=address, tls_cert="", tls_key="", tls_ca="", insecure=False)
