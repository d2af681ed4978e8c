"""
What the coordinator knows of one job, and what of it is remembered over restarts.

Rule 1: `number` (the newest epoch) and `lineage` never go back; they are Put before anybody is told.
Rule 2: only snapshots on the current line count: an epoch's own steps, and those of its source up to the step it
branched from, and so on back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snapshotd.coordinator.events import CoreSettings
from snapshotd.coordinator.inventory import Inventory, SnapshotKey
from snapshotd.coordinator.membership import Epoch, Round
from snapshotd.coordinator.outbox import Outbox
from snapshotd.v1 import control_pb2 as control

__all__ = ["Context", "Decision", "Durable", "Episode", "Job", "Sealed"]

DURABLES_KEPT = 16
LINEAGE_KEPT = 64
EPISODES_KEPT = 20


@dataclass(slots=True)
class Context:
    """What all parts of the core share."""

    settings: CoreSettings
    nodes: Inventory
    out: Outbox
    now: float = 0.0
    started: float = 0.0


@dataclass(slots=True, frozen=True)
class Sealed:
    """The snapshot that may be relied on."""

    epoch: int
    step: int
    level: int
    world_size: int

    @property
    def key(self) -> SnapshotKey:
        return (self.epoch, self.step)


@dataclass(slots=True, frozen=True)
class Durable:
    """A whole snapshot on the durable tier."""

    epoch: int
    step: int
    world_size: int
    path: str


@dataclass(slots=True)
class Decision:
    """What the ranks of an epoch go on from. Once released it never changes."""

    epoch: int
    kind: int
    source: SnapshotKey | None = None
    world_size: int = 0
    reason: str = ""
    lost_steps: int = 0
    path: str = ""
    released: bool = False
    decided_at: float = 0.0

    def to_json(self) -> dict[str, object]:
        return {
            "epoch": self.epoch,
            "kind": self.kind,
            "source": list(self.source) if self.source is not None else None,
            "world_size": self.world_size,
            "reason": self.reason,
            "lost_steps": self.lost_steps,
            "path": self.path,
            "released": self.released,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decision:
        source = value["source"]
        return cls(
            epoch=int(value["epoch"]),
            kind=int(value["kind"]),
            source=None if source is None else (int(source[0]), int(source[1])),
            world_size=int(value["world_size"]),
            reason=str(value["reason"]),
            lost_steps=int(value["lost_steps"]),
            path=str(value["path"]),
            released=bool(value["released"]),
        )


@dataclass(slots=True)
class Episode:
    """One recovery, timed. Times are the core's `now`; None until it happened."""

    epoch: int
    reason: str
    noticed_at: float | None = None
    broken_at: float | None = None
    minted_at: float | None = None
    formed_at: float | None = None
    released_at: float | None = None
    first_step_at: float | None = None
    fetch_s: float = 0.0
    load_s: float = 0.0
    restored_at: float | None = None
    source: SnapshotKey | None = None
    kind: str = ""
    lost_steps: int = 0

    def phases(self) -> dict[str, float]:
        found = {
            "detect": _between(self.noticed_at, self.broken_at),
            "agree": _between(self.broken_at, self.minted_at),
            "start": _between(self.minted_at, self.formed_at),
            "decode": _between(self.formed_at, self.released_at),
            "fetch": self.fetch_s if self.restored_at is not None else None,
            "load": self.load_s if self.restored_at is not None else None,
            "first_step": _between(self.restored_at, self.first_step_at),
        }
        return {name: round(seconds, 4) for name, seconds in found.items() if seconds is not None}


