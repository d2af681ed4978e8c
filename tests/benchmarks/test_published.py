"""What the README says about speed is what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from benchmarks.plot import Chart, draw


def test_the_plot_is_svg_with_a_bar_per_system() -> None:
    chart = Chart(title="stall <per> step", bars=[("ours", 0.001, "1 ms", True), ("a & b", 1.0, "1 s", False)])
    tree = ElementTree.fromstring(draw([chart, chart]))
    space = "{http://www.w3.org/2000/svg}"
    bars = tree.findall(f"{space}rect")[1:]
    assert 4 == len(bars)
    ours, theirs = (float(bar.attrib["width"]) for bar in bars[:2])
    assert 0 < ours < theirs
    assert "stall <per> step" in [text.text for text in tree.findall(f"{space}text")]
