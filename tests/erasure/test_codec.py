"""Codecs: any k parts give all others, the libraries agree to the byte, and buffers are left alone."""

from __future__ import annotations

import itertools
import mmap
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zfec
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.erasure import Codec, IsalCodec, StripeGeometry, ZfecCodec, codec, decode_plan, load_codec, recoverable
from snapshotd.erasure.codec import self_test
from snapshotd.erasure.galois import PRODUCTS, decode_row, invert, multiply, parity_row
from snapshotd.erasure.geometry import reencode_plan
from snapshotd.errors import Unrecoverable, UsageError

CODES = [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 3)]


def available(make: Callable[[], Codec]) -> Codec | None:
    try:
        return make()
    except (ImportError, OSError):
        return None


ISAL = available(IsalCodec)
ZFEC = ZfecCodec()
CODECS = [pytest.param(ZFEC, id="zfec"), *([pytest.param(ISAL, id="isal")] if ISAL else [])]
needs_isal = pytest.mark.skipif(ISAL is None, reason="no libisal here")


def products(row: tuple[int, ...], parts: list[bytes], size: int) -> bytes:
    """The definition of a linear code, byte by byte."""
    total = bytearray(size)
    for factor, part in zip(row, parts, strict=True):
        for i, byte in enumerate(part[:size]):
            total[i] ^= PRODUCTS[factor][byte]
    return bytes(total)


# --- the field ---


@given(st.integers(0, 255), st.integers(0, 255))
def test_multiplication_is_that_of_polynomials(a: int, b: int) -> None:
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    assert multiply(a, b) == product


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_inverse(size: int, random_: random.Random) -> None:
    matrix = [[random_.randrange(256) for _ in range(size)] for _ in range(size)]
    try:
        inverse = invert(matrix)
    except UsageError:
        return
    for i, j in itertools.product(range(size), repeat=2):
        total = 0
        for x in range(size):
            total ^= multiply(matrix[i][x], inverse[x][j])
        assert total == (i == j)


def test_singular() -> None:
    with pytest.raises(UsageError, match="singular"):
        invert([[1, 2], [1, 2]])


@pytest.mark.parametrize(("k", "m"), [*CODES, (1, 5), (2, 3), (10, 4), (40, 20), (255, 1), (1, 255), (128, 128)])
def test_coefficients_are_zfecs(k: int, m: int) -> None:
    """Parity written with one library is read with the other, maybe years later."""
    encoder = zfec.Encoder(k, k + m)
    units = [bytes(int(i == j) for j in range(k)) for i in range(k)]
    rows = encoder.encode(units, list(range(k, k + m)))
    assert [tuple(row) for row in rows] == [parity_row(k, row) for row in range(m)]


# --- one codec ---


@pytest.mark.parametrize("tested", CODECS)
@pytest.mark.parametrize(("k", "m"), CODES)
def test_any_k_parts_give_every_other(tested: Codec, k: int, m: int) -> None:
    """All choices of known parts in any order: zfec's own way of putting primary parts in place is a known trap."""
    random_ = random.Random(k * 100 + m)
    size = 70
    sources = [random_.randbytes(random_.choice([0, 1, 31, 64, 70, 90])) for _ in range(k)]
    parity = [bytearray(b"\xee" * size) for _ in range(m)]
    for row, out in enumerate(parity):
        tested.encode_row(k, m, row, [source or None for source in sources], out)
        assert out == products(parity_row(k, row), sources, size)
    parts: list[bytes] = [*(source[:size].ljust(size, b"\0") for source in sources), *map(bytes, parity)]
    for chosen in itertools.combinations(range(k + m), k):
        order = random_.sample(chosen, k)
        known = [(i, sources[i] if i < k else parity[i - k]) for i in order]
        for wanted in range(k + m):
            out = bytearray(b"\xee" * size)
            tested.decode(k, m, known, wanted, out)
            assert out == parts[wanted], (order, wanted)


@needs_isal
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_isal_and_zfec_agree(data: st.DataObject) -> None:
    """Lengths around ISA-L's vector widths and tails, where its code paths differ."""
    assert ISAL is not None
    k, m = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    lengths = st.integers(0, 300) | st.sampled_from([0, 1, 15, 16, 31, 32, 63, 64, 65, 127, 128, 4096, 4099])
    size = data.draw(lengths)
    random_ = random.Random(data.draw(st.integers(0, 2**32)))
    sources = [random_.randbytes(data.draw(lengths)) if data.draw(st.booleans()) else None for _ in range(k)]
    rows = data.draw(st.lists(st.integers(0, m - 1), max_size=m))
    ours, theirs = ([bytearray(b"\xee" * size) for _ in rows] for _ in range(2))
    ISAL.encode_rows(k, m, rows, sources, ours)
    ZFEC.encode_rows(k, m, rows, sources, theirs)
    assert ours == theirs
    order = random_.sample(range(k + m), k)
    known = [(i, random_.randbytes(random_.randint(0, size))) for i in order]
    wanted = random_.randrange(k + m)
    one, other = bytearray(size), bytearray(b"\xee" * size)
    ISAL.decode(k, m, known, wanted, one)
    ZFEC.decode(k, m, known, wanted, other)
    assert one == other


