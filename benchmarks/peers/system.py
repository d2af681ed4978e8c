"""What a system that keeps training states must do to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..state import Training

__all__ = ["Setting", "System"]


@dataclass(frozen=True, slots=True)
class Setting:
    """
    Where a system works.

    home: a directory in tmpfs for this rank. places: sockets and addresses that the part passes on (by name).
    """

    training: Training
    home: Path
    rank: int
    world: int
    places: dict[str, Any]


class System(ABC):
    """
    One system. The trainer calls `ready`, then for each step: save, (forward and backward), fence, (update), drain.

    Attributes:
        outlives: what the snapshot survives once `complete` returns: "worker", "node" or "nothing".
        lacks: which of our parts it does not have ("digest", "redundancy"), for the table.
        waits: the next save waits for `drain`; else it would be left out, and training is not held.
        polls: `complete` asks again and again, which costs training something: steps that are watched are not timed.
    """

    name = ""
    outlives = "worker"
    lacks = ""
    polls = False
    waits = True

    def ready(self) -> None:
        """Return when a save would be kept; what this takes is no part of a step."""

    @abstractmethod
    def save(self, step: int) -> None:
        """Begin to keep the state; what this takes, and what `fence` and `drain` take, is the stall."""

    def fence(self) -> None:
        """Return when the state may change."""

    def drain(self) -> None:
        """Return when the next save may begin."""

    def complete(self) -> None:
        """Return when the last save would survive what it is to outlive; called on another thread, after `save`."""

    def close(self) -> None:
        """End threads and processes; files in `home` are taken away by others."""
