"""Conversion of DeepSpeed ZeRO checkpoints on two ranks into the universal format, beside its own tools: 400 MB."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import ZERO, compare_all

GOAL = 21
APART = True


def rows(run: Run) -> Iterator[Row]:
    yield from compare_all(run, ZERO, 4e8, at_most=8)
