"""`snapshotd status`: what the coordinator knows, as a table, JSON, or a live view."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from snapshotd.calls import ask
from snapshotd.errors import PeerUnreachable
from snapshotd.settings import ToolSettings, add_flags, load
from snapshotd.sizes import format_bytes
from snapshotd.v1 import control_pb2 as control

EVENTS_SHOWN = 12
PLAIN_WIDTH = 160
"""Columns when the output is no terminal: nobody wants a table that is cut to 80 in a log."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the coordinator's status as JSON")
    parser.add_argument("--watch", action="store_true", help="keep showing it, once a second")
    add_flags(parser, ToolSettings)


def run(options: argparse.Namespace) -> int:
    settings = load(ToolSettings, options, "tools")
    if options.json:
        print(json.dumps(fetch(settings), indent=2, sort_keys=True))
        return 0
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if not options.watch:
        console.print(render(fetch(settings)))
        return 0
    pause = threading.Event()
    with Live(console=console, refresh_per_second=4, screen=console.is_terminal) as live:
        while not pause.wait(1.0):
            try:
                live.update(render(fetch(settings)))
            except PeerUnreachable as error:
                live.update(Text(str(error), style="red"))
    return 0


def fetch(settings: ToolSettings) -> dict[str, Any]:
    """The status as the coordinator tells it; PeerUnreachable when it does not answer."""
    answer = ask(settings, lambda stub: stub.GetStatus(control.GetStatusRequest(), timeout=5))
    status: dict[str, Any] = json.loads(answer.json)
    return status


def render(status: Mapping[str, Any]) -> RenderableType:
    """Nodes, jobs, recoveries and the newest events."""
    jobs: Sequence[Mapping[str, Any]] = status.get("jobs", [])
    parts: list[RenderableType] = [_nodes(status.get("nodes", [])), _jobs(jobs)]
    recoveries = _recoveries(jobs)
    if recoveries is not None:
        parts.append(recoveries)
    events = status.get("events", [])[-EVENTS_SHOWN:]
    parts.append(Text("\n".join(f"{event['stream']:<11} {event['job']}: {event['text']}" for event in events)))
    return Group(*parts)


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="nodes", title_justify="left")
    for column in ("node", "state", "address", "slots and parity", "daemon", "sealed", "skipped", "corrupt", "rebuilt"):
        table.add_column(column)
    for node in nodes:
        counters = node.get("counters", {})
        skipped = sum(value for key, value in counters.items() if key.startswith("skipped"))
        used = f"{format_bytes(node.get('arena_bytes', 0))} of {format_bytes(node.get('budget_bytes', 0))}"
        table.add_row(
            str(node["node_id"]),
            str(node["state"]),
            str(node.get("bulk", "")),
            used,
            format_bytes(node.get("resident_bytes", 0)),
            str(counters.get("sealed_slots", 0)),
            str(skipped),
            str(counters.get("corrupt", 0)),
            str(counters.get("rebuilt_slots", 0) + counters.get("rebuilt_parities", 0)),
        )
    return table


def _jobs(jobs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="jobs", title_justify="left")
    for column in ("job", "epoch", "ranks", "committed", "level", "survives", "durable", "last word"):
        table.add_column(column)
    for job in jobs:
        committed = job.get("committed") or {}
        durables = job.get("durables") or [{}]
        margin = job.get("margin")
        survives = "-" if margin is None else "lost" if margin < 0 else f"{margin} node losses"
        reasons = job.get("reasons") or [""]
        table.add_row(
            str(job["job"]),
            str(job.get("epoch", "")),
            str(job.get("world_size", "")),
            str(committed.get("step", "-")),
            str(committed.get("level", "-")),
            survives,
            str(max((durable.get("step", -1) for durable in durables), default="-")).replace("-1", "-"),
            str(reasons[-1]),
        )
    return table


def _recoveries(jobs: Sequence[Mapping[str, Any]]) -> Table | None:
    table = Table(title="recoveries (seconds by phase)", title_justify="left")
    columns = ("detect", "agree", "start", "decode", "fetch", "load", "first_step")
    for column in ("job", "epoch", "why", "step", "lost", *columns):
        table.add_column(column)
    rows = 0
    for job in jobs:
        for recovery in job.get("recoveries", []):
            phases = recovery.get("phases", {})
            source = recovery.get("source")
            rows += 1
            table.add_row(
                str(job["job"]),
                str(recovery.get("epoch", "")),
                str(recovery.get("reason", "")),
                str(source[1]) if source else "-",
                str(recovery.get("lost_steps", "")),
                *(f"{phases[column]:.2f}" if phases.get(column) is not None else "" for column in columns),
            )
    return table if rows else None
