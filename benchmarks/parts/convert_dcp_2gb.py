"""Conversion of a DCP checkpoint of FSDP2 on four ranks into the universal format, beside torch's own tools: 2 GB."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import DCP, compare_all

GOAL = 20
APART = True


def rows(run: Run) -> Iterator[Row]:
    yield from compare_all(run, DCP, 2e9, at_most=2.5)
