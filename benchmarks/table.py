"""The table of a run, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .rows import FAILED, MET, MISSED, WITHIN

__all__ = ["figure", "render"]

_STYLES = {MET: "green", WITHIN: "yellow", MISSED: "bold red", FAILED: "bold red"}
_COLUMNS = ("what", "ours", "floor", "against", "ratio", "goal", "verdict", "CPU s/GB")


def render(results: Mapping[str, Any]) -> RenderableType:
    """All rows, and a line that says on what machine."""
    table = Table(title="snapshotd bench", title_justify="left", pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("ours", "floor", "ratio", "goal") else "left")
    for part, rows in groupby(results["rows"], key=lambda row: row["part"]):
        table.add_section()
        table.add_row(Text(part, style="bold"))
        for row in rows:
            table.add_row(*_cells(row))
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; {machine['date']}"
    scale = "" if results["scale"] == 1 else f", sizes times {results['scale']:g}"
    form = ", short form: ratios only" if results["short"] else ""
    legend = "Medians (quartiles of a figure, 90% interval of a ratio); each row's two sides were measured in turns."
    beside = [_beside(rows) for rows in with_peers(results["rows"])]
    return Group(table, *beside, Text(f"{where}{scale}{form}\n{legend}"))


def with_peers(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows that have others beside ours, those that follow each other together."""
    grouped = groupby(rows, key=lambda row: (row["part"], bool(row.get("peers"))))
    return [list(group) for (_, has), group in grouped if has]


def figure(value: float, unit: str) -> str:
    """A number that can be read: 1.2 ms, 3.4 MB, 0.93."""
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "us")):
            if abs(value) * factor >= 1:
                return f"{value * factor:.3g} {name}"
        return f"{value * 1e6:.2g} us"
    if unit == "B":
        for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {name}"
        return f"{value:.0f} B"
    if unit == "%":
        return f"{value * 100:.3g}%" if abs(value) < 9.995 else f"{value * 100:,.0f}%"
    return f"{value:.3g} {unit}".strip()


def _beside(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Ours and each of the others, a column per row of the table."""
    table = Table(title=f"{rows[0]['part']}, side by side", title_justify="left", pad_edge=False)
    table.add_column("")
    names = dict.fromkeys(name for row in rows for name in row["peers"])
    for row in rows:
        table.add_column(row["what"], justify="right")
    table.add_row("ours", *(_series(row["ours"], row.get("unit", "")) for row in rows))
    for name in names:
        cells = [(row["peers"].get(name), row.get("unit", "")) for row in rows]
        table.add_row(name, *(_series(series, unit) if series else "never" for series, unit in cells))
    return table


def _cells(row: Mapping[str, Any]) -> Sequence[str | Text]:
    verdict = row.get("verdict", "")
    if "ours" not in row:
        return f"  {row['what']}", "", "", row.get("text", ""), "", "", Text(verdict, style=_STYLES.get(verdict, ""))
    unit = row.get("unit", "")
    ratio, goal = row.get("ratio"), row.get("goal")
    sign = "≥" if row.get("better") == "higher" else "≤"
    return (
        f"  {row['what']}",
        _series(row["ours"], unit),
        _series(row["floor"], unit) if "floor" in row else "",
        " ".join(filter(None, (row.get("against", ""), row.get("text", "")))),
        f"{ratio['value']:.3g} ({ratio['low']:.3g}-{ratio['high']:.3g})" if ratio else "",
        f"{sign} {goal:g}" if goal is not None else "",
        Text(verdict, style=_STYLES.get(verdict, "")),
        _cpu(row),
    )


def _series(series: Mapping[str, Any], unit: str) -> str:
    if len(series["rounds"]) == 1:
        return figure(series["median"], unit)
    return f"{figure(series['median'], unit)} ({figure(series['low'], unit)}-{figure(series['high'], unit)})"


def _cpu(row: Mapping[str, Any]) -> str:
    nbytes = row.get("nbytes", 0)
    sides = [row.get(side, {}).get("cpu_s") for side in ("ours", "floor")]
    if not nbytes or not sides[0]:
        return ""
    return " / ".join(f"{sorted(cpu)[len(cpu) // 2] / nbytes * 1e9:.3f}" for cpu in sides if cpu)