@dataclass(slots=True)
class Job:
    """
    One job.

    number: the newest epoch. head: the last epoch that had a decision (the tip of the line). learned: daemons or
    launchers knew a newer epoch than the store, so what the store says about the past may be old.
    """

    name: str
    number: int = 0
    current: Epoch | None = None
    rounds: dict[str, Round] = field(default_factory=dict)
    committed: Sealed | None = None
    fallback: Sealed | None = None
    decision: Decision | None = None
    head: int = 0
    lineage: dict[int, SnapshotKey | None] = field(default_factory=dict)
    durables: dict[SnapshotKey, Durable] = field(default_factory=dict)
    ever: bool = False
    newest_sealed: SnapshotKey | None = None
    split: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    episodes: list[Episode] = field(default_factory=list)
    first_sign: tuple[float, str] | None = None
    learned: bool = False
    finished: bool = False
    last_m: int = 0

    def on_line(self, key: SnapshotKey) -> bool:
        """Whether the snapshot belongs to the history that the job is on."""
        epoch: int = self.head
        limit: int | None = None
        for _ in range(LINEAGE_KEPT + 1):
            if key[0] == epoch:
                return limit is None or key[1] <= limit
            source = self.lineage.get(epoch)
            if source is None:
                return False
            epoch, limit = source
        return False

    def counts_on_line(self, key: SnapshotKey) -> bool:
        """Whether a snapshot may be gone on from: on the line, or nothing is known of any line."""
        return not self.lineage or self.on_line(key)

    def descend(self, number: int, source: SnapshotKey | None) -> None:
        """The line goes on in epoch `number` from `source`."""
        self.lineage[number] = source
        self.head = number
        for old in sorted(self.lineage)[:-LINEAGE_KEPT]:
            del self.lineage[old]

    def node_ids(self) -> frozenset[str]:
        return frozenset() if self.current is None else frozenset(self.current.node_ids)

    def saw(self, key: SnapshotKey) -> None:
        self.ever = True
        if self.newest_sealed is None or key > self.newest_sealed:
            self.newest_sealed = key

    def sign(self, now: float, what: str) -> None:
        """The first sign that something is wrong: detection is timed from here."""
        if self.first_sign is None:
            self.first_sign = (now, what)

    def episode(self, epoch: int) -> Episode | None:
        return next((episode for episode in reversed(self.episodes) if episode.epoch == epoch), None)

    def open_episode(self, episode: Episode) -> None:
        self.episodes.append(episode)
        del self.episodes[:-EPISODES_KEPT]
        self.first_sign = None

    def add_durable(self, ref: control.DurableRef) -> None:
        key = (ref.epoch, ref.step)
        self.durables[key] = Durable(epoch=ref.epoch, step=ref.step, world_size=ref.world_size, path=ref.path)
        for old in sorted(self.durables)[:-DURABLES_KEPT]:
            del self.durables[old]

    def commit_json(self) -> dict[str, object]:
        return {
            "committed": _sealed_json(self.committed),
            "fallback": _sealed_json(self.fallback),
        }

    def line_json(self) -> dict[str, object]:
        return {
            "head": self.head,
            "lineage": [[epoch, *(source or ())] for epoch, source in sorted(self.lineage.items())],
            "decision": None if self.decision is None else self.decision.to_json(),
        }

    def durable_json(self) -> dict[str, object]:
        return {"durables": [[d.epoch, d.step, d.world_size, d.path] for d in self.durables.values()]}

    def remember(self, key: str, value: Mapping[str, Any]) -> None:
        """Take in one remembered key."""
        if key == "commit":
            self.committed = _sealed_from(value["committed"])
            self.fallback = _sealed_from(value["fallback"])
            if self.committed is not None:
                self.saw(self.committed.key)
        elif key == "line":
            self.head = int(value["head"])
            for entry in value["lineage"]:
                self.lineage[int(entry[0])] = (int(entry[1]), int(entry[2])) if len(entry) == 3 else None
            self.decision = None if value["decision"] is None else Decision.from_json(value["decision"])
        elif key == "durable":
            for epoch, step, world_size, path in value["durables"]:
                ref = control.DurableRef(job=self.name, epoch=epoch, step=step, world_size=world_size, path=path)
                self.add_durable(ref)
            self.ever = self.ever or bool(self.durables)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def _sealed_json(sealed: Sealed | None) -> list[int] | None:
    return None if sealed is None else [sealed.epoch, sealed.step, sealed.level, sealed.world_size]


def _sealed_from(value: list[int] | None) -> Sealed | None:
    return None if value is None else Sealed(epoch=value[0], step=value[1], level=value[2], world_size=value[3])
