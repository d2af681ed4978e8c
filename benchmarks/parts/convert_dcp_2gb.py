"""Conversion of a DCP checkpoint of FSDP2 on four ranks into the universal format, beside torch's own tools."""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run
from ..conversions import Source, compare

GOAL = 20

_DCP = Source(
    what="DCP, 4 ranks",
    script="dcp.py",
    before=("4",),
    tools={"dcp_to_torch_save": ("TARGET",), "dcp_load": ("2", "PORT")},
)


def rows(run: Run) -> Iterator[Row]:
    if run.short:
        yield Row.note(_DCP.what, "not in the short form: making the checkpoint takes longer than that")
        return
    yield from compare(run, _DCP, run.size(2e9), at_most=2.5)
