"""The demo as people see it while it runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.demo.cluster import Cluster
from examples.demo.faults import Outcome
from examples.demo.watch import Event, Picture, Watcher

__all__ = ["LiveView", "PlainView", "View", "open_view"]

_EVENTS_SHOWN = 9
_STEPS_BETWEEN_LINES = 10
_WIDE = 104
_STATE_STYLE = {
    "up": "green",
    "running": "green",
    "survived": "green",
    "waiting": "cyan",
    "spare": "cyan",
    "away": "yellow",
    "recovering": "bold yellow",
    "dead": "red",
    "killed": "bold red",
}
_SOURCE_STYLE = {"demo": "bold magenta", "recovery": "yellow", "membership": "cyan", "commit": "green"}


class View(Protocol):
    """What the demo tells its view."""

    def __enter__(self) -> View: ...

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None: ...

    def phase(self, text: str) -> None:
        """What is going on now, in words."""

    def show(self, cluster: Cluster | None, watcher: Watcher) -> None:
        """Called often."""


def open_view(console: Console, *, steps: int, outcomes: Sequence[Outcome]) -> View:
    if console.is_terminal:
        return LiveView(console, steps=steps, outcomes=outcomes)
    return PlainView(console, steps=steps)


class PlainView:
    """Each event once, and a line every few steps."""

    def __init__(self, console: Console, *, steps: int) -> None:
        self._console, self._steps = console, steps
        self._began = time.time()
        self._events = 0
        self._next_step = 0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        return None

    def phase(self, text: str) -> None:
        self._line(time.time(), "demo", text)

    def show(self, cluster: Cluster | None, watcher: Watcher) -> None:
        picture = watcher.picture
        for event in picture.events[self._events :]:
            self._line(event.time, event.source, event.text)
        self._events = len(picture.events)
        if picture.step >= self._next_step:
            committed = picture.committed_step
            protected = f", {picture.committed_level} up to step {committed}" if committed >= 0 else ""
            loss = picture.losses[-1].value
            self._line(time.time(), "training", f"step {picture.step} of {self._steps}, loss {loss:.3f}{protected}")
            self._next_step = picture.step + _STEPS_BETWEEN_LINES

    def _line(self, when: float, source: str, text: str) -> None:
        line = f"{when - self._began:6.1f} s  {source:<10}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """Nodes, steps, levels, faults and events, redrawn in place."""

    def __init__(self, console: Console, *, steps: int, outcomes: Sequence[Outcome]) -> None:
        self._console, self._steps, self._outcomes = console, steps, outcomes
        self._live = Live(console=console, refresh_per_second=5, auto_refresh=False, transient=True)
        self._began = time.time()
        self._phase = ""
        self._last = 0.0
        self._shown: RenderableType = ""
        self._body: RenderableType = ""

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
        self._console.print(self._shown)  # what was seen last stays above the table

    def phase(self, text: str) -> None:
        self._phase = text

    def show(self, cluster: Cluster | None, watcher: Watcher) -> None:
        if time.monotonic() - self._last < 0.2:
            return
        self._last = time.monotonic()
        self._shown = self._render(cluster, watcher.picture)
        self._live.update(self._shown, refresh=True)

    def _render(self, cluster: Cluster | None, picture: Picture) -> RenderableType:
        if cluster is not None:  # afterwards, the last picture of it stays
            self._body = Group(self._columns(cluster, picture), Text(), self._events(picture.events))
        body = Group(self._head(picture), Text(), self._body)
        return Panel(body, title="snapshotd demo", subtitle=f"{time.time() - self._began:.0f} s", padding=(0, 1))

    def _columns(self, cluster: Cluster, picture: Picture) -> RenderableType:
        nodes, levels, faults = self._nodes(cluster, picture), self._levels(picture), self._faults()
        grid = Table.grid(expand=True, padding=(0, 2))
        if self._console.width >= _WIDE:
            grid.add_row(nodes, Group(levels, Text(), faults))
            return grid
        grid.add_row(levels, faults)
        return Group(nodes, Text(), grid)

    def _head(self, picture: Picture) -> RenderableType:
        done = picture.step + 1
        loss = f"loss {picture.losses[-1].value:.3f}" if picture.losses else ""
        grid = Table.grid(expand=True, padding=(0, 2))
        grid.add_column()
        grid.add_column(ratio=1)
        grid.add_column(justify="right")
        words = Text(f"{self._phase}", style="bold")
        grid.add_row(words, ProgressBar(total=self._steps, completed=done), f"step {done} of {self._steps}  {loss}")
        return grid

    def _nodes(self, cluster: Cluster, picture: Picture) -> RenderableType:
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for name in ("node", "daemon", "worker", "memory", "captured", "skipped"):
            right = name in ("memory", "captured", "skipped")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        ranks = {node: rank for rank, node in enumerate(picture.members)} if picture.job.get("formed") else {}
        for name, node in cluster.nodes.items():
            seen = picture.nodes.get(name, {})
            counters: Mapping[str, Any] = seen.get("counters", {})
            skipped = sum(int(value) for key, value in counters.items() if key.startswith("skipped"))
            if node.lost:
                table.add_row(name, _state("killed"), _state("killed"), "", "", "")
                continue
            table.add_row(
                name,
                _state(str(seen.get("state", "starting"))),
                Text(f"rank {ranks[name]}", style="green") if name in ranks else _state(_idle(name, picture)),
                f"{int(seen.get('arena_bytes', 0)) / 2**20:.0f} MiB",
                str(counters.get("sealed_slots", 0)),
                str(skipped),
            )
        table.add_row("coordinator", _state("up" if picture.status is not None else "away"), "", "", "", "")
        return table

    def _levels(self, picture: Picture) -> RenderableType:
        def step(number: int) -> str:
            return str(number) if number >= 0 else "-"

        margin = picture.job.get("margin")
        survives = "" if margin is None or margin < 0 else f"survives {margin} node{'s' if margin != 1 else ''}"
        grid = Table.grid(padding=(0, 2))
        grid.add_row("trained", Text(step(picture.step), style="bold"), f"epoch {picture.epoch or '-'}")
        grid.add_row("sealed", Text(step(picture.sealed_step), style="bold"), "in memory")
        level = picture.committed_level or "committed"
        grid.add_row(level, Text(step(picture.committed_step), style="bold green"), survives)
        return grid

    def _faults(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for outcome in self._outcomes:
            where = f"at step {outcome.at_step if outcome.struck_step is None else outcome.struck_step}"
            seconds = f"{outcome.total_s:.1f} s" if outcome.survived else ""
            grid.add_row(outcome.name, where, _state(outcome.state), seconds)
        return grid if self._outcomes else Text("no faults", style="dim")

    def _events(self, events: Sequence[Event]) -> RenderableType:
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(justify="right", style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        shown = list(events)[-_EVENTS_SHOWN:]
        for event in shown:
            style = _SOURCE_STYLE.get(event.source, "")
            text = Text(event.text, style="bold" if event.source == "demo" else "")
            grid.add_row(f"{event.time - self._began:.1f} s", Text(event.source, style=style), text)
        for _ in range(_EVENTS_SHOWN - len(shown)):
            grid.add_row("", "", "")
        return grid


def _idle(name: str, picture: Picture) -> str:
    """What a node without a rank is doing."""
    launchers = picture.job.get("launchers") or {}
    waits = name in launchers.get("waiting", ())
    return "spare" if waits and launchers.get("state") == "running" else "starting"


def _state(word: str) -> Text:
    return Text(word, style=_STATE_STYLE.get(word, "dim"))
