"""Compiled copies and digests: the bytes of a plain copy and the digests of xxhash, or they are not used at all."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import native
from snapshotd.native import CHUNK_BYTES, kernels

ROOT = Path(__file__).resolve().parents[2]
NOISE = np.random.default_rng(1).integers(256, size=16 * CHUNK_BYTES + 4096, dtype=np.uint8)


def has_avx2() -> bool:
    return platform.machine() == "x86_64" and " avx2 " in Path("/proc/cpuinfo").read_text(encoding="ascii")


needs_them = pytest.mark.skipif(not has_avx2(), reason="the processor lacks AVX2")


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def plain_digests(data) -> list[int]:
    return [xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]


def aligned_room(nbytes: int) -> np.ndarray:
    room = np.full(nbytes + 128, 0xA5, np.uint8)
    return room[-address(room) % 64 :][: nbytes + 64]


@pytest.fixture
def fresh():
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@needs_them
def test_they_are_there() -> None:
    """Breaks: nothing was compiled, and copies and digests take twice as long, unseen."""
    assert kernels() is not None


@needs_them
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3 * CHUNK_BYTES), min_size=0, max_size=4),
    st.integers(0, 63),
    st.integers(1, 13),
    st.integers(0, 9),
)
def test_chunks_of_any_segments(sizes: list[int], shift: int, chunks: int, before: int) -> None:
    """Breaks: bytes or digests are wrong where a chunk has bytes of several tensors, where they lie at odd addresses,
    or where so many chunks are left over at the end."""
    nbytes = chunks * CHUNK_BYTES
    segments, expected, at, left = [], [], shift, nbytes
    for size in [*sizes, nbytes]:
        taken = min(size, left)
        at = (at + 7919) % (len(NOISE) - taken + 1)
        if taken:
            segments.append((address(NOISE) + at, taken))
            expected.append(NOISE[at : at + taken])
        left -= taken
    expected = np.concatenate(expected)
    target = aligned_room(nbytes)
    digests = np.full(chunks + 2, 77, np.uint64)
    table = np.array(segments, np.uint64)
    runs = [(address(target), address(digests) + 8, address(table), chunks)]
    if before:  # a run of its own, that shares lanes with the other
        room, found = aligned_room(before * CHUNK_BYTES), np.zeros(before, np.uint64)
        other = np.array([(address(NOISE), before * CHUNK_BYTES)], np.uint64)
        runs.insert(0, (address(room), address(found), address(other), before))
    words = np.array(runs, np.uint64)
    kernels().copy_digest(address(words), len(words))
    assert np.array_equal(target[:nbytes], expected)
    assert (target[nbytes:] == 0xA5).all()
    assert digests.tolist() == [77, *plain_digests(expected), 77]
    if before:
        assert np.array_equal(room[:-64], NOISE[: before * CHUNK_BYTES])
        assert found.tolist() == plain_digests(NOISE[: before * CHUNK_BYTES])


@needs_them
@pytest.mark.parametrize("chunks", range(10))
@pytest.mark.parametrize("at", [0, 1, 24])
def test_digests_of_read_only_memory(chunks: int, at: int) -> None:
    """Breaks: the digest of a number of chunks is that of others."""
    data = NOISE[at : at + chunks * CHUNK_BYTES + 100].tobytes()
    found = kernels().digest(memoryview(data))
    assert np.frombuffer(found, "<u8").tolist() == plain_digests(data[: chunks * CHUNK_BYTES])


@needs_them
def test_many_threads_at_once() -> None:
    """Breaks: two copies share something, and one has the digests of the other."""
    wrong = []

    def work(seed: int) -> None:
        source = np.random.default_rng(seed).integers(256, size=9 * CHUNK_BYTES, dtype=np.uint8)
        expected = plain_digests(source)
        table, digests = np.array([(address(source), source.nbytes)], np.uint64), np.zeros(9, np.uint64)
        for _ in range(30):
            target = aligned_room(source.nbytes)
            word = np.array([(address(target), address(digests), address(table), 9)], np.uint64)
            kernels().copy_digest(address(word), 1)
            if digests.tolist() != expected or not np.array_equal(target[:-64], source):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Library:
    """Compiled functions that do as they are told to."""

    def __init__(self, copies: bool = True, digests: bool = True, supported: bool = True) -> None:
        real = ctypes.CDLL(str(native._LIBRARY))
        self.snapshotd_is_supported = lambda: supported
        self.snapshotd_copy_digest, self.snapshotd_digest = real.snapshotd_copy_digest, real.snapshotd_digest
        real.snapshotd_copy_digest.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        if not copies:

            def forget(runs, count) -> None:
                real.snapshotd_copy_digest(runs, count)
                ctypes.c_ubyte.from_address(ctypes.c_uint64.from_address(runs).value + 70000).value ^= 1

            self.snapshotd_copy_digest = forget
        if not digests:
            self.snapshotd_digest = lambda source, chunks, found: None


@needs_them
@pytest.mark.parametrize(
    ("how", "warns"),
    [({"copies": False}, True), ({"digests": False}, True), ({"supported": False}, False), ({}, False)],
)
def test_what_is_wrong_is_not_used(fresh, monkeypatch, caplog, how: dict[str, bool], warns: bool) -> None:
    """Breaks: a compiler's mistake, or another processor, and the snapshots are garbage."""
    library = Library(**how)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: library)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        assert (kernels() is not None) == (not how)
    assert ("does not copy and digest right" in caplog.text) == warns


def test_nothing_was_compiled(fresh, monkeypatch, tmp_path, caplog) -> None:
    """Breaks: all is slower for ever, since pip does not show what a build has said."""
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "copy_digest.so")
    with caplog.at_level(logging.WARNING, "snapshotd"):
        assert kernels() is kernels() is None
    assert caplog.text.count("no C compiler worked: copies and digests take longer") == 1
    shutil.copy(next(iter_libc()), tmp_path / "copy_digest.so")
    kernels.cache_clear()
    assert kernels() is None


def iter_libc():
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        if "/libc.so" in line or "/libc-" in line:
            yield line.split(maxsplit=5)[5]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources that a wheel is made of, where nothing is compiled yet."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, root)
    for name in ("snapshotd", "client", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    return root


@pytest.mark.parametrize("compiler", ["", "false", "/nonexistent/cc -m64"])
def test_a_wheel_has_what_could_be_compiled(tree, tmp_path, compiler: str) -> None:
    """Breaks: a machine without a compiler cannot install us at all; or a wheel says that it is for any machine, and is
    not; or has what was compiled for another."""
    library = tree / "snapshotd/native/copy_digest.so"
    library.write_bytes(b"of another machine")
    env = {**os.environ, **({"CC": compiler} if compiler else {})}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert ("snapshotd/native/copy_digest.so" in names) == (not compiler)
        if not compiler:
            assert archive.read("snapshotd/native/copy_digest.so") == library.read_bytes() != b"of another machine"
    assert wheel.name.endswith("-py3-none-any.whl") == bool(compiler)
    assert ("was not compiled; copies and digests will be slower" in done.stdout + done.stderr) == bool(compiler)
    assert {"snapshotd_client/chunks.py", "snapshotd/benchmarks/run.py"} <= names
