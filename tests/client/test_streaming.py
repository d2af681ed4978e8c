"""Streaming stores: they copy every byte, touch no other, and are used only where they have been seen to do so."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from snapshotd_client import streaming
from snapshotd_client.libraries import loaded
from snapshotd_client.streaming import find_streams

from snapshotd.isal import isal_paths


def is_there(name):
    if platform.machine() != "x86_64":
        return False
    if name == "mkl":
        return any(hasattr(library, "MKL_Domatcopy") for library in loaded("libtorch_cpu"))
    try:
        return bool(streaming.load_isal(isal_paths()))
    except OSError:
        return False


def needs(name):
    return pytest.mark.skipif(not is_there(name), reason=f"no {name} for this machine here")


each = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("isal", "mkl")])


def find(name):
    stream = {"isal": streaming._by_isal, "mkl": streaming._by_mkl}[name]()
    assert stream is not None
    return stream


@pytest.fixture(autouse=True)
def forgotten():
    """What was found before, and what a test has made of it."""
    find_streams.cache_clear()
    yield
    find_streams.cache_clear()


def test_what_there_is_is_found():
    assert len(find_streams()) == sum(map(is_there, ("isal", "mkl")))


@each
@pytest.mark.parametrize("nbytes", [32, 64, 4096, 4096 + 32, (1 << 20) - 32, 5 << 20])
def test_all_bytes_and_no_others(name, nbytes):
    """Breaks: a tensor arrives damaged, or its neighbour does."""
    stream = find(name)
    room = np.random.default_rng(0).integers(256, size=2 * nbytes + 256, dtype=np.uint8)
    begin = -room.ctypes.data % 32
    source, whole = room[begin : begin + nbytes], room[begin + nbytes : begin + 2 * nbytes + 64]
    before = whole.copy()
    target = whole[32 : 32 + nbytes]
    stream(target.ctypes.data, source.ctypes.data, nbytes)
    assert np.array_equal(target, source)
    assert np.array_equal(whole[:32], before[:32])
    assert np.array_equal(whole[32 + nbytes :], before[32 + nbytes :])


@each
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("nbytes", [64, 8192, 4 << 20])
def test_no_number_is_changed(name, nbytes, flush):
    """Breaks: NaNs become quiet, or the smallest numbers zero: the state restored is another one."""
    stream = find(name)
    numbers = [0x7FF0000000000001, 0xFFF4000000000000, 1, 0x8000000000000001, 0x000FFFFFFFFFFFFF, 1 << 63, 0x7F800001]
    room = np.zeros(2 * nbytes // 8 + 8, np.uint64)
    room = room[-room.ctypes.data % 32 // 8 :]
    source, target = room[: nbytes // 8], room[nbytes // 8 :][: nbytes // 8]
    source[:] = np.resize(np.array(numbers, np.uint64), nbytes // 8)
    torch.set_flush_denormal(flush)
    try:
        stream(target.ctypes.data, source.ctypes.data, nbytes)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(target, source)


@each
@pytest.mark.parametrize(("target", "source", "nbytes"), [(4, 0, 64), (0, 4, 64), (0, 0, 33), (0, 0, 0), (0, 0, -32)])
def test_what_would_end_the_process_is_refused(name, target, source, nbytes):
    """Breaks: SIGSEGV in somebody's training."""
    stream = find(name)
    room = np.zeros(512, np.uint8)
    begin = room.ctypes.data + -room.ctypes.data % 64
    with pytest.raises(ValueError, match="cannot be copied by streaming stores"):
        stream(begin + target, begin + 256 + source, nbytes)
    assert not room.any()


def test_without_a_library_there_is_none(monkeypatch):
    """Breaks: a machine without ISA-L, or a torch without MKL, cannot train."""
    monkeypatch.setattr(streaming, "isal_paths", lambda: ["/nonexistent/libisal.so"])
    monkeypatch.setattr(streaming, "loaded", lambda *beginnings: iter(()))
    assert find_streams() == ()


def test_another_library_is_not_taken_for_it(monkeypatch):
    """Breaks: AttributeError in the hook."""
    libc = ctypes.util.find_library("c")
    monkeypatch.setattr(streaming, "isal_paths", lambda: [libc])
    monkeypatch.setattr(streaming, "loaded", lambda *beginnings: iter([ctypes.CDLL(libc)]))
    assert find_streams() == ()


def test_on_other_machines_they_are_not_asked(monkeypatch):
    """Breaks: copies are slower where ISA-L has ordinary stores for this."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(streaming, "_by_isal", lambda: pytest.fail("asked"))
    assert find_streams() == ()


@needs("mkl")
def test_a_copy_has_one_thread_of_mkls_whatever_the_environment_says():
    """Breaks: each of the hook's threads has as many of MKL's beside it as training has."""
    script = """
        import ctypes, threading
        import torch
        from snapshotd_client.copying import copy_alone
        from snapshotd_client.libraries import loaded

        (library,) = loaded("libtorch_cpu")
        counts = [library.MKL_Get_Max_Threads()]
        thread = threading.Thread(target=lambda: (copy_alone(), counts.append(library.MKL_Get_Max_Threads())))
        thread.start()
        thread.join()
        print(*counts, library.MKL_Get_Max_Threads())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.split() == ["3", "1", "3"]


@pytest.mark.parametrize("name", ["isal", "mkl"])
@pytest.mark.parametrize("how", ["right", "nothing", "one bit", "too far", "refused", "signals", "subnormal", "large"])
def test_what_does_not_copy_right_is_not_used(monkeypatch, name, how):
    """Breaks: a broken build of a library is in every snapshot."""

    def multiply(nbytes, target, source):
        if how == "refused":
            return 1
        if how != "nothing":
            ctypes.memmove(target, source, nbytes + (1 if how == "too far" else 0))
        if how == "one bit" or (how == "large" and nbytes > 1 << 20):
            ctypes.c_ubyte.from_address(target + nbytes - 1).value ^= 0x80
        if how == "too far":
            ctypes.c_ubyte.from_address(target + nbytes).value = 1
        words = np.frombuffer((ctypes.c_char * nbytes).from_address(target), np.uint64)
        if how == "signals":
            words[words == 0x7FF0000000000001] |= 1 << 51
        if how == "subnormal":
            words[words == 1] = 0
        return 0

    class Library:
        def __init__(self):
            self.gf_vect_mul_init = lambda value, table: None
            self.gf_vect_mul = lambda nbytes, table, source, target: multiply(nbytes, target, source)
            self.MKL_Domatcopy = lambda _, __, rows, count, factor, source, *to: multiply(8 * count, to[1], source)

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    paths = ["isal"] if name == "isal" else []
    monkeypatch.setattr(streaming, "isal_paths", lambda: paths)
    monkeypatch.setattr(streaming, "load_isal", lambda paths: (paths[0], Library()) if paths else _no_library())
    monkeypatch.setattr(streaming, "loaded", lambda *beginnings: iter([] if paths else [Library()]))
    if name == "mkl" and how == "refused":
        how = "nothing"  # it says nothing
    assert len(find_streams()) == (how == "right")


def _no_library():
    raise OSError("there is none")
