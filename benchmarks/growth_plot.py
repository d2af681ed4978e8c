"""
Plots of what a capture costs by bytes, by steps and by nodes: `python -m benchmarks.growth_plot RESULTS.json`.

Writes docs/explanation/growth-*.svg from the rows of the parts "growth" and "group_size".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["draw_lines", "plots"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "explanation"

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 300, 70, 110, 46, 44
_COLORS = ("#1a7f5a", "#8a5a1a", "#5b6475")
_STYLE = "font:13px system-ui,-apple-system,'Segoe UI',sans-serif"
_TICKS = 4
_PARTS = ("growth", "group_size")

Points = Sequence[tuple[float, float]]
Rows = Sequence[Mapping[str, Any]]


def main(path: str) -> None:
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, text in plots(results["rows"]).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def plots(rows: Rows) -> dict[str, str]:
    """The files and what is in them."""
    by_nodes = _points(rows, r"CPU of a GB in a group of (\d+) nodes", lambda row: row["ratio"]["value"])
    by_bytes = _points(rows, r"a GB of ([\d.]+) GB", lambda row: row["ratio"]["value"])
    memory = {
        name: _points(rows, rf"{name} after (\d+) steps", lambda row: row["ours"]["median"] / 1e6)
        for name in ("worker", "daemon")
    }
    return {
        "growth-bytes.svg": draw_lines("Time to copy a GB, x that of 0.1 GB", "GB of state", {"capture": by_bytes}),
        "growth-nodes.svg": draw_lines("CPU for a GB, x that of 3 nodes", "nodes per group", {"daemons": by_nodes}),
        "growth-steps.svg": draw_lines("Resident memory outside the slots, MB", "steps", memory),
    }


def draw_lines(title: str, below: str, lines: Mapping[str, Points]) -> str:
    """Lines through points, from zero on both axes, as SVG that needs nothing else."""
    points = [point for line in lines.values() for point in line]
    most_x, most_y = max(x for x, _ in points), max(y for _, y in points) * 1.1 or 1.0
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + x / most_x * wide, 1), round(_TOP + high - y / most_y * high, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="{_STYLE}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(12, 24, title, weight="600"),
        _text(_LEFT + wide / 2, _HEIGHT - 8, below, anchor="middle"),
    ]
    for tick in range(_TICKS + 1):
        x, y = place(most_x * tick / _TICKS, most_y * tick / _TICKS)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + wide}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{most_y * tick / _TICKS:.3g}", anchor="end"))
        parts.append(_text(x, _TOP + high + 18, f"{most_x * tick / _TICKS:.3g}", anchor="middle"))
    for (name, line), color in zip(lines.items(), _COLORS, strict=False):
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in placed]
        parts.append(_text(placed[-1][0] + 10, placed[-1][1] + 4, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(rows: Rows, pattern: str, value: Callable[[Mapping[str, Any]], float]) -> list[tuple[float, float]]:
    found = [(re.fullmatch(pattern, row["what"]), row) for row in rows if row.get("part") in _PARTS and "ours" in row]
    return sorted((float(match[1]), value(row)) for match, row in found if match)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x}" y="{y}" fill="#111827" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


if __name__ == "__main__":
    main(*sys.argv[1:])
