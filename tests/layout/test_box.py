"""Boxes: whoever has one may trust it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.errors import LayoutError
from snapshotd.layout import DTYPES, Box, TensorBox, dtype_of, stored_shape


def tensor(**changes: object) -> TensorBox:
    fields: dict[str, object] = {
        "name": "w",
        "dtype": "float32",
        "global_shape": (4, 6),
        "box": Box((0, 0), (4, 6)),
        "scope": "global",
        "kind": "param",
    }
    return TensorBox(**(fields | changes))  # type: ignore[arg-type]


def cells(box: Box) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = {()}
    for offset, length in zip(box.offsets, box.lengths, strict=True):
        found = {(*cell, i) for cell in found for i in range(offset, offset + length)}
    return found


def boxes(ndim: int) -> st.SearchStrategy[Box]:
    sizes = st.tuples(*[st.integers(0, 4)] * ndim)
    return st.builds(Box, sizes, sizes)


@given(st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n))))
def test_intersection_and_containment_are_those_of_sets(pair: tuple[Box, Box]) -> None:
    """The reshard planner copies intersections: one wrong bound writes one rank's weights over another's."""
    a, b = pair
    common = a.intersect(b)
    assert (cells(common) if common else set()) == cells(a) & cells(b)
    assert a.contains(b) == (cells(b) <= cells(a))
    assert a.numel == len(cells(a))
    assert a.is_empty == (not cells(a))


def test_scalar_and_empty() -> None:
    """Step counters are 0-d, uneven sharding leaves ranks with nothing: both are ordinary tensors."""
    scalar = tensor(global_shape=(), box=Box((), ()))
    assert (scalar.numel, scalar.nbytes, scalar.is_whole) == (1, 4, True)
    empty = tensor(box=Box((4, 0), (0, 6)))
    assert (empty.numel, empty.nbytes, empty.is_whole, empty.box.is_empty) == (0, 0, False, True)
    assert str(Box((1, 2), (3, 4))) == "[1:4, 2:6]"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "\ud800"},
        {"name": "x" * 5000},
        {"name": 3},
        {"dtype": "torch.float32"},
        {"dtype": None},
        {"global_shape": (4,)},
        {"global_shape": [4, 6]},
        {"global_shape": (4, 5)},
        {"global_shape": (4, -6)},
        {"global_shape": (4, 6.0)},
        {"global_shape": (4, True)},
        {"global_shape": (2**40, 2**40)},
        {"global_shape": (1,) * 33, "box": None},
        {"box": ((0, 0), (4, 6))},
        {"box": Box((1, 0), (4, 6))},
        {"box": Box((5, 0), (0, 6))},
        {"scope": "local"},
        {"scope": []},
        {"kind": ""},
        {"kind": "two words"},
        {"kind": "x" * 33},
        {"kind": "param\n"},
        {"kind": None},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    """What gets past here is trusted by offset arithmetic on mapped memory."""
    with pytest.raises(LayoutError):
        tensor(**changes)


@pytest.mark.parametrize("args", [((0,), (1, 2)), ((-1,), (1,)), ((0,), (2**57,)), ([0], [1]), ((False,), (1,))])
def test_box_nonsense_is_refused(args: tuple[object, object]) -> None:
    with pytest.raises(LayoutError):
        Box(*args)  # type: ignore[arg-type]


def test_boxes_of_different_dimensions() -> None:
    assert not Box((0,), (1,)).contains(Box((), ()))
    with pytest.raises(LayoutError, match="1-d box with a 0-d"):
        Box((0,), (1,)).intersect(Box((), ()))


def test_dtype_table() -> None:
    """An item size that differs from torch's shifts each tensor behind it."""
    torch = pytest.importorskip("torch")
    for name, dtype in DTYPES.items():
        if hasattr(torch, name):
            assert getattr(torch, name).itemsize == dtype.itemsize, name
    assert "float4_e2m1fn_x2" in DTYPES
    with pytest.raises(LayoutError, match="unknown dtype 'float33'"):
        dtype_of("float33")


def test_types_without_a_tag_are_stored_as_bytes() -> None:
    assert stored_shape(dtype_of("complex128"), (2, 3)) == (2, 48)
    assert stored_shape(dtype_of("complex128"), ()) == (16,)
    assert stored_shape(dtype_of("float32"), (2, 3)) == (2, 3)
