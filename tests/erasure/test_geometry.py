"""Stripe geometry against a dumb twin that walks all stripes and counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.erasure import StripeGeometry, decode_plan, recoverable, reencode_plan
from snapshotd.errors import LayoutError, Unrecoverable
from snapshotd.layout import CHUNK_BYTES

SIZES = [0, 1, 63, 64, 65, 1000, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 40 * CHUNK_BYTES, 200 * CHUNK_BYTES + 3]

lengths_in_any_mode = st.sampled_from(SIZES) | st.integers(0, 300 * CHUNK_BYTES)


@st.composite
def geometries(draw: st.DrawFn) -> StripeGeometry:
    lengths = draw(st.lists(lengths_in_any_mode, min_size=1, max_size=9))
    return StripeGeometry(lengths, draw(st.integers(0, len(lengths) - 1)))


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_invariants(geometry: StripeGeometry) -> None:
    """Each byte is in exactly one stripe, and no node holds two parts of one stripe: else one loss counts twice."""
    n, m, k = geometry.n, geometry.m, geometry.k
    longest = max(geometry.lengths)
    assert n == m + k == len(geometry.lengths)
    assert geometry.unit_bytes % geometry.granule == 0
    assert longest <= k * geometry.unit_bytes
    assert geometry.unit_bytes >= min(longest, CHUNK_BYTES)
    assert geometry.granule == (CHUNK_BYTES if longest > 16 * k * CHUNK_BYTES else 64)
    contributed = {p: [] for p in range(n)}
    held = {p: [] for p in range(n)}
    for stripe in range(n):
        holders, contributors = geometry.holders(stripe), geometry.contributors(stripe)
        assert holders == tuple((stripe + t) % n for t in range(m))
        assert contributors == tuple(p for p in range(n) if p not in holders)
        for index, p in enumerate(contributors):
            unit = len(contributed[p])
            assert geometry.code_index(p, stripe) == index
            assert geometry.unit_index(p, stripe) == unit
            assert geometry.stripe_of(p, unit) == stripe
            contributed[p].append(geometry.unit_range(p, stripe))
        for row, p in enumerate(holders):
            assert geometry.code_index(p, stripe) == k + row
            held[p].append((stripe, row))
            with pytest.raises(LayoutError):
                geometry.unit_range(p, stripe)
        lengths = [end - begin for begin, end in (geometry.unit_range(p, stripe) for p in contributors)]
        assert geometry.parity_length(stripe) == max(lengths)
    for p in range(n):
        assert len(contributed[p]) == k
        end = 0
        for begin, stop in contributed[p]:
            assert begin == end
            end = stop
        assert end == geometry.lengths[p]
        rows = geometry.parity_rows(p)
        assert [(row.stripe, row.row) for row in rows] == held[p]
        free = 0
        for row in rows:
            assert row.offset >= free
            assert row.offset % geometry.granule == 0
            assert geometry.parity_row(row.stripe, row.row) == (p, row)
            free = row.offset + row.length
            assert free <= geometry.parity_bytes(p) or not row.length
        assert geometry.parity_bytes(p) <= m * max(-(-longest // k) + geometry.granule, CHUNK_BYTES)


@settings(max_examples=100, deadline=None)
@given(geometries(), st.data())
def test_units_of_range(geometry: StripeGeometry, data: st.DataObject) -> None:
    """Repair of a rotten chunk decodes just these units."""
    p = data.draw(st.integers(0, geometry.n - 1))
    begin = data.draw(st.integers(0, geometry.lengths[p]))
    end = data.draw(st.integers(begin, geometry.lengths[p]))
    ranges = [geometry.unit_range(p, geometry.stripe_of(p, unit)) for unit in range(geometry.k)]
    expected = [u for u, (b, e) in enumerate(ranges) if max(b, begin) < min(e, end)]
    assert list(geometry.units_of_range(p, begin, end)) == expected


def test_example() -> None:
    """The picture in the documentation: four members, one parity row."""
    geometry = StripeGeometry([900_000, 900_000, 600_000, 30], 1)
    assert (geometry.k, geometry.unit_bytes) == (3, 300_032)
    assert [geometry.contributors(s) for s in range(4)] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert [geometry.unit_range(0, s) for s in (1, 2, 3)] == [(0, 300_032), (300_032, 600_064), (600_064, 900_000)]
    assert [geometry.unit_range(3, s) for s in (0, 1, 2)] == [(0, 30), (30, 30), (30, 30)]
    assert [geometry.parity_bytes(p) for p in range(4)] == [300_032, 300_032, 300_032, 299_936]


def test_small_slots_are_one_unit() -> None:
    """Then one node codes those of all others, a second one mirrors the first, and no other has anything to do."""
    geometry = StripeGeometry([1000, 1000, 900, 10], 1)
    assert geometry.unit_bytes == 1024
    assert [geometry.unit_range(p, 0) for p in (1, 2, 3)] == [(0, 1000), (0, 900), (0, 10)]
    assert geometry.unit_range(0, 1) == (0, 1000)
    assert [geometry.parity_bytes(p) for p in range(4)] == [1000, 1000, 0, 0]
    two = StripeGeometry([1000] * 5, 2)
    assert [two.parity_bytes(p) for p in range(5)] == [1000, 2024, 2024, 1000, 0]


def test_units_of_slots_of_some_chunks_are_chunks() -> None:
    geometry = StripeGeometry([CHUNK_BYTES + 5] * 4, 1)
    assert geometry.unit_bytes == CHUNK_BYTES
    assert [geometry.parity_bytes(p) for p in range(4)] == [CHUNK_BYTES, CHUNK_BYTES, 5, 0]


def test_one_node_has_no_parity() -> None:
    geometry = StripeGeometry([5], 0)
    assert geometry.parity_rows(0) == []
    assert geometry.unit_range(0, 0) == (0, 5)
    assert recoverable(geometry, set()) == (True, "no data is missing")
    assert not recoverable(geometry, {0})[0]


@pytest.mark.parametrize(
    ("lengths", "m", "message"),
    [
        ([1, 1], 2, "2 parity rows need more than 2 members, but the group has 2"),
        ([1, 1], 3, "the group has 2"),
        ([1, 1], -1, "-1"),
        ([], 0, "not 0"),
        ([1] * 257, 1, "not 257"),
        ([1, -1], 1, "position 1"),
        ([1, 1.0], 1, "position 1"),
        ([1, 2**61], 1, "position 1"),
    ],
)
def test_impossible_groups_are_refused_with_the_numbers(lengths: list[int], m: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        StripeGeometry(lengths, m)


def test_places_that_do_not_exist() -> None:
    geometry = StripeGeometry([100, 100, 100], 1)
    for call in (
        lambda: geometry.holders(3),
        lambda: geometry.contributors(-1),
        lambda: geometry.stripe_of(0, 2),
        lambda: geometry.parity_row(0, 1),
        lambda: geometry.units_of_range(0, 50, 101),
        lambda: recoverable(geometry, {3}),
        lambda: decode_plan(geometry, 0, 1, {7}, set()),
        lambda: decode_plan(geometry, 0, 0, {1, 2}, {0}),
        lambda: reencode_plan(geometry, 0, 1, {1, 2}, {0}),
    ):
        with pytest.raises(LayoutError):
            call()


def test_large_groups_are_fast() -> None:
    geometry = StripeGeometry([10**12] * 256, 128)
    assert geometry.parity_bytes(255) >= 10**12


def test_reasons_name_the_stripe_and_the_parts() -> None:
    """People act on this sentence at night."""
    geometry = StripeGeometry([1000] * 4, 2)
    good, reason = recoverable(geometry, {0, 1}, {0, 1})
    assert good
    assert reason == "no stripe lacks more than 2 of its 4 parts, and 2 can be rebuilt"
    good, reason = recoverable(geometry, {0, 1, 2}, {0, 1, 2})
    assert not good
    assert reason == (
        "stripe 0 lacks 3 of its 4 parts (data of positions 2; parity of positions 0, 1), but only 2 can be rebuilt"
    )
    with pytest.raises(Unrecoverable, match="the data of position 2 in stripe 0 needs 2 other parts, but there are 1"):
        decode_plan(geometry, 0, 2, {3}, set())
    with pytest.raises(Unrecoverable, match=r"parity row 1 .* there are 0: nothing"):
        reencode_plan(geometry, 0, 1, set(), set())


def test_plans_prefer_data_and_skip_zeros() -> None:
    """Zeros cost no traffic; data is used as it is, parity must be multiplied."""
    geometry = StripeGeometry([4 * CHUNK_BYTES] * 3 + [0, 4 * CHUNK_BYTES], 2)
    # Stripe 2: parity on 2 and 3, contributors 0, 1, 4.
    plan = decode_plan(geometry, 2, 0, {1, 2, 3, 4}, {2, 3})
    assert [(p.position, p.is_parity, p.row, p.index) for p in plan] == [
        (1, False, None, 1), (4, False, None, 2), (2, True, 0, 3)
    ]  # fmt: skip
    # Stripe 0: parity on 0 and 1, contributors 2, 3 (empty) and 4.
    plan = decode_plan(geometry, 0, 2, {4}, {1})
    assert [(p.position, p.is_parity, p.row, p.index, p.begin == p.end) for p in plan] == [
        (3, False, None, 1, True), (4, False, None, 2, False), (1, True, 1, 4, False)
    ]  # fmt: skip
    # What is wanted may be there and rotten: it is not used to rebuild itself.
    assert [p.index for p in decode_plan(geometry, 2, 0, {0, 1, 4}, {2, 3})] == [1, 2, 3]
    assert [p.index for p in reencode_plan(geometry, 2, 0, {0, 1}, {2, 3})] == [0, 1, 4]
    assert decode_plan(geometry, 0, 3, set(), set()) == []
    assert [p.index for p in reencode_plan(geometry, 2, 1, {0, 1, 4}, {2})] == [0, 1, 2]
    assert [p.index for p in reencode_plan(geometry, 2, 1, {0, 1}, {2})] == [0, 1, 3]


@settings(max_examples=200, deadline=None)
@given(geometries(), st.data())
def test_recoverable_exactly_when_every_unit_has_a_plan(geometry: StripeGeometry, data: st.DataObject) -> None:
    """The coordinator promises a step by one function, the daemons fulfil it by the other."""
    everyone = set(range(geometry.n))
    positions = st.sets(st.integers(0, geometry.n - 1))
    data_missing, parity_missing = data.draw(positions), data.draw(positions)
    possible = True
    for p in data_missing:
        for unit in range(geometry.k):
            try:
                plan = decode_plan(
                    geometry, geometry.stripe_of(p, unit), p, everyone - data_missing, everyone - parity_missing
                )
            except Unrecoverable:
                possible = False
            else:
                assert all(
                    part.begin == part.end or part.position not in (parity_missing if part.is_parity else data_missing)
                    for part in plan
                )
    assert recoverable(geometry, data_missing, parity_missing)[0] == possible
