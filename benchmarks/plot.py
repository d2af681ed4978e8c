"""Bars on a logarithmic scale, as SVG that needs nothing else: what each system costs a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Chart", "draw"]

_NAMES, _BARS, _VALUES = 270, 330, 90
_LINE, _HEAD, _FOOT = 22, 46, 30
_OURS, _THEIRS = "#1a7f5a", "#8a94a6"
_STYLE = "font:13px system-ui,-apple-system,'Segoe UI',sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One block of bars. bars: name, value, what to write beside it, and whether it is ours."""

    title: str
    bars: Sequence[tuple[str, float, str, bool]]


def draw(charts: Sequence[Chart]) -> str:
    """The charts below each other, each with a scale of its own."""
    width = _NAMES + _BARS + _VALUES
    height = sum(_HEAD + _LINE * len(chart.bars) for chart in charts) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" style="{_STYLE}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    top = 0
    for chart in charts:
        parts += _chart(chart, top)
        top += _HEAD + _LINE * len(chart.bars)
    parts += [_text(12, top + 20, "Logarithmic scales; shorter is better.", "#5b6475"), "</svg>"]
    return "\n".join(parts) + "\n"


def _chart(chart: Chart, top: int) -> list[str]:
    values = [value for _, value, _, _ in chart.bars if value > 0]
    low, high = math.log10(min(values)) - 0.15, math.log10(max(values))
    parts = [_text(12, top + 28, chart.title, "#111827", weight="600")]
    for index, (name, value, label, ours) in enumerate(chart.bars):
        y = top + _HEAD + _LINE * index
        share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
        length = max(2.0, share * _BARS)
        color = _OURS if ours else _THEIRS
        parts.append(_text(_NAMES - 10, y + 11, name, "#111827", anchor="end", weight="600" if ours else "400"))
        parts.append(f'<rect x="{_NAMES}" y="{y - 2}" width="{length:.1f}" height="16" rx="2" fill="{color}"/>')
        parts.append(_text(round(_NAMES + length + 6), y + 11, label, "#111827"))
    return parts


def _text(x: int, y: int, text: str, fill: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
