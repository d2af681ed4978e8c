"""What the node core keeps must not grow with the steps that are over."""

from __future__ import annotations

import ctypes

import pytest

from snapshotd.daemon import events
from snapshotd.daemon.core_state import NodeState
from snapshotd.v1 import control_pb2 as control


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


LIBC = ctypes.CDLL(None)


def native_bytes() -> int:
    """Bytes that malloc has given out: protobuf's memory is there, and Python's own counters do not see it."""
    LIBC.mallinfo2.restype = _MallInfo
    return int(LIBC.mallinfo2().uordblks)


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="this C library does not tell (glibc does from 2.33 on)")
def test_what_was_freed_and_told_leaves_no_memory_behind() -> None:
    """Breaks: a message that is cleared keeps its memory; the daemon grows with each step, for months."""
    settings = events.NodeSettings(node_id="n0", nonce="n0#1", version="1", bulk_address="n0:1", generations=2)
    state = NodeState(settings)
    state.set_connected(True)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            state.freed([control.SlotRef(job="a job with a name of some length", epoch=1, step=step, rank=0)])
            state.tell_freed()
            state.take()

    steps(1, 2000)
    before = native_bytes()
    steps(2000, 12_000)
    assert native_bytes() - before < 100_000
