"""
Where a checkpoint is: at a path, or in the memory of a job that runs, as ``job:NAME`` or ``job:NAME@STEP``.

Rule 1: only text can mean a job. A Path is a path, and so is text like ``./job:x``.
Rule 2: the last ``@`` ends the name if digits follow; a job whose own name ends so is written with its step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapshotd.errors import UsageError

if TYPE_CHECKING:
    from snapshotd.settings import ToolSettings

__all__ = ["Job", "Place", "place_of"]

_PREFIX: Final = "job:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """
    A job's snapshot: that of ``step``, or the newest.

    ``settings`` say how its coordinator is reached; None: as the environment says to tools.
    """

    name: str
    step: int | None = None
    settings: ToolSettings | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{_PREFIX}{self.name}" + ("" if self.step is None else f"@{self.step}")


Place = Path | Job


def place_of(
    source: str | os.PathLike[str] | Job, settings: Callable[[], ToolSettings] | None = None
) -> Place:
    """Return the place that a user means; ``settings`` are asked for if it is a job. UsageError if it has no name."""
    if isinstance(source, Job):
        return source
    if not isinstance(source, str) or not source.startswith(_PREFIX):
        return Path(source)
    name, at, step = source.removeprefix(_PREFIX).rpartition("@")
    if not at or not (step.isascii() and step.isdigit()):
        name, step = source.removeprefix(_PREFIX), ""
    if not name:
        raise UsageError(f"{source!r} names no job; write job:NAME or job:NAME@STEP (and ./{source} for a file)")
    return Job(name=name, step=int(step) if step else None, settings=settings() if settings is not None else None)
