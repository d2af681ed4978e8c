"""Layouts: the same boxes give the same bytes, and only such bytes are read back."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import FormatError, LayoutError
from snapshotd.layout import DTYPES, Box, Index, Layout, TensorBox, header_length


def part(
    name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> TensorBox:
    return TensorBox(
        name=name, dtype=dtype, global_shape=shape, box=Box(offsets, lengths), scope="global", kind="param"
    )


def whole(name: str, dtype: str, *shape: int) -> TensorBox:
    return part(name, dtype, shape, (0,) * len(shape), shape)


MIXED = [
    whole("flag", "bool", 3),
    part("w", "float32", (8, 5), (2, 0), (3, 5)),
    part("w", "float32", (8, 5), (6, 0), (1, 5)),
    whole("step", "int64"),
    whole("z", "complex128", 2, 3),
    whole("none", "bfloat16", 0, 7),
    part("b", "bfloat16", (9,), (9,), (0,)),
    whole("h", "float16", 5),
    whole('größe/ñ "quoted" \\', "uint8", 5),
    TensorBox(name="rng", dtype="uint8", global_shape=(7,), box=Box((0,), (7,)), scope="rank", kind="rng"),
]


def build(boxes: list[TensorBox] = MIXED) -> Layout:
    return Layout.build(boxes, meta_capacity=100, ties={"head": "w"}, attrs={"rank": "3"})


def test_shards_tile_the_file_and_are_aligned() -> None:
    """The capture writes through these offsets: a hole breaks safetensors, an overlap breaks the model."""
    layout = build()
    assert layout.data_begin == len(layout.header) == header_length(layout.header[:8])
    assert layout.data_begin % 4096 == 0
    end = layout.data_begin
    for shard in layout.shards:
        assert shard.begin == end
        assert shard.begin % shard.tensor.itemsize == 0
        assert shard.nbytes == shard.tensor.nbytes
        end = shard.end
    assert layout.meta == (end, end + 100)
    assert layout.file_bytes == end + 100
    assert [shard.key for shard in layout.shards] == [
        "none", "b@9", "z", "step", "w@2,0", "w@6,0", "h", "flag", 'größe/ñ "quoted" \\', "rng",
    ]  # fmt: skip
    assert {shard.key: shard.tensor for shard in layout.shards}["w@6,0"] == MIXED[2]


def test_tensors_of_whole_lines_begin_with_a_line() -> None:
    """Breaks: one scalar among large tensors, and all behind it are copied at two thirds of the speed."""
    boxes = [
        whole("0", "float32"),
        whole("1", "bfloat16", 96),
        whole("2", "float32", 3, 16),
        whole("3", "int64", 3),
        whole("4", "uint8", 64),
        whole("5", "bool", 7),
    ]
    layout = Layout.build(boxes, meta_capacity=10)
    assert [shard.key for shard in layout.shards] == ["2", "1", "4", "3", "0", "5"]
    assert all(shard.begin % 64 == 0 for shard in layout.shards[:3])
    assert Layout.parse(layout.header).shards == layout.shards


def test_tensors_are_found_by_name_and_those_alike_have_one_number() -> None:
    def box(name: str, begin: int, **changed: object) -> TensorBox:
        fields = {"dtype": "int32", "global_shape": (8, 2), "box": Box((begin, 0), (2, 2)), "scope": "global"}
        return TensorBox(name=name, kind="param", **{**fields, **changed})  # type: ignore[arg-type]

    def index(*boxes: TensorBox) -> Index:
        return Layout.build(boxes, meta_capacity=0).index

    private = box("d", 0, scope="rank")
    mine = index(box("a", 0), box("b", 2), box("a", 2), box("c", 0), private, box("e", 0, dtype="uint32"))
    assert {"a": (0, 2), "b": (1,), "c": (3,), "e": (5,)} == {
        name: places for (name, scope), places in mine.places.items() if scope == "global"
    }
    assert (4,) == mine.places["d", "rank"]
    assert (0, 1, 1, 0, 2, 3) == mine.likes
    assert mine.names == index(box("a", 6), box("b", 0), box("a", 0), box("c", 1), private, box("e", 3)).names
    others = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ()]
    assert len(others) == len({index(*(box(name, 0) for name in names)).names for names in others})
    assert index(box("a", 0)).names != index(box("a", 0, scope="rank")).names


def test_read_back_is_equal() -> None:
    layout = build()
    again = Layout.parse(memoryview(layout.header + b"the data follows"), file_bytes=layout.file_bytes)
    assert again == layout
    assert again.shards == layout.shards
    assert (again.hash, again.meta, again.file_bytes) == (layout.hash, layout.meta, layout.file_bytes)
    assert (dict(again.ties), dict(again.attrs)) == ({"head": "w"}, {"rank": "3"})
    assert again.index == layout.index


def test_hash_names_the_content() -> None:
    """Workers and daemons agree on a layout by its hash alone."""
    assert build().hash == build().hash
    assert build(MIXED[1:]).hash != build().hash
    assert build([*MIXED[1:], MIXED[0]]).hash == build([*MIXED[1:], MIXED[0]]).hash
    assert len(build().hash) == 32


def test_golden_header() -> None:
    """The format is on other people's disks: a change here needs a new version."""
    layout = Layout.build(
        [part("w", "float32", (4, 2), (2, 0), (2, 2)), whole("s", "int64")], meta_capacity=8, ties={"v": "w"}
    )
    boxes = (
        '{"s":{"fqn":"s","dtype":"int64","global_shape":[],"offsets":[],"scope":"global","kind":"param"},'
        '"w@2,0":{"fqn":"w","dtype":"float32","global_shape":[4,2],"offsets":[2,0],"scope":"global","kind":"param"}}'
    )
    metadata = {"format": "pt", "snapshotd.version": "1", "snapshotd.boxes": boxes, "snapshotd.ties": '{"v":"w"}'}
    expected = {
        "__metadata__": metadata,
        "s": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "w@2,0": {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]},
        "__meta__": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
    }
    text = json.dumps(expected, separators=(",", ":")).encode()
    assert layout.header == (4088).to_bytes(8, "little") + text.ljust(4088)


