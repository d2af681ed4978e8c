"""
Tagged JSON must give back exactly what went in, or refuse with the path of the culprit.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snapshotd_client import CannotExpress, register_codec
from snapshotd_client.codec import decode, dumps, encode


def back(value):
    return decode(json.loads(dumps(encode(value, "v"))))


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, io.BytesIO):
        return a.getvalue() == b.getvalue()
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        10**30,
        -(16**5000),
        0.1,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-320,
        "",
        "ü\u2028\x00",
    ),
    *(b"", b"\x00\xff", bytearray(b"x"), complex(1, -0.0), complex(math.inf, 2), range(3, 9, 2), slice(1, None, 2)),
    *((), (1,), ((), [()]), [], [[]], {}, {"a": {}}, {"$": "tuple", "v": []}, {1: "a", (2, 3): {None: 4.5}, 0.5: 0}),
    *({1, "a", (2,)}, set(), frozenset({1.5}), OrderedDict([("b", 1), ("a", 2)]), Counter("hello")),
    *(defaultdict(list, {"x": [1]}), defaultdict(None, {2: 3}), deque([1, 2], 5), deque([])),
    *(torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), np.dtype("<u2")),
    *(
        np.float32(1.5),
        np.int64(-3),
        np.bool_(True),
        np.float64("nan").view(),
        np.uint8(200),
        np.datetime64("2020-01-01"),
    ),
    *(
        torch.arange(5),
        torch.randn(2, 3).t(),
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(0, 4, dtype=torch.bool),
    ),
    *(torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.tensor([1 + 2j])),
    *(
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.array(["ab", "c"]),
        np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
    ),
    *(io.BytesIO(b"123"), PurePosixPath("a/b")),
]


@pytest.mark.parametrize("index", range(len(VALUES)))
def test_exact_round_trip(index):
    value = VALUES[index]
    if isinstance(value, np.float64) and value != value:
        assert np.isnan(back(value))
        return
    assert same(value, back(value)), (value, back(value))


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers() | st.just("$"), inner)
    ),
    max_leaves=20,
)


@given(JSONISH)
def test_exact_round_trip_of_anything_nested(value):
    assert same(value, back(value))


class Own:
    def __init__(self, x):
        self.x = x


Point = namedtuple("Point", "x y")
loop: list = []
loop.append(loop)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": Own(1)}]}, "state.a[1].b"),
        ({"f": print}, "state.f"),
        ({Own(1): 2}, "state.<key"),
        ([Point(1, 2)], "state[0]"),
        ({"s": torch.eye(2).to_sparse()}, "state.s"),
        ({"o": np.array([Own(1)], dtype=object)}, "state.o"),
        ({"d": defaultdict(lambda: 1)}, "state.d"),
        ({"m": torch.empty(3, device="meta")}, "state.m"),
        ({"l": loop}, "state.l"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_path(value, path):
    """Breaks: a value comes back as something else, or nobody knows which one it was."""
    with pytest.raises(CannotExpress, match="register_codec") as caught:
        encode(value, "state")
    assert path in str(caught.value)


def test_registered_types_travel():
    register_codec(Own, lambda own: {"x": own.x}, lambda data: Own(data["x"]))
    again = back({"own": [Own((1, 2))]})
    assert again["own"][0].x == (1, 2)
    with pytest.raises(TypeError, match="needs a type"):
        register_codec("Own", print, print)


@pytest.mark.parametrize(
    "data", [{"$": "eval", "v": "1"}, {"$": "user", "t": "os.system", "v": "true"}, {"$": "leaf", "n": "x"}]
)
def test_foreign_json_calls_nothing(data):
    """Breaks: a snapshot that somebody has written by hand runs code."""
    with pytest.raises(ValueError, match="unknown tag|no codec|none can be"):
        decode(data)