@needs_isal
@pytest.mark.parametrize(("k", "m"), [(255, 1), (1, 255), (200, 56), (32, 32)])
def test_large_codes_agree(k: int, m: int) -> None:
    assert ISAL is not None
    random_ = random.Random(7)
    sources = [random_.randbytes(130) for _ in range(k)]
    ours, theirs = ([bytearray(130) for _ in range(m)] for _ in range(2))
    ISAL.encode_rows(k, m, range(m), sources, ours)
    ZFEC.encode_rows(k, m, range(m), sources, theirs)
    assert ours == theirs


@pytest.mark.parametrize("tested", CODECS)
def test_windows_and_mappings(tested: Codec) -> None:
    """Of many pages, unaligned, from a read-only view, into a mapping that can be closed afterwards."""
    size = (1 << 20) + 77
    random_ = np.random.default_rng(1)
    sources = [random_.integers(0, 256, size + 5, dtype=np.uint8) for _ in range(3)]
    views = [memoryview(source)[i : i + size - i].toreadonly() for i, source in enumerate(sources)]
    mapping = mmap.mmap(-1, size + 3)
    with memoryview(mapping) as whole, whole[3:] as out:
        tested.encode_row(3, 1, 0, views, out)
        lost = np.full(size, 238, np.uint8)
        tested.decode(3, 1, [(3, out), (0, views[0]), (2, views[2])], 1, lost)
    assert bytes(lost) == bytes(views[1]).ljust(size, b"\0")
    assert mapping[:3] == b"\0\0\0"
    mapping.close()


@pytest.mark.parametrize("tested", CODECS)
def test_no_copy_of_the_data_is_made(tested: Codec) -> None:
    size = 4 << 20
    sources, outs = [bytes([i]) * size for i in range(3)], [bytearray(size) for _ in range(2)]
    lost = bytearray(size)

    def both() -> None:
        tested.encode_rows(3, 2, [0, 1], sources, outs)
        tested.decode(3, 2, [(4, outs[1]), (2, sources[2]), (3, outs[0])], 1, lost)

    both()  # tables are kept
    tracemalloc.start()
    try:
        both()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lost == sources[1]
    assert peak < size / 100


@pytest.mark.parametrize("tested", CODECS)
def test_buffers_of_any_shape_are_rows_of_bytes(tested: Codec) -> None:
    """A tensor's memory comes as it is, and its first dimension is not its bytes."""
    sources = [np.arange(6, dtype=np.float32).reshape(2, 3), np.full((24, 1), 7, np.uint8), np.zeros((0, 4))]
    flat = [source.tobytes().ljust(30, b"\0") for source in sources]
    parity = np.full((5, 3), 99, np.uint16)
    tested.encode_rows(3, 2, [0], sources, [parity])
    assert parity.tobytes() == products(parity_row(3, 0), flat, 30)
    lost = np.full((2, 3), 9, np.float32)
    tested.decode(3, 2, [(3, parity), (2, sources[2]), (1, sources[1])], 0, lost)
    assert lost.tobytes() == flat[0][:24]
    for whole in (np.zeros((0, 4), np.float32), np.zeros(0, np.uint8)):
        tested.encode_rows(2, 1, [0], [whole, None], [whole])
        tested.decode(2, 1, [(0, whole), (2, None)], 1, whole)


@pytest.mark.parametrize("tested", CODECS)
def test_what_is_wrong_with_a_buffer_is_said(tested: Codec) -> None:
    gaps = np.zeros(8, np.uint8)[::2]
    with pytest.raises(UsageError, match="a source buffer is not contiguous"):
        tested.encode_row(1, 1, 0, [gaps], bytearray(4))
    for out in (gaps, b"1234"):
        with pytest.raises(UsageError, match="the output buffer is read-only or not contiguous"):
            tested.decode(2, 1, [(0, b"a"), (2, b"a")], 1, out)
    with pytest.raises(UsageError, match=r"the outputs must have one size, not \[4, 5\]"):
        tested.encode_rows(1, 2, [0, 1], [b"a"], [bytearray(4), bytearray(5)])
    with pytest.raises(UsageError, match=r"rows \[0, 2\] of 0..1 do not fit 2 outputs"):
        tested.encode_rows(1, 2, [0, 2], [b"a"], [bytearray(4), bytearray(4)])


