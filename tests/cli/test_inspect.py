"""`snapshotd inspect`: what is there, or clearly why it is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from snapshotd.cli import main
from snapshotd.layout import Box, Layout, TensorBox


def slot_file(path: Path) -> Layout:
    value = np.arange(12, dtype=np.float32)
    box = TensorBox(
        name="model.w", dtype="float32", global_shape=(12,), box=Box.whole((12,)), scope="global", kind="param"
    )
    layout = Layout.build([box], meta_capacity=64)
    data = bytearray(layout.file_bytes)
    data[: len(layout.header)] = layout.header
    (shard,) = layout.shards
    data[shard.begin : shard.end] = value.tobytes()
    data[layout.meta[0] : layout.meta[1]] = json.dumps({"step": 7}).encode().ljust(64)
    path.write_bytes(data)
    return layout


def test_a_slot_file_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = slot_file(tmp_path / "a.slot")
    assert 0 == main(["inspect", str(tmp_path / "a.slot"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ("slot", 7, layout.hash) == (found["kind"], found["step"], found["layout"])
    assert [("model.w", "float32", [12], 48)] == [
        (tensor["name"], tensor["dtype"], tensor["shape"], tensor["bytes"]) for tensor in found["tensors"]
    ]
    assert 0 == main(["inspect", str(tmp_path / "a.slot")])
    assert "model.w" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("cut.slot", 7, "its layout says"),
        ("short.slot", 7, "8 bytes of header length"),
        ("noise.slot", 7, "header"),
        ("nothing", 2, "does not exist"),
        ("empty", 2, "no snapshot that snapshotd knows"),
        ("unfinished", 7, "was not finished"),
    ],
)
def test_what_is_broken_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, words: str
) -> None:
    """Somebody who is told that half a snapshot is a snapshot deletes the last good one."""
    slot_file(tmp_path / "whole.slot")
    whole = (tmp_path / "whole.slot").read_bytes()
    (tmp_path / "cut.slot").write_bytes(whole[:-1])
    (tmp_path / "short.slot").write_bytes(whole[:5])
    (tmp_path / "noise.slot").write_bytes(b"\xff" * 9000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "rank-000000.safetensors").write_bytes(whole)
    assert code == main(["inspect", str(tmp_path / name)])
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
