"""Conversion of a DCP checkpoint of FSDP2 on four ranks into the universal format, beside torch's own tools: 400 MB."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import DCP, compare_all

GOAL = 20
APART = True


def rows(run: Run) -> Iterator[Row]:
    yield from compare_all(run, DCP, 4e8, at_most=8)
