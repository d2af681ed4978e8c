"""
A row of the table: what was measured, against what, and whether its goal is met.

A goal is met when the ratio reaches it. It is missed when the whole interval of the ratio lies on the wrong side of it,
or the ratio itself is wrong by more than the row's slack. In between stands "within the spread": measured again, the
same code may reach it. So the tolerance is the spread that this very run had, and never more than the slack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .figures import Ratio, Series, ratio_of

__all__ = ["FAILED", "MET", "MISSED", "WITHIN", "Row"]

MET, WITHIN, MISSED, FAILED = "met", "within the spread", "missed", "failed"

_SLACK = 0.10
_SHORT_SLACK = 0.75

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """
    One line. Make it with `speed`, `cost`, `limit` or `note`.

    Attributes:
        against: what the floor is, in a few words.
        nbytes: what one round moves; the table then shows CPU seconds per GB.
        peers: the same figure of what people use instead, by name.
        slack: how far a ratio may miss its goal where its spread explains that.
        noise: by how much the floor differs from itself, where that was measured; it widens the spread.
        whole_run_only: short runs show it and do not judge it: the goal is no ratio of two measurements, or is lost
            in the noise of small sizes.
    """

    what: str
    unit: str = ""
    ours: Series | None = None
    floor: Series | None = None
    against: str = ""
    ratio: Ratio | None = None
    better: Better = "lower"
    goal: float | None = None
    slack: float = _SLACK
    noise: float = 0.0
    whole_run_only: bool = False
    nbytes: int = 0
    peers: Mapping[str, Series] = field(default_factory=dict)
    text: str = ""
    part: str = ""
    verdict: str = ""

    @classmethod
    def speed(cls, what: str, ours: Series, floor: Series, *, at_least: float | None, against: str, **more: Any) -> Row:
        """Both are seconds for the same work: the ratio is our speed over the floor's. Goal: at least that."""
        return cls(
            what=what,
            unit="s",
            ours=ours,
            floor=floor,
            ratio=ratio_of(floor, ours),
            better="higher",
            goal=at_least,
            against=against,
            **more,
        )

    @classmethod
    def cost(cls, what: str, ours: Series, floor: Series, *, at_most: float | None, against: str, **more: Any) -> Row:
        """The ratio is ours over the floor, both of one unit (seconds unless `unit` says so). Goal: at most that."""
        more.setdefault("unit", "s")
        ratio = ratio_of(ours, floor)
        return cls(what=what, ours=ours, floor=floor, ratio=ratio, goal=at_most, against=against, **more)

    @classmethod
    def limit(cls, what: str, ours: Series, *, at_most: float, unit: str, **more: Any) -> Row:
        """A figure with a limit in its own unit ("s", "B", ...): the ratio is the share of the limit that is used."""
        floor = Series((at_most,))
        more.setdefault("against", "the limit")
        ratio = ratio_of(ours, floor)
        return cls(what=what, unit=unit, ours=ours, floor=floor, ratio=ratio, goal=1.0, whole_run_only=True, **more)

    @classmethod
    def shown(cls, what: str, ours: Series, *, unit: str, **more: Any) -> Row:
        """A figure without a goal."""
        return cls(what=what, unit=unit, ours=ours, **more)

    @classmethod
    def note(cls, what: str, text: str) -> Row:
        """No figure, and why: a peer that does not run here, a device that is not there."""
        return cls(what=what, text=text)

    @classmethod
    def failed(cls, what: str, text: str) -> Row:
        """What the frame yields for a part that ended by an error."""
        return cls(what=what, text=text, verdict=FAILED)

    def judged(self, part: str, *, short: bool) -> Row:
        """The row with its part and verdict. A short run has few rounds and a busy machine: only ratios, widely."""
        return replace(self, part=part, verdict=self.verdict or self._verdict(short))

    def _verdict(self, short: bool) -> str:
        if self.ratio is None or self.goal is None or (short and self.whole_run_only):
            return ""
        if self.better == "lower" and self.ours and self.floor and self.floor.median <= 0:
            # A difference that is lost in the noise: its ratio says nothing.
            return MET if self.ours.median <= self.goal * self.floor.median else MISSED
        sign = 1 if self.better == "higher" else -1
        if sign * (self.ratio.value - self.goal) >= 0:
            return MET
        best = self.ratio.high if self.better == "higher" else self.ratio.low
        slack = max(self.slack, _SHORT_SLACK) if short else self.slack
        explained = short or sign * (best * (1 + sign * self.noise) - self.goal) >= 0
        return WITHIN if explained and _excess(self.ratio.value, self.goal, sign) <= slack else MISSED

    def as_json(self) -> dict[str, Any]:
        """Figures with their quartiles, and the rounds themselves, so that others can judge them."""
        found = asdict(self)
        for name in ("ours", "floor"):
            series = getattr(self, name)
            found[name] = None if series is None else _series(series)
        found["peers"] = {name: _series(series) for name, series in self.peers.items()}
        return {key: value for key, value in found.items() if value not in (None, "", {}, 0, False)}


def _excess(value: float, goal: float, sign: int) -> float:
    """By which share the ratio is worse than the goal."""
    if value <= 0 or goal <= 0:
        return math.inf
    return (goal / value if sign > 0 else value / goal) - 1


def _series(series: Series) -> dict[str, Any]:
    found = {"median": series.median, "low": series.low, "high": series.high, "rounds": list(series.values)}
    if series.cpu_s:
        found["cpu_s"] = list(series.cpu_s)
    return found
