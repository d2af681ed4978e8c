"""Mappings of new and old files: whole, allocated, at round addresses, in huge pages where the kernel gives some."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from snapshotd import mapping
from snapshotd.mapping import HUGE_BYTES, map_file, map_new_file

SIZES = [1, 4096, 100_000, HUGE_BYTES - 1, HUGE_BYTES, 3 * HUGE_BYTES + 12_345, 40 * HUGE_BYTES]


@pytest.fixture
def descriptor() -> Iterator[int]:
    """An empty file in tmpfs, without a name."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryFile(dir=base) as file:
        yield file.fileno()


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_new_file_is_zeros_and_all_there(descriptor: int, nbytes: int) -> None:
    view = map_new_file(descriptor, nbytes)
    assert (view.nbytes, view.format, view.readonly) == (nbytes, "B", False)
    assert os.fstat(descriptor).st_size == nbytes
    assert os.fstat(descriptor).st_blocks * 512 >= nbytes
    assert not np.frombuffer(view, np.uint8).any()


@pytest.mark.parametrize("nbytes", SIZES)
def test_who_maps_it_again_sees_the_same_bytes(descriptor: int, nbytes: int) -> None:
    view = map_new_file(descriptor, nbytes)
    array = np.frombuffer(view, np.uint8)
    array[:] = np.random.default_rng(nbytes).integers(256, size=nbytes, dtype=np.uint8)
    again = map_file(descriptor, nbytes)
    assert again == view
    again[-1] ^= 255
    assert array[-1] == again[-1] == os.pread(descriptor, 1, nbytes - 1)[0]


@pytest.mark.parametrize("again", [False, True])
def test_mappings_begin_at_round_addresses(descriptor: int, again: bool) -> None:
    nbytes = 2 * HUGE_BYTES + 4096
    views = [map_new_file(descriptor, nbytes), *(map_file(descriptor, nbytes) for _ in range(3 * again))]
    addresses = [_address(view) for view in views]
    assert [address % HUGE_BYTES for address in addresses] == [0] * len(views)
    assert len(set(addresses)) == len(views)


def test_huge_pages_where_the_kernel_gives_some(descriptor: int) -> None:
    if not _gives_huge_pages():
        pytest.skip("this kernel gives no huge pages for a file in memory")
    view = map_new_file(descriptor, 3 * HUGE_BYTES + 12_345)
    assert _huge_bytes(view) == 3 * HUGE_BYTES
    assert _huge_bytes(map_file(descriptor, view.nbytes)) == 3 * HUGE_BYTES


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM, errno.EAGAIN])
def test_a_kernel_without_huge_pages_gives_small_ones(
    descriptor: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def advise(view: memoryview, advice: int) -> int:
        asked.append(advice)
        return code if advice == mapping._COLLAPSE else real(view, advice)

    real = mapping._advise
    monkeypatch.setattr(mapping, "_advise", advise)
    nbytes = 40 * HUGE_BYTES + 5
    view = map_new_file(descriptor, nbytes)
    assert asked == [mapping._COLLAPSE, mapping._POPULATE_WRITE]  # the second batch is not asked for
    assert os.fstat(descriptor).st_blocks * 512 >= nbytes
    assert _huge_bytes(view) == 0
    view[:] = b"\1" * nbytes
    assert map_file(descriptor, nbytes) == view


def test_a_kernel_that_cannot_populate_maps_all_the_same(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_advise", lambda view, advice: errno.EINVAL)
    nbytes = 2 * HUGE_BYTES + 5
    view = map_new_file(descriptor, nbytes)
    view[::4096] = bytes([7]) * len(view[::4096])
    again = map_file(descriptor, nbytes)
    assert again == view
    assert _address(again) % HUGE_BYTES == 0


def test_memory_that_moves_too_slowly_is_not_asked_for_any_longer(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    clock = iter(range(0, 1000, 5))
    real = mapping._advise
    monkeypatch.setattr(mapping, "_advise", lambda view, advice: asked.append(advice) or real(view, advice))
    monkeypatch.setattr(mapping.time, "monotonic", lambda: next(clock))
    map_new_file(descriptor, 100 * HUGE_BYTES)
    assert asked == [mapping._COLLAPSE, mapping._POPULATE_WRITE]


@pytest.mark.parametrize("nbytes", [4096, 3 * HUGE_BYTES])
def test_a_mapping_ends_with_the_last_view_of_it(descriptor: int, nbytes: int) -> None:
    view = map_new_file(descriptor, nbytes)
    address = _address(view)
    array = np.frombuffer(view[100:200], np.uint8)
    view.release()
    gc.collect()
    assert _is_mapped(address)
    assert not array.any()
    del array
    gc.collect()
    assert not _is_mapped(address)


def test_no_memory_is_an_error(descriptor: int) -> None:
    room = os.fstatvfs(descriptor)
    nbytes = (room.f_bavail + 10_000) * room.f_frsize
    with pytest.raises(OSError, match="No space left"):
        map_new_file(descriptor, nbytes)
    assert os.fstat(descriptor).st_blocks == 0


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _gives_huge_pages() -> bool:
    """Whether this kernel makes a huge page of a file in memory, asked without the code that is tested."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(2 * HUGE_BYTES))
        file.flush()
        # Where in it a round address lies at a round place is up to the kernel: any of these will do.
        for pad in range(0, 2 * HUGE_BYTES, mmap.PAGESIZE):
            with mmap.mmap(-1, HUGE_BYTES + pad) as _, mmap.mmap(file.fileno(), 2 * HUGE_BYTES) as mapped:
                first = ctypes.c_char.from_buffer(mapped)
                address = ctypes.addressof(first)
                done = address % HUGE_BYTES == 0 and not libc.madvise(
                    ctypes.c_void_p(address), ctypes.c_size_t(HUGE_BYTES), 25
                )
                del first
                if address % HUGE_BYTES == 0:
                    return done
    return False


def _huge_bytes(view: memoryview) -> int:
    return sum(
        int(line.split()[1]) * 1024
        for line in _lines_of(_address(view))
        if line.startswith(("ShmemPmdMapped:", "FilePmdMapped:"))
    )


def _is_mapped(address: int) -> bool:
    lines = _lines_of(address)
    return bool(lines) and "(deleted)" in lines[0]


def _lines_of(address: int) -> list[str]:
    """What the kernel says of the mapping at that address."""
    found: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        if inside:
            found.append(line)
    return found
