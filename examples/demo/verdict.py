"""
Are two runs of the same job the same, bit by bit? Pure: records in, checks out.

Rule 1: every check says what it compared and how much of it; nothing to compare is a failure, not a success.
Rule 2: from the step on at which a run goes on with another number of workers, sums are added in another order, so
        losses and the final state may differ in the last bits. There the whole state AT that step is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from examples.demo.records import Loss, Run, Start, Summary

__all__ = ["Check", "judge", "world_change"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was compared."""

    name: str
    equal: bool
    text: str


def judge(disturbed: Run, undisturbed: Run, *, steps: int) -> list[Check]:
    """All checks for a run of `steps` steps."""
    change = world_change(disturbed)
    until = steps if change is None else change.first
    checks = [
        _every_step(disturbed, steps),
        _repeated(disturbed),
        _losses(disturbed, undisturbed, until),
    ]
    if change is None:
        checks += _states(disturbed.final, undisturbed.final, f"after {steps} steps")
    else:
        mine, other = disturbed.states.get(change.first), undisturbed.states.get(change.first)
        where = f"after {change.first} steps, as restored onto {change.world} workers"
        checks += _states(mine, other, where)
    return checks


def world_change(run: Run) -> Start | None:
    """The first start with another number of workers than the run began with."""
    starts = run.starts
    return next((start for start in starts if start.world != starts[0].world), None)


def _every_step(run: Run, steps: int) -> Check:
    missing = sorted(set(range(steps)) - {loss.step for loss in run.losses})
    text = f"all {steps} steps were done" if not missing else f"steps never done: {_some(missing)}"
    return Check(name="every step", equal=not missing and run.final is not None, text=text)


def _repeated(run: Run) -> Check:
    seen: dict[tuple[int, int], Loss] = {}
    repeated = 0
    wrong: list[int] = []
    for loss in run.losses:
        first = seen.setdefault((loss.step, loss.world), loss)
        if first is not loss:
            repeated += 1
            if first.bits != loss.bits:
                wrong.append(loss.step)
    text = f"{repeated} steps were done again after a restore, with the same losses"
    if wrong:
        text = f"steps done again with another loss: {_some(wrong)}"
    return Check(name="repeated steps", equal=not wrong, text=text)


def _losses(mine: Run, other: Run, until: int) -> Check:
    left = {loss.step: loss.bits for loss in mine.losses if loss.step < until}
    right = {loss.step: loss.bits for loss in other.losses if loss.step < until}
    return _compare("losses", left, right, f"losses of steps 0 to {until - 1}")


def _states(mine: Summary | None, other: Summary | None, where: str) -> list[Check]:
    if mine is None or other is None:
        which = "the disturbed" if mine is None else "the undisturbed"
        return [Check(name="state", equal=False, text=f"{which} run left no state {where}")]
    parts = {
        "parameters": ("model.", "parameters and buffers"),
        "optimizer": ("optimizer.", "optimizer state tensors"),
    }
    checks = [
        _compare(name, _starting(mine.tensors, prefix), _starting(other.tensors, prefix), f"{words} {where}")
        for name, (prefix, words) in parts.items()
    ]
    return [*checks, _compare("scheduler", mine.values, other.values, f"scheduler and parameter group values {where}")]


def _compare(name: str, mine: Mapping[Any, Any], other: Mapping[Any, Any], what: str) -> Check:
    names = sorted(set(mine) | set(other))
    wrong = [key for key in names if key not in mine or key not in other or mine[key] != other[key]]
    if not names:
        return Check(name=name, equal=False, text=f"there were no {what}")
    if wrong:
        return Check(name=name, equal=False, text=f"{len(wrong)} of {len(names)} {what} differ: {_some(wrong)}")
    return Check(name=name, equal=True, text=f"{len(names)} {what}")


def _starting(tensors: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: digest for name, digest in tensors.items() if name.startswith(prefix)}


def _some(items: Iterable[object], most: int = 4) -> str:
    every = [str(item) for item in items]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
