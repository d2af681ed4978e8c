"""Lazy views against numpy, in thousands of random combinations."""

from __future__ import annotations

import random
import struct
from math import prod
from typing import Any

import numpy as np
import pytest

from snapshotd.errors import CorruptionError, FormatError, LayoutError
from snapshotd.universal.derived import Cast, Deferred, Filled, Merged, Permuted
from snapshotd.universal.sources import BytesSource, FileSource
from snapshotd.universal.views import Cut, Joined, Reshaped, Stored, View, concat, flat_part, read_all, slabs
from snapshotd.universal.words import cast, from_float


def shape_of(dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.randint(0 if dice.random() < 0.05 else 1, 6) for _ in range(dice.randint(0, 4)))


def leaf(dice: random.Random, shape: tuple[int, ...]) -> tuple[View, Any]:
    """A strided part of a storage, and what numpy has for it."""
    axes = list(range(len(shape)))
    dice.shuffle(axes)
    padded = [n + dice.randint(0, 2) for n in shape]
    strides = [0] * len(shape)
    step = dice.choice((1, 1, 2))
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(1, padded[axis])
    offset = dice.randint(0, 5)
    data = np.frombuffer(dice.randbytes(4 * (step + offset + 1)), np.uint32)
    view = Stored(BytesSource(data.tobytes()), 4 * offset, "float32", shape, strides)
    array = np.lib.stride_tricks.as_strided(data[offset:], shape, [4 * s for s in strides])
    return view, array.copy()