@pytest.mark.parametrize("tested", CODECS)
def test_wrong_arguments_are_refused(tested: Codec) -> None:
    """Behind these checks are raw pointers."""
    out = bytearray(4)
    for call in (
        lambda: tested.encode_row(2, 1, 1, [b"a", b"b"], out),
        lambda: tested.encode_row(2, 1, -1, [b"a", b"b"], out),
        lambda: tested.encode_row(2, 1, 0, [b"a"], out),
        lambda: tested.encode_row(0, 1, 0, [], out),
        lambda: tested.encode_row(200, 57, 0, [None] * 200, out),
        lambda: tested.encode_row(1, 1, 0, [b"a"], b"1234"),
        lambda: tested.encode_row(1, 1, 0, [np.zeros(8, np.uint8)[::2]], out),
        lambda: tested.encode_rows(1, 2, [0, 1], [b"a"], [out]),
        lambda: tested.encode_rows(1, 2, [0, 1], [b"a"], [out, bytearray(5)]),
        lambda: tested.decode(2, 1, [(0, b"a")], 1, out),
        lambda: tested.decode(2, 1, [(0, b"a"), (0, b"a")], 1, out),
        lambda: tested.decode(2, 1, [(0, b"a"), (3, b"a")], 1, out),
        lambda: tested.decode(2, 1, [(0, b"a"), (2, b"a")], 3, out),
        lambda: tested.decode(2, 1, [(0, b"a"), (2, b"a")], 1, memoryview(b"1234")),
        lambda: decode_row(2, 255, (0, 1), 1),
    ):
        with pytest.raises(UsageError):
            call()
    assert out == bytes(4)


# --- choice at start ---


@needs_isal
def test_isal_is_preferred() -> None:
    found, reason = load_codec()
    assert (found.name, reason) == ("isal", "isal loads and passes the self-test")
    assert load_codec("zfec")[0].name == "zfec"
    with pytest.raises(UsageError):
        load_codec("leopard")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["libc.so.6", "/nonexistent/libisal.so"])
def test_a_library_that_does_not_load_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(codec, "isal_paths", lambda: [path])
    found, reason = load_codec()
    assert found.name == "zfec"
    assert reason.startswith("isal does not load (")
    assert reason.endswith("zfec loads and passes the self-test")


