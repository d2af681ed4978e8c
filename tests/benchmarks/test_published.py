"""What the README says about speed is what was measured."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from benchmarks import bench, readme
from benchmarks.growth_plot import plots
from benchmarks.plot import Chart, draw


def test_what_is_published_is_one_whole_run() -> None:
    """Every part of it, at full size, and none that failed; README, page and plot are what the script makes of it."""
    results = json.loads(readme.PUBLISHED.read_text(encoding="utf-8"))
    assert (1.0, False) == (results["scale"], results["short"])
    assert set(bench.whole_run()) == {row["part"] for row in results["rows"]}
    assert [] == [row["what"] for row in results["rows"] if row.get("verdict") == "failed"]
    assert 0 == readme.main(["--check"])


def test_the_plot_is_svg_with_a_bar_per_system() -> None:
    chart = Chart(title="stall <per> step", bars=[("ours", 0.001, "1 ms", True), ("a & b", 1.0, "1 s", False)])
    tree = ElementTree.fromstring(draw([chart, chart]))
    space = "{http://www.w3.org/2000/svg}"
    bars = tree.findall(f"{space}rect")[1:]
    assert 4 == len(bars)
    ours, theirs = (float(bar.attrib["width"]) for bar in bars[:2])
    assert 0 < ours < theirs
    assert "stall <per> step" in [text.text for text in tree.findall(f"{space}text")]


def test_growth_is_plotted_from_the_rows_of_a_run() -> None:
    rows = [
        *({"part": "growth", "what": f"a GB of {n} GB", "ours": {}, "ratio": {"value": n / 8}} for n in (6, 0.3, 1)),
        {"part": "growth", "what": "a GB of 4 GB", "text": "too little memory"},
        {"part": "group_size", "what": "CPU of a GB in a group of 8 nodes", "ours": {}, "ratio": {"value": 1}},
    ]
    for who in ("worker", "daemon"):
        rows += ({"part": "growth", "what": f"{who} after {n} steps", "ours": {"median": 2e7}} for n in (10, 20))
    space = "{http://www.w3.org/2000/svg}"
    trees = {name: ElementTree.fromstring(text) for name, text in plots(rows).items()}
    [line] = trees["growth-bytes.svg"].findall(f"{space}polyline")
    x, y = zip(*(map(float, point.split(",")) for point in line.attrib["points"].split()), strict=True)
    assert (3, sorted(x), sorted(y, reverse=True)) == (len(x), list(x), list(y))
    assert 1 == len(trees["growth-nodes.svg"].findall(f"{space}polyline"))
    assert 2 == len(trees["growth-steps.svg"].findall(f"{space}polyline"))
