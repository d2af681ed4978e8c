"""Streaming stores: they copy every byte, touch no other, and are used only where they have been seen to do so."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform

import numpy as np
import pytest
from snapshotd_client import streaming
from snapshotd_client.streaming import find_stream

from snapshotd.isal import isal_paths


def is_there():
    try:
        return platform.machine() == "x86_64" and bool(streaming.load_isal(isal_paths()))
    except OSError:
        return False


needs_isal = pytest.mark.skipif(not is_there(), reason="no libisal for this machine here")


@pytest.fixture(autouse=True)
def forgotten():
    """What was found before, and what a test has made of it."""
    find_stream.cache_clear()
    yield
    find_stream.cache_clear()


@needs_isal
@pytest.mark.parametrize("nbytes", [32, 64, 4096, 4096 + 32, (1 << 20) - 32, 5 << 20])
def test_all_bytes_and_no_others(nbytes):
    """Breaks: a tensor arrives damaged, or its neighbour does."""
    stream = find_stream()
    assert stream is not None
    room = np.random.default_rng(0).integers(256, size=2 * nbytes + 256, dtype=np.uint8)
    begin = -room.ctypes.data % 32
    source, whole = room[begin : begin + nbytes], room[begin + nbytes : begin + 2 * nbytes + 64]
    before = whole.copy()
    target = whole[32 : 32 + nbytes]
    stream(target.ctypes.data, source.ctypes.data, nbytes)
    assert np.array_equal(target, source)
    assert np.array_equal(whole[:32], before[:32])
    assert np.array_equal(whole[32 + nbytes :], before[32 + nbytes :])


@needs_isal
@pytest.mark.parametrize(("target", "source", "nbytes"), [(4, 0, 64), (0, 4, 64), (0, 0, 33), (0, 0, 0), (0, 0, -32)])
def test_what_would_end_the_process_is_refused(target, source, nbytes):
    """Breaks: SIGSEGV in somebody's training."""
    stream = find_stream()
    assert stream is not None
    room = np.zeros(512, np.uint8)
    begin = room.ctypes.data + -room.ctypes.data % 64
    with pytest.raises(ValueError, match="cannot be copied by streaming stores"):
        stream(begin + target, begin + 256 + source, nbytes)
    assert not room.any()


def test_without_a_library_there_is_none(monkeypatch):
    """Breaks: a machine without ISA-L cannot train."""
    monkeypatch.setattr(streaming, "isal_paths", lambda: ["/nonexistent/libisal.so"])
    assert find_stream() is None


def test_another_library_is_not_taken_for_it(monkeypatch):
    """Breaks: AttributeError in the hook."""
    monkeypatch.setattr(streaming, "isal_paths", lambda: [ctypes.util.find_library("c")])
    assert find_stream() is None


@needs_isal
def test_on_other_machines_it_is_not_asked(monkeypatch):
    """Breaks: copies are slower where ISA-L has ordinary stores for this."""
    assert find_stream() is not None
    find_stream.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert find_stream() is None


@pytest.mark.parametrize("how", ["nothing", "one bit", "too far", "refused"])
def test_what_does_not_copy_right_is_not_used(monkeypatch, how):
    """Breaks: a broken build of a library is in every snapshot."""

    def multiply(nbytes, _table, source, target):
        if how == "refused":
            return 1
        if how != "nothing":
            ctypes.memmove(target, source, nbytes + (1 if how == "too far" else 0))
        if how == "one bit":
            ctypes.c_ubyte.from_address(target + nbytes - 1).value ^= 0x80
        if how == "too far":
            ctypes.c_ubyte.from_address(target + nbytes).value = 1
        return 0

    class Library:
        def __init__(self):
            self.gf_vect_mul = lambda *arguments: multiply(*arguments)
            self.gf_vect_mul_init = lambda *arguments: None

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(streaming, "load_isal", lambda paths: ("it", Library()))
    assert find_stream() is None
