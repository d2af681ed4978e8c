"""
The clock of progress: a job whose ranks all live, and none of which ends a step any more, is hung, or busy elsewhere.

Rule 1: only the job's own pace counts: a step that takes `hang_factor` times the median of the last ones, and
`hang_least_s` at least.
Rule 2: it is said once, with the ranks that are behind, and taken back when a step ends. The workers are restarted only
where the settings ask for it: an evaluation between two steps looks just the same from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from snapshotd.coordinator.job import Context, Job
from snapshotd.coordinator.membership import Epoch

__all__ = ["HangWatch"]

_STEPS_KEPT = 32
_STEPS_NEEDED = 4
_RANKS_IN_REASONS = 8


class HangWatch:
    """Watches the steps that the ranks of one job report, sealed or skipped. reason: why the job seems hung, or ""."""

    def __init__(self, ctx: Context, job: Job, restart: Callable[[str], None]) -> None:
        self.reason = ""
        self._ctx = ctx
        self._job = job
        self._restart = restart
        self._epoch = 0
        self._newest = -1
        self._since = 0.0
        self._step_s: deque[float] = deque(maxlen=_STEPS_KEPT)

    def advance(self, progress: dict[int, int], newest: int) -> None:
        """Take the newest step that each rank has reported in the current epoch, and the newest of all."""
        job, now = self._job, self._ctx.now
        epoch = job.current
        if epoch is None or not epoch.formed or epoch.number != job.number or job.finished or not progress:
            self._begin(job.number)
            return
        if self._epoch != epoch.number:
            self._begin(epoch.number)
        if newest > self._newest:
            if self._newest >= 0:
                self._step_s.append((now - self._since) / (newest - self._newest))
            self._newest, self._since = newest, now
            if self.reason:
                self.reason = ""
                self._ctx.out.note("membership", job.name, f"goes on: step {newest} is done", epoch=epoch.number)
        elif not self.reason and self._is_hung():
            self._say(epoch, progress)

    def _begin(self, number: int) -> None:
        self._epoch, self._newest, self.reason = number, -1, ""
        self._step_s.clear()

    def _is_hung(self) -> bool:
        settings = self._ctx.settings
        if settings.hang_factor <= 0 or len(self._step_s) < _STEPS_NEEDED:
            return False
        silent_s = self._ctx.now - self._since
        return silent_s > settings.hang_least_s and silent_s > settings.hang_factor * median(self._step_s)

    def _say(self, epoch: Epoch, progress: dict[int, int]) -> None:
        behind = sorted(rank for rank in epoch.ranks if progress.get(rank, -1) < self._newest)
        who = f"behind are rank {', '.join(map(str, behind[:_RANKS_IN_REASONS]))}" if behind else "no rank is behind"
        self.reason = (
            f"no step has ended for {self._ctx.now - self._since:.0f} s, where one takes {median(self._step_s):.3g} s: "
            f"hung, or busy with something else; the last is {self._newest}, {who}"
        )
        self._job.counts["hangs"] += 1
        self._ctx.out.note("membership", self._job.name, self.reason, epoch=epoch.number, step=self._newest)
        if self._ctx.settings.hang_restart:
            self._restart(self.reason)