def tree(dice: random.Random, shape: tuple[int, ...], depth: int) -> tuple[View, Any]:
    """A random view of ``shape``, and its twin."""
    choice = dice.randint(0, 5) if depth else 0
    if choice == 1 and shape:
        dim = dice.randrange(len(shape))
        cut = dice.randint(0, shape[dim])
        parts = [tree(dice, (*shape[:dim], n, *shape[dim + 1 :]), depth - 1) for n in (cut, shape[dim] - cut)]
        return concat([view for view, _ in parts], dim), np.concatenate([array for _, array in parts], dim)
    if choice == 2:
        before, after = [dice.randint(0, 2) for _ in shape], [dice.randint(0, 2) for _ in shape]
        outer = tuple(b + n + a for b, n, a in zip(before, shape, after, strict=True))
        view, array = tree(dice, outer, depth - 1)
        return Cut(view, before, shape), array[tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))]
    if choice == 3:
        numel = prod(shape)
        divisors = [d for d in range(1, numel + 1) if numel % d == 0] or [1]
        rows = dice.choice(divisors)
        view, array = tree(dice, (rows, numel // rows) if dice.random() < 0.7 else (numel,), depth - 1)
        return Reshaped(view, shape), array.reshape(shape)
    if choice == 4:
        axes = list(range(len(shape)))
        dice.shuffle(axes)
        inner = [0] * len(shape)
        for i, axis in enumerate(axes):
            inner[axis] = shape[i]
        view, array = tree(dice, tuple(inner), depth - 1)
        return Permuted(view, axes), array.transpose(axes)
    if choice == 5:
        view, array = tree(dice, shape, depth - 1)
        return Deferred("float32", shape, lambda: view), array
    return leaf(dice, shape)


@pytest.mark.parametrize("seed", range(8))
def test_any_box_of_any_combination_is_what_numpy_has(seed: int) -> None:
    """A weight would get another one's numbers."""
    dice = random.Random(seed)
    for _ in range(250):
        shape = shape_of(dice)
        view, array = tree(dice, shape, dice.randint(0, 4))
        view.check("t")
        assert array.tobytes() == read_all(view).tobytes()
        at = tuple(dice.randint(0, n) for n in shape)
        lengths = tuple(dice.randint(0, n - a) for n, a in zip(shape, at, strict=True))
        expected = array[tuple(slice(a, a + n) for a, n in zip(at, lengths, strict=True))]
        spare = np.zeros(tuple(2 * n + 1 for n in lengths), np.uint32)
        out = spare[tuple(slice(1, 2 * n + 1, 2) for n in lengths)] if lengths else np.zeros((), np.uint32)
        view.read_into(at, out)
        assert np.array_equal(expected, out)
        joined = b"".join(
            array[tuple(slice(a, a + n) for a, n in zip(begin, box, strict=True))].tobytes()
            for begin, box in slabs(shape, 4, dice.randint(4, 200))
        )
        assert array.tobytes() == joined


def test_flat_buffers_are_cut_into_parameters() -> None:
    """ZeRO's flat partitions: a parameter may begin in one file and end two files later."""
    data = np.arange(100, dtype=np.float32)
    sources = [BytesSource(data[b : b + 25].tobytes(), f"rank{b // 25}") for b in (0, 25, 50, 75)]
    files = [Stored(source, 0, "float32", (25,)) for source in sources]
    flat = concat(files)
    view = flat_part(flat, 20, (7, 9))
    assert data[20:83].tobytes() == read_all(view).tobytes()
    assert data[20:83].reshape(7, 9)[2:4, 3:5].tobytes() == read_all(Cut(view, (2, 3), (2, 2))).tobytes()
    assert sorted(view.labels()) == ["rank0", "rank1", "rank2", "rank3"]
    with pytest.raises(FormatError):
        flat_part(flat, 90, (3, 5))


def test_gaps_and_overlaps_are_told_with_region_and_files() -> None:
    part = Stored(BytesSource(bytes(96), "one"), 0, "float32", (2, 12))
    other = Stored(BytesSource(bytes(96), "two"), 0, "float32", (2, 12))
    with pytest.raises(FormatError, match=r"w: the region \[2:4, 0:12\].* in no file; there are parts in one"):
        Joined("float32", (4, 12), [((0, 0), part)]).check("w")
    with pytest.raises(FormatError, match=r"w: the region \[1:2, 0:12\] is there twice, in one and in two"):
        Joined("float32", (3, 12), [((0, 0), part), ((1, 0), other)]).check("w")
    with pytest.raises(FormatError, match="not inside"):
        Joined("float32", (3, 12), [((2, 0), part)]).check("w")
    with pytest.raises(FormatError):
        read_all(Joined("float32", (4, 12), [((0, 0), part)]))


def test_copies_must_be_equal_or_are_averaged() -> None:
    def stored(*values: float) -> View:
        return Stored(BytesSource(struct.pack(f"<{len(values)}f", *values), str(values)), 0, "float32", (len(values),))

    assert struct.pack("<2f", 1, 2) == read_all(Merged([stored(1, 2), stored(1, 2)], "equal")).tobytes()
    assert struct.pack("<2f", 2, 3) == read_all(Merged([stored(1, 2), stored(3, 4)], "average")).tobytes()
    with pytest.raises(FormatError, match=r"norm should be the same in \(1, 2\) and \(1, 3\)"):
        read_all(Merged([stored(1, 2), stored(1, 3)], "equal", "norm"))
    with pytest.raises(FormatError):
        Merged([stored(1), stored(1, 2)], "equal")
    assert bytes(8) == read_all(Filled("float32", (2,))).tobytes()


def test_casts_round_as_torch_does() -> None:
    """16-bit weights that exist as masters only would differ from the running ones in the last bit."""
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = torch.from_numpy(bits.view(np.int32).copy()).view(torch.float32)
    numbers = ~torch.isnan(values)
    for name in ("bfloat16", "float16"):
        expected = values.to(getattr(torch, name)).view(torch.int16).numpy().view(np.uint16)
        found = cast(bits, "float32", name)
        assert np.array_equal(expected[numbers.numpy()], found[numbers.numpy()])
    nan = np.array([0x7F800001, 0xFFC00000], np.uint32)
    assert np.isnan(cast(cast(nan, "float32", "bfloat16"), "bfloat16", "float32").view(np.float32)).all()
    assert from_float(np.array([1.0]), "bfloat16")[0] == 0x3F80
    view = Cast(Stored(BytesSource(struct.pack("<2f", 1.0, -2.0)), 0, "float32", (2,)), "bfloat16", 0.5)
    assert read_all(view).tolist() == [0x3F00, 0xBF80]


def test_sizes_that_cannot_be_are_refused() -> None:
    source = BytesSource(bytes(16))
    for shape in ((-1,), (1 << 60,), (1,) * 40):
        with pytest.raises(LayoutError):
            Stored(source, 0, "float32", shape)
    with pytest.raises(FormatError):
        Stored(source, 0, "float32", (2,), (1, 1))
    with pytest.raises(CorruptionError, match="needed"):
        read_all(Stored(source, 0, "float32", (5,)))


def test_file_that_is_cut_short_while_it_is_read(tmp_path: Any) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    view = Stored(FileSource(tmp_path / "f"), 0, "uint8", (100,))
    assert bytes(100) == read_all(view).tobytes()
    (tmp_path / "f").write_bytes(bytes(50))
    with pytest.raises(CorruptionError, match="ends at byte 50"):
        read_all(view)
    (tmp_path / "f").unlink()
    with pytest.raises(CorruptionError, match="cannot be read"):
        read_all(view)
