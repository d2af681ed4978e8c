"""`snapshotd inspect`: what is there, or clearly why it is nothing."""

from __future__ import annotations

import json
import shutil
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
        ("empty", 2, "not a checkpoint that snapshotd knows"),
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


FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.mark.parametrize(
    ("place", "expected", "layout", "reader"),
    [
        ("dcp_fsdp2_w4/ckpt", ("dcp", 4, True), {"files": 4}, "torch.distributed.checkpoint"),
        ("ds_z3_bf16_w2/ckpt", ("deepspeed", 4, True), {"topology": {"dp": 2, "tp": 1, "pp": 1}}, "DeepSpeed"),
        ("ds_universal_from_z2_bf16/ckpt", ("deepspeed", 4, True), {}, "DeepSpeed with load_universal"),
        ("megatron_tp2_pp2/ckpt", ("megatron", 4, True), {}, "Megatron-LM"),
        ("megatron_dist_tp2_pp2/ckpt", ("megatron", 4, True), {}, "Megatron-LM"),
        ("hf_llama_sharded/ckpt", ("hf", None, True), {"files": 3}, "transformers"),
        ("torch_save_plain/checkpoint.pt", ("torch", 4, True), {"files": 1}, "torch.load"),
    ],
)
def test_checkpoints_of_all_formats_are_described(
    place: str, expected: object, layout: dict[str, object], reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody finds a folder from a year ago, and wants to know what it is and who can read it."""
    assert 0 == main(["inspect", str(FIXTURES / place), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert expected == (found["format"], found["step"], found["complete"])
    assert layout.items() <= found["layout"].items()
    assert reader in found["readable_by"]
    assert found["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"])
    assert found["kinds"]["model"] == sum(tensor["kind"] == "model" for tensor in found["tensors"])
    assert 0 == main(["inspect", str(FIXTURES / place)])
    text = capsys.readouterr().out
    assert f"format: {found['format']}" in text
    assert "complete: True" in text


def test_a_checkpoint_that_is_not_whole_is_described_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversion of days would end in the middle, or worse, not."""
    shutil.copytree(FIXTURES / "dcp_fsdp2_w4" / "ckpt", tmp_path / "c")
    file = tmp_path / "c" / "__2_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-5000])
    assert 7 == main(["inspect", str(tmp_path / "c"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ("dcp", False) == (found["format"], found["complete"])
    assert "__2_0.distcp" in found["problem"]
    file.unlink()
    assert 7 == main(["inspect", str(tmp_path / "c")])
    assert "__2_0.distcp" in capsys.readouterr().out
    (tmp_path / "c" / ".metadata").unlink()
    assert 7 == main(["inspect", str(tmp_path / "c")])
    assert ".metadata is missing" in capsys.readouterr().out


def test_inspect_reads_every_byte_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["convert", str(FIXTURES / "dcp_fsdp2_w2" / "ckpt"), str(tmp_path / "u"), "--to", "universal"])
    capsys.readouterr()
    assert 0 == main(["inspect", str(tmp_path / "u"), "--verify", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == found["verified_bytes"]
    file = tmp_path / "u" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert 7 == main(["inspect", str(tmp_path / "u"), "--verify"])
    assert "digest" in capsys.readouterr().out


def test_a_path_that_cannot_be_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["inspect", str(tmp_path / ("a" * 300))])
    assert "cannot be read: File name too long" in capsys.readouterr().err
