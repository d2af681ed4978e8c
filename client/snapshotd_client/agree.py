"""
All ranks must go on from the same state: one tiny collective at the end of restore(), never on the save path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import distributed as dist

from snapshotd_client.errors import RestoreError, StateLost
from snapshotd_client.settings import Settings

__all__ = ["Verdict", "agree"]

_NONE: Final = 0
_FRESH: Final = 1
_SNAPSHOT: Final = 2
_FAILED: Final = 3
_LOST: Final = 4
_STARTED: Final = 5
_WORDS: Final = {_NONE: "no daemon", _FRESH: "a fresh start", _FAILED: "an error", _LOST: "lost state"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rank goes on from."""

    kind: int
    epoch: int = 0
    step: int = 0

    @classmethod
    def none(cls) -> Verdict:
        return cls(_NONE)

    @classmethod
    def fresh(cls) -> Verdict:
        return cls(_FRESH)

    @classmethod
    def failed(cls) -> Verdict:
        return cls(_FAILED)

    @classmethod
    def snapshot(cls, epoch: int, step: int) -> Verdict:
        return cls(_SNAPSHOT, epoch, step)

    @classmethod
    def started(cls, first_step: int, *, daemon: bool) -> Verdict:
        return cls(_STARTED, int(daemon), first_step)

    def __str__(self) -> str:
        if self.kind == _STARTED:
            return f"step {self.step} after a universal checkpoint{'' if self.epoch else ', with no daemon'}"
        return f"step {self.step} of epoch {self.epoch}" if self.kind == _SNAPSHOT else _WORDS[self.kind]


def agree(mine: Verdict, settings: Settings, error: BaseException | None) -> None:
    """
    Compare with all ranks, where there is a process group. RestoreError names the ranks that differ.

    With ``error`` set this rank has failed and only lets the others know; nothing raises then.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if isinstance(error, StateLost):
        mine = Verdict(_LOST)
    try:
        verdicts = _gather(mine)
    except Exception as failure:
        if error is not None:
            return
        raise RestoreError(f"the ranks could not compare what they restored: {failure}") from failure
    if error is not None:
        return
    if len(set(verdicts)) == 1:
        return
    lost = [rank for rank, verdict in enumerate(verdicts) if verdict.kind == _LOST]
    if lost:
        raise StateLost(f"rank {lost[0]} was told that the state is lost")
    groups: dict[Verdict, list[int]] = {}
    for rank, verdict in enumerate(verdicts):
        groups.setdefault(verdict, []).append(rank)
    words = "; ".join(f"{_ranks(ranks)}: {verdict}" for verdict, ranks in groups.items())
    raise RestoreError(
        f"the ranks do not go on from the same state: {words}. "
        f"Is a daemon running on every node, for job {settings.job!r}?"
    )


def _gather(mine: Verdict) -> list[Verdict]:
    device = _device()
    data = torch.tensor([mine.kind, mine.epoch, mine.step], dtype=torch.int64, device=device)
    out = [torch.empty_like(data) for _ in range(dist.get_world_size())]
    dist.all_gather(out, data)
    return [Verdict(*(int(value) for value in item.tolist())) for item in out]


def _device() -> torch.device:
    host = torch.device("cpu")
    kinds = getattr(dist.group.WORLD, "_device_types", None)
    if (host in kinds) if kinds else str(dist.get_backend()) in ("gloo", "mpi"):
        return host
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    kind = accelerator.type if accelerator is not None else "cuda"
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
