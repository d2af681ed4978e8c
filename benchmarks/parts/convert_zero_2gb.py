"""Conversion of DeepSpeed ZeRO checkpoints on two ranks into the universal format, beside its own tools: 2 GB."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import ZERO, compare_all

GOAL = 21
APART = True


def rows(run: Run) -> Iterator[Row]:
    yield from compare_all(run, ZERO, 2e9, at_most=2.5)
