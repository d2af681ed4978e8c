"""Slot files are safetensors files: the safetensors package itself opens them and finds our bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from snapshotd.layout import DTYPES, Box, Layout, TensorBox

NUMPY = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "complex64",
]  # fmt: skip


def tensor(name: str, dtype: str, shape: tuple[int, ...], box: Box | None = None) -> TensorBox:
    return TensorBox(
        name=name, dtype=dtype, global_shape=shape, box=box or Box.whole(shape), scope="global", kind="param"
    )


def filled(layout: Layout, seed: int = 0) -> bytes:
    """A slot file with random bytes in each shard (0 and 1 for bool) and JSON in the meta room."""
    data = bytearray(layout.header) + bytearray(layout.file_bytes - layout.data_begin)
    generator = np.random.default_rng(seed)
    for shard in layout.shards:
        limit = 2 if shard.tensor.dtype == "bool" else 256
        data[shard.begin : shard.end] = generator.integers(0, limit, shard.nbytes, dtype=np.uint8).tobytes()
    begin, end = layout.meta
    data[begin:end] = b'{"step":7}'.ljust(end - begin)
    return bytes(data)


def boxes(dtypes: list[str]) -> list[TensorBox]:
    found = []
    for dtype in dtypes:
        found += [
            tensor(f"{dtype}.scalar", dtype, ()),
            tensor(f"{dtype}.matrix", dtype, (3, 5)),
            tensor(f"{dtype}.empty", dtype, (0, 4)),
            tensor(f"{dtype}.part", dtype, (8, 3), Box((2, 1), (5, 2))),
        ]
    return found


def test_numpy_reads_each_type_that_it_knows(tmp_path: Path) -> None:
    """Persisting is a plain copy, because any tool can read the copy."""
    layout = Layout.build(boxes(NUMPY), meta_capacity=64)
    data = filled(layout)
    loaded = safetensors.numpy.load(data)
    assert set(loaded) == {shard.key for shard in layout.shards} | {"__meta__"}
    for shard in layout.shards:
        array = loaded[shard.key]
        assert array.dtype == np.dtype(shard.tensor.dtype)
        assert array.shape == shard.tensor.box.lengths
        assert array.tobytes() == data[shard.begin : shard.end]
    path = tmp_path / "slot.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(str(path), framework="np") as opened:
        assert opened.metadata()["format"] == "pt"
        assert opened.get_tensor("__meta__").tobytes().rstrip() == b'{"step":7}'
        key = "float32.part@2,1"
        (shard,) = (shard for shard in layout.shards if shard.key == key)
        assert opened.get_tensor(key).tobytes() == data[shard.begin : shard.end]


def test_every_type_of_the_table_is_accepted() -> None:
    """Also those that numpy has no name for: one of them must not make the whole file unreadable."""
    layout = Layout.build(boxes(sorted(DTYPES)), meta_capacity=64)
    data = filled(layout)
    entries = dict(safetensors.deserialize(data))
    assert set(entries) == {shard.key for shard in layout.shards} | {"__meta__"}
    for shard in layout.shards:
        assert bytes(entries[shard.key]["data"]) == data[shard.begin : shard.end]


def test_torch_gets_the_true_types(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layout = Layout.build(boxes(sorted(DTYPES)), meta_capacity=64)
    path = tmp_path / "slot.safetensors"
    path.write_bytes(filled(layout))
    with safetensors.safe_open(str(path), framework="pt") as opened:
        for shard in layout.shards:
            dtype = DTYPES[shard.tensor.dtype]
            loaded = opened.get_tensor(shard.key)
            assert loaded.dtype == (getattr(torch, dtype.name) if dtype.native else torch.uint8)
            assert loaded.nbytes == shard.nbytes


def test_files_that_safetensors_wrote_are_no_slot_files() -> None:
    """We do not guess what a foreign file means; the converters read those."""
    data = safetensors.numpy.save({"w": np.zeros((3, 4), np.float32)})
    with pytest.raises(Exception, match="header") as caught:
        Layout.parse(data)
    assert type(caught.value).__name__ == "FormatError"