def test_a_zfec_that_describes_codes_otherwise_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read a pointer where there is none."""

    assert not codec._FecT(magic=7, k=2, n=3, enc_matrix=None).is_sound()
    monkeypatch.setattr(codec, "_FEC_MAGIC", 0xFEC)
    with pytest.raises(AttributeError, match="describes a code in another way"):
        ZfecCodec()
    with pytest.raises(UsageError, match=r"zfec does not load \(.*_fec.*; isal does not load"):
        monkeypatch.setattr(codec, "isal_paths", lambda: ["/nonexistent/libisal.so"])
        load_codec("zfec")


def _break(monkeypatch: pytest.MonkeyPatch, broken: type[Codec], method: str) -> None:
    def wrong(self: Codec, *args: object) -> None:
        args[-1][:] = bytes(len(args[-1])) if method == "decode" else args[-1]  # type: ignore[index, arg-type]

    monkeypatch.setattr(broken, method, wrong)


@needs_isal
@pytest.mark.parametrize(("method", "what"), [("encode_rows", "wrong parity"), ("decode", "wrong data part 0")])
def test_a_library_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch, method: str, what: str) -> None:
    """A miscompiled vector path would otherwise be found when the parity is needed."""
    _break(monkeypatch, IsalCodec, method)
    found, reason = load_codec("isal")
    assert found.name == "zfec"
    assert reason.startswith(f"isal fails the self-test ({what}")
    _break(monkeypatch, ZfecCodec, method)
    with pytest.raises(UsageError, match="no erasure codec works: zfec fails .* isal fails"):
        load_codec("zfec")


@pytest.mark.parametrize("tested", CODECS)
def test_self_test_passes(tested: Codec) -> None:
    assert self_test(tested) == ""


# --- geometry and codec together: what a group of nodes does ---


def group_lengths(k: int, random_: random.Random, kind: str) -> list[int]:
    unit = 64 * random_.randint(2, 4)
    near = [u * unit + d for u in range(k + 1) for d in (-1, 0, 1) if 0 <= u * unit + d <= k * unit]
    match kind:
        case "random":
            return [random_.randint(0, k * unit) for _ in range(64)]
        case "boundaries":
            return [random_.choice(near) for _ in range(64)]
        case "tiny":
            return [random_.choice([0, 1, 1, 2, 65]) for _ in range(64)]
        case _:
            return [random_.randint((k - 1) * unit + 1, k * unit) for _ in range(64)]


def protect(tested: Codec, geometry: StripeGeometry, slots: list[bytes]) -> list[bytearray]:
    parity = [bytearray(geometry.parity_bytes(p)) for p in range(geometry.n)]
    for p in range(geometry.n):
        for row in geometry.parity_rows(p):
            sources = []
            for contributor in geometry.contributors(row.stripe):
                begin, end = geometry.unit_range(contributor, row.stripe)
                sources.append(slots[contributor][begin:end])
            with memoryview(parity[p])[row.offset : row.offset + row.length] as out:
                tested.encode_row(geometry.k, geometry.m, row.row, sources, out)
    return parity


def rebuild(
    tested: Codec, geometry: StripeGeometry, slots: list[bytes], parity: list[bytearray], lost: set[int]
) -> None:
    """Rebuild slot and parity file of each lost position from the files of the others alone, and compare."""
    left = set(range(geometry.n)) - lost

    def known(plan: list) -> list[tuple[int, bytes | bytearray]]:
        assert all(part.position in left or part.begin == part.end for part in plan)
        return [
            (part.index, (parity if part.is_parity else slots)[part.position][part.begin : part.end]) for part in plan
        ]

    for p in lost:
        slot = bytearray(b"\xee" * geometry.lengths[p])
        for unit in range(geometry.k):
            stripe = geometry.stripe_of(p, unit)
            begin, end = geometry.unit_range(p, stripe)
            plan = decode_plan(geometry, stripe, p, left, left)
            if begin < end:
                with memoryview(slot)[begin:end] as out:
                    index = geometry.code_index(p, stripe)
                    tested.decode(geometry.k, geometry.m, known(plan), index, out)
        assert slot == slots[p]
        rows = bytearray(geometry.parity_bytes(p))
        for row in geometry.parity_rows(p):
            if row.length:
                plan = reencode_plan(geometry, row.stripe, row.row, left, left)
                with memoryview(rows)[row.offset : row.offset + row.length] as out:
                    tested.decode(geometry.k, geometry.m, known(plan), geometry.k + row.row, out)
        assert rows == parity[p]


@pytest.mark.parametrize("kind", ["full", "random", "boundaries", "tiny"])
@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_loss_of_m_nodes_is_rebuilt_and_of_more_refused(k: int, m: int, kind: str) -> None:
    """The promise on the first page of the README."""
    random_ = random.Random(f"{k} {m} {kind}")
    n = k + m
    lengths = group_lengths(k, random_, kind)[:n]
    geometry = StripeGeometry(lengths, m)
    slots = [random_.randbytes(length) for length in lengths]
    fast = ISAL or ZFEC
    parity = protect(fast, geometry, slots)
    assert parity == protect(ZFEC, geometry, slots)
    for size in range(m + 1):
        for number, lost in enumerate(map(set, itertools.combinations(range(n), size))):
            assert recoverable(geometry, lost, lost)[0]
            rebuild(fast, geometry, slots, parity, lost)
            if number % 10 == 0:
                rebuild(ZFEC, geometry, slots, parity, lost)
    for lost in map(set, itertools.combinations(range(n), m + 1)):
        # Only zeros that everybody knows can save a group that lost more than m nodes.
        possible, reason = recoverable(geometry, lost, lost)
        if kind == "full":
            assert not possible
        if possible:
            rebuild(fast, geometry, slots, parity, lost)
        else:
            assert f"only {m} can be rebuilt" in reason
            with pytest.raises(Unrecoverable):
                rebuild(fast, geometry, slots, parity, lost)


def test_large_group_in_whole_chunks() -> None:
    """Units of whole digest chunks, as in real groups."""
    lengths = [9_000_000, 8_388_609, 1]
    geometry = StripeGeometry(lengths, 1)
    assert geometry.granule == 128 * 1024
    random_ = random.Random(3)
    slots = [random_.randbytes(length) for length in lengths]
    parity = protect(ISAL or ZFEC, geometry, slots)
    for p in range(3):
        rebuild(ISAL or ZFEC, geometry, slots, parity, {p})
