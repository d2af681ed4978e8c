"""Conversion of DeepSpeed ZeRO checkpoints on two ranks into the universal format, beside DeepSpeed's own tools."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import Source, compare

GOAL = 21


def rows(run: Run) -> Iterator[Row]:
    if run.short:
        yield Row.note("ZeRO", "not in the short form: making the checkpoint takes longer than that")
        return
    for stage in ("1", "3"):
        source = Source(
            what=f"ZeRO-{stage}, 2 ranks",
            script="zero.py",
            before=(stage, "2"),
            tools={"ds_to_universal": ("TARGET",), "zero_to_fp32": ("TARGET",)},
            deepspeed=True,
        )
        yield from compare(run, source, run.size(2e9), at_most=2.5)
