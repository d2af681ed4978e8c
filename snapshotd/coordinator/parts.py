"""A job and the parts of the core that work on it."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotd.coordinator.commits import Commits
from snapshotd.coordinator.hangs import HangWatch
from snapshotd.coordinator.job import Job
from snapshotd.coordinator.persists import Persists
from snapshotd.coordinator.rebuilds import Rebuilds
from snapshotd.coordinator.recovery import Recovery
from snapshotd.coordinator.rendezvous_core import Launchers

__all__ = ["JobParts"]


@dataclass(slots=True)
class JobParts:
    """A job and the parts of the core that work on it."""

    job: Job
    launchers: Launchers
    commits: Commits
    persists: Persists
    rebuilds: Rebuilds
    recovery: Recovery
    hangs: HangWatch
    attach_noted: bool = False