def test_empty_layout() -> None:
    layout = Layout.build([], meta_capacity=0)
    assert Layout.parse(layout.header) == layout
    assert layout.file_bytes == layout.data_begin == 4096


@pytest.mark.timeout(60)
def test_ten_thousand_tensors_take_no_time_worth_noticing() -> None:
    """The hook builds it in the training process: what grows with the square of the tensors takes minutes."""
    boxes = [whole(f"model.layers.{i}.self_attn.q_proj.weight", "float32", 128, 64) for i in range(10_000)]
    layout = Layout.build(boxes, meta_capacity=4096)
    assert len(layout.shards) == 10_000
    assert Layout.parse(layout.header) == layout


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([MIXED[1], MIXED[1]], "w@2,0"),
        ([whole("w@0", "int8", 1), part("w", "int8", (2,), (0,), (1,))], "w@0"),
        ([whole("__meta__", "int8", 1)], "__meta__"),
        ([whole("__metadata__", "int8", 1)], "__metadata__"),
        ([whole("head", "int8", 1)], "alias"),
        ([part(f"w{i}", "uint8", (2**56,), (0,), (2**56,)) for i in range(17)], "above the limit"),
    ],
)
def test_impossible_layouts_are_refused(boxes: list[TensorBox], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        build(boxes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"meta_capacity": -1},
        {"meta_capacity": 2**31},
        {"meta_capacity": 1.0},
        {"meta_capacity": 1, "attrs": {"format": "np"}},
        {"meta_capacity": 1, "attrs": {"a": 1}},
        {"meta_capacity": 1, "attrs": {"a": "\ud800"}},
        {"meta_capacity": 1, "ties": {"a": 1}},
        {"meta_capacity": 1, "ties": {"a": "b", "b": "c"}},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        Layout.build([], **arguments)  # type: ignore[arg-type]


def test_duplicates_are_named_but_not_all() -> None:
    with pytest.raises(LayoutError, match="and 2 more"):
        build([whole(f"t{i}", "int8", 1) for i in range(12)] * 2)


# --- hostile bytes: either parse it, or FormatError, never any other error ---


def parses(data: bytes) -> bool:
    try:
        layout = Layout.parse(data)
    except FormatError:
        return False
    # What was accepted is whole: its shards tile the data area.
    end = layout.data_begin
    for shard in layout.shards:
        assert shard.begin == end
        assert shard.tensor.nbytes == shard.nbytes
        end = shard.end
    assert (end, layout.file_bytes) == layout.meta
    return True


def reencoded(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    text = text.ljust(len(text) + -(8 + len(text)) % 4096)
    return len(text).to_bytes(8, "little") + text


def test_truncated_headers_are_refused() -> None:
    header = build().header
    for length in [*range(20), len(header) // 2, len(header) - 1]:
        assert not parses(header[:length])
    with pytest.raises(FormatError):
        header_length(b"1234567")
    with pytest.raises(FormatError):
        Layout.parse(header, file_bytes=build().file_bytes - 1)
    with pytest.raises(FormatError):
        Layout.parse(header, file_bytes=10)


def test_huge_length_is_refused_before_it_is_believed() -> None:
    for length in (2**28 + 4088, 2**63, 2**64 - 8, 0, 1, 4089):
        with pytest.raises(FormatError):
            header_length(length.to_bytes(8, "little"))


def test_every_bit_flip_in_a_header_parses_or_is_refused() -> None:
    """Bits rot in memory too; a reader that dies of it takes the good snapshots with it."""
    header = Layout.build([MIXED[1], MIXED[3]], meta_capacity=8, ties={"head": "w"}).header
    used = len(header.rstrip())
    assert parses(header)
    for at in range(used):
        for bit in range(8):
            changed = bytearray(header)
            changed[at] ^= 1 << bit
            parses(bytes(changed))


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_damage_parses_or_is_refused(random_: random.Random) -> None:
    header = bytearray(build().header)
    used = len(header.rstrip())
    for _ in range(random_.randint(1, 4)):
        at, size = random_.randrange(used), random_.randint(0, 8)
        match random_.randrange(4):
            case 0:
                header[at : at + size] = random_.randbytes(size)
            case 1:
                header[at : at + size] = b""
            case 2:
                source = random_.randrange(used)
                header[at:at] = header[source : source + size * 8]
            case 3:
                header[at : at + 1] = random_.choice([b'"', b"{", b"}", b"[", b"]", b",", b"0", b"9", b"-", b"e", b"."])
    header[:8] = (len(header) - 8).to_bytes(8, "little")
    parses(bytes(header[: 8 + (len(header) - 8)]).ljust(len(header) + -len(header) % 4096))
    padded = bytes(header).ljust(len(header) + -len(header) % 4096)
    parses((len(padded) - 8).to_bytes(8, "little") + padded[8:])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["F32", "float32", "pt", "1", "global", "rank"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "fqn", "__metadata__", "w"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_anywhere_parses_or_is_refused(data: st.DataObject) -> None:
    """The bytes are well-formed JSON here, so that the damage reaches the checks behind the JSON reader."""
    entries = json.loads(build().header[8:])
    inner = {key: json.loads(entries["__metadata__"][key]) for key in ("snapshotd.boxes", "snapshotd.ties")}
    root: dict[str, object] = {"outer": entries, "inner": inner}
    here: object = root
    for _ in range(data.draw(st.integers(1, 5))):
        if isinstance(here, dict) and here:
            key: object = data.draw(st.sampled_from(sorted(here)))
        elif isinstance(here, list) and here:
            key = data.draw(st.integers(0, len(here) - 1))
        else:
            break
        container, here = here, here[key]  # type: ignore[index]
    container[key] = data.draw(json_values)  # type: ignore[index]
    outer = root["outer"]
    if isinstance(outer, dict) and isinstance(outer.get("__metadata__"), dict) and isinstance(root["inner"], dict):
        for name, value in root["inner"].items():
            outer["__metadata__"].setdefault(name, "")
            outer["__metadata__"][name] = json.dumps(value)
    parses(reencoded(outer))


def changed_entries(**changes: object) -> bytes:
    """A good header but for the values at the given paths; ``boxes__`` goes into the JSON inside the JSON."""
    entries = json.loads(Layout.build([whole("a", "int16", 3)], meta_capacity=8).header[8:])
    boxes = json.loads(entries["__metadata__"]["snapshotd.boxes"])
    for path, value in changes.items():
        first, last = path.rsplit("__", 1)
        here = boxes[first.removeprefix("boxes__")] if first.startswith("boxes__") else entries.setdefault(first, {})
        here[last] = value
    entries["__metadata__"]["snapshotd.boxes"] = json.dumps(boxes)
    return reencoded(entries)


def test_the_unchanged_entries_are_good() -> None:
    """Else the tests below would pass for the wrong reason."""
    assert parses(changed_entries())


@pytest.mark.parametrize(
    "data",
    [
        changed_entries(a__data_offsets=[0, 5]),
        changed_entries(a__data_offsets=[1, 7]),
        changed_entries(a__data_offsets=[6, 0]),
        changed_entries(a__data_offsets=[0, 2**70]),
        changed_entries(a__shape=[2]),
        changed_entries(a__shape=[3.0]),
        changed_entries(a__shape=[True, 3]),
        changed_entries(a__shape=[-3]),
        changed_entries(a__shape=[1] * 100),
        changed_entries(a__dtype="F16"),
        changed_entries(a__dtype=["I16"]),
        changed_entries(a__extra=1),
        changed_entries(a__data_offsets=[False, 6]),
        # Each of these is consistent with all but one of the checks.
        changed_entries(a__data_offsets=[1, 7], __meta____data_offsets=[7, 15]),
        changed_entries(__meta____data_offsets=[7, 15]),
        changed_entries(boxes__a__global_shape=[2], a__shape=[2]),
        changed_entries(boxes__a__fqn="b"),
        changed_entries(boxes__a__dtype="float16"),
        changed_entries(boxes__a__global_shape=[4]),
        changed_entries(boxes__a__offsets=[1]),
        changed_entries(boxes__a__offsets=[]),
        changed_entries(boxes__a__kind=[]),
        changed_entries(boxes__a__scope={}),
        changed_entries(boxes__a__fqn=1),
        changed_entries().replace(b'"format": "pt", ', b'"format": "pt", "format": "pt", ').replace(b" " * 16, b"", 1),
        changed_entries(b__dtype="U8", b__shape=[0], b__data_offsets=[6, 6]),
        reencoded({}),
        reencoded([]),
        reencoded({"__metadata__": {"format": "pt"}}),
        reencoded({"__metadata__": {"format": "pt", "snapshotd.version": "2"}}),
        (4088).to_bytes(8, "little") + b"[" * 4088,
        (81912).to_bytes(8, "little") + b'{"a":' * 16382 + b"  ",
        (81912).to_bytes(8, "little") + (b'{"a":' + b"[" * 81900).ljust(81912),
        (4088).to_bytes(8, "little") + b"{\xff".ljust(4088),
        (4088).to_bytes(8, "little") + b" {}".ljust(4088),
        (8184).to_bytes(8, "little") + (b'{"a":' + b"9" * 8000 + b"}").ljust(8184),
        (4088).to_bytes(8, "little") + b'{"a":1,"a":1}'.ljust(4088),
        (4088).to_bytes(8, "little") + b'{"__metadata__":{"a":"\\ud800"}}'.ljust(4088),
        (4088).to_bytes(8, "little") + b'{"__metadata__":{"a":NaN}}'.ljust(4088),
    ],
)
def test_known_tricks_are_refused(data: bytes) -> None:
    assert not parses(data)


def two_alike(**changes: object) -> bytes:
    """Two tensors that are described with the same words, but for what is changed in the second."""
    boxes = [part(name, "int16", (4, 1), (1, 0), (1, 1)) for name in ("a", "b")]
    entries = json.loads(Layout.build(boxes, meta_capacity=8).header[8:])
    described = json.loads(entries["__metadata__"]["snapshotd.boxes"])
    described["b@1,0"].update(changes)
    entries["__metadata__"]["snapshotd.boxes"] = json.dumps(described)
    return reencoded(entries)


def test_a_tensor_like_one_before_is_checked_as_well() -> None:
    """Python takes 1, 1.0 and true for the same; nor does a good description vouch for another's name."""
    assert parses(two_alike())
    for changes in (
        {"offsets": [True, 0]},
        {"offsets": [1.0, 0]},
        {"offsets": [1, False]},
        {"offsets": [2, 0]},
        {"global_shape": [4, True]},
        {"global_shape": [5.0, 1]},
        {"global_shape": [1, 1]},
        {"dtype": "float16"},
        {"dtype": ["int16"]},
        {"scope": ["global"]},
        {"scope": "everywhere"},
        {"kind": None},
        {"kind": {}},
        {"fqn": "a"},
        {"fqn": 1},
        {"fqn": ""},
        {"fqn": None},
    ):
        assert not parses(two_alike(**changes)), changes


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensor_boxes(draw: st.DrawFn) -> TensorBox:
    shape = draw(shapes)
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    lengths = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return TensorBox(
        name=draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        global_shape=shape,
        box=Box(offsets, lengths),
        scope=draw(st.sampled_from(["global", "rank"])),
        kind=draw(st.sampled_from(["param", "optim", "x"])),
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(tensor_boxes(), max_size=8), st.integers(0, 300))
def test_whatever_can_be_built_is_read_back(boxes: list[TensorBox], meta_capacity: int) -> None:
    try:
        layout = Layout.build(boxes, meta_capacity=meta_capacity)
    except LayoutError as error:
        assert "more than once" in str(error)
        return
    again = Layout.parse(layout.header, file_bytes=layout.file_bytes)
    assert again.shards == layout.shards
    assert sorted(map(repr, (shard.tensor for shard in layout.shards))) == sorted(map(repr, boxes))
