"""
Publish a run's results: `python -m benchmarks.readme [RESULTS.json | --check]`.

With a file it becomes benchmarks/results/published.json, or accelerator.json when it has that part only: such a run is
of another machine. From both come the figures in README.md (between its markers), the page
docs/reference/benchmark-results.md and the plot; --check says whether they are those of the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .plot import Chart, draw
from .table import figure, with_peers

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "benchmarks" / "results" / "published.json"
ACCELERATOR = ROOT / "benchmarks" / "results" / "accelerator.json"
PLOT = ROOT / "benchmarks" / "results" / "peers.svg"
PAGE = ROOT / "docs" / "reference" / "benchmark-results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: begin (python -m benchmarks.readme) -->", "<!-- figures: end -->"

Rows = Sequence[Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=None)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.results is not None:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        if results["short"] or results["scale"] != 1:
            parser.error(f"{options.results} is not of a whole run: only those are published")
        apart = {row["part"] for row in results["rows"]} == {"accelerator"}
        (ACCELERATOR if apart else PUBLISHED).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.check:
        stale = [path for path, text in contents().items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path} is not that of {PUBLISHED}; run python -m benchmarks.readme", file=sys.stderr)
        return 1 if stale else 0
    for path, text in contents().items():
        path.write_text(text, encoding="utf-8")
    return 0


def contents() -> dict[Path, str]:
    """What each file must hold."""
    results, accelerator = (json.loads(path.read_text(encoding="utf-8")) for path in (PUBLISHED, ACCELERATOR))
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        README: f"{before}{BEGIN}\n{_summary(results)}{_on_device(accelerator)}{END}{after}",
        PAGE: _page(results, accelerator),
        PLOT: draw(_charts(results["rows"])),
    }


def _where(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['date']}"


def _summary(results: Mapping[str, Any]) -> str:
    """The part of the README."""
    judged = [row for row in results["rows"] if row.get("goal") is not None]
    met = sum(row["verdict"] == "met" for row in judged)
    within = sum(row["verdict"] == "within the spread" for row in judged)
    lines = [
        f"One run of `make bench` ({_where(results)}): of {len(judged)} goals {met} are met"
        + (f" and {within} within the spread of the run" if within else "")
        + ". What is added to a step is a difference of noisy steps: its quartiles stand beside it."
        + " [All rows](docs/reference/benchmark-results.md), [how to read them](docs/reference/benchmarks.md).",
        "",
    ]
    for rows in with_peers(results["rows"]):
        lines += _matrix(rows)
    lines += ["![stall and inflation per step](benchmarks/results/peers.svg)", ""]
    return "\n".join(lines)


def _on_device(results: Mapping[str, Any]) -> str:
    """The part of the README on an accelerator: what has a goal, in a table."""
    device = next(row["text"] for row in results["rows"] if row["what"] == "device")
    lines = ["", f"On a GPU ({device}; {_where(results)}):", "", "| | snapshotd | floor | ratio | goal |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for row in results["rows"]:
        if row.get("goal") is not None:
            ours, floor = _median(row["ours"], row), f"{_median(row['floor'], row)} ({row['against']})"
            goal = f"{'≥' if row['better'] == 'higher' else '≤'} {row['goal']:g}"
            lines.append(f"| {row['what']} | **{ours}** | {floor} | {row['ratio']['value']:.3g} | {goal} |")
    return "\n".join(lines) + "\n"


def _matrix(rows: Rows) -> list[str]:
    """Ours and the others in lines, a column per row of the results."""
    names = dict.fromkeys(name for row in rows for name in row["peers"])
    lines = ["| | " + " | ".join(row["what"] for row in rows) + " |", "| --- |" + " ---: |" * len(rows)]
    lines.append("| **snapshotd** | " + " | ".join(f"**{_cell(row['ours'], row)}**" for row in rows) + " |")
    for name in names:
        cells = (_cell(row["peers"][name], row) if name in row["peers"] else "never" for row in rows)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _page(results: Mapping[str, Any], accelerator: Mapping[str, Any]) -> str:
    lines = [
        "# Benchmark results",
        "",
        "Made by `python -m benchmarks.readme` from `published.json` and `accelerator.json` of `benchmarks/results`;",
        "do not edit. [How to read them](benchmarks.md).",
        "",
        f"{_where(results)}:",
    ]
    lines += _tables(row for row in results["rows"] if row["part"] != "accelerator")
    lines += ["", f"On another machine, with a GPU ({_where(accelerator)}):", *_tables(accelerator["rows"])]
    return "\n".join(lines) + "\n"


def _tables(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for part, some in groupby(rows, key=lambda row: row["part"]):
        lines += ["", f"## {part}", "", "| what | ours | floor | against | ratio | goal | verdict |"]
        lines += ["| --- | ---: | ---: | --- | ---: | ---: | --- |"]
        lines += [_line(row) for row in some]
    return lines


def _line(row: Mapping[str, Any]) -> str:
    ratio, goal = row.get("ratio"), row.get("goal")
    sign = "≥" if row.get("better") == "higher" else "≤"
    cells = (
        row["what"],
        _median(row["ours"], row) if "ours" in row else "",
        _median(row["floor"], row) if "floor" in row else "",
        " ".join(filter(None, (row.get("against", ""), row.get("text", "")))),
        f"{ratio['value']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})" if ratio else "",
        f"{sign} {goal:g}" if goal is not None else "",
        row.get("verdict", ""),
    )
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _median(series: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return figure(series["median"], row.get("unit", ""))


def _cell(series: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The median; of differences of steps, which is what shares of a step are, with the quartiles: they are wide."""
    if row.get("unit") != "%":
        return _median(series, row)
    return f"{_median(series, row)} ({figure(series['low'], '%')} to {figure(series['high'], '%')})"


def _charts(rows: Rows) -> list[Chart]:
    """Stall and inflation per step, ours and each of the others."""
    found = []
    for row in rows:
        if row["part"] == "peers" and row.get("peers") and row["what"].startswith(("stall", "added")):
            bars = [("snapshotd", row["ours"]["median"], _median(row["ours"], row), True)]
            bars += [(name, series["median"], _median(series, row), False) for name, series in row["peers"].items()]
            if "without" not in row["what"]:
                found.append(Chart(title=row["what"], bars=bars))
    return found


if __name__ == "__main__":
    sys.exit(main())
