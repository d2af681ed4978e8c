"""The engine and the commands: interrupted and resumed, bounded in memory, refusing what is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.cli import convert as convert_command
from snapshotd.cli import diff as diff_command
from snapshotd.cli import verify as verify_command
from snapshotd.errors import CorruptionError, FormatError, UsageError
from snapshotd.universal import Settings, convert
from snapshotd.universal import open as open_checkpoint
from snapshotd.universal.compare import diff, verify
from snapshotd.universal.convert import parse_layout
from snapshotd.universal.readers import detect, read
from snapshotd.universal.sources import BytesSource
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.stream import JOURNAL
from snapshotd.universal.views import Stored, read_all
from snapshotd.universal.writers import universal as universal_writer
from snapshotd.universal.writers import writer_for

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SOURCE = FIXTURES / "dcp_fsdp2_w4" / "ckpt"


class Interrupt(Exception):
    pass


def stop_after(count: int) -> Any:
    """A progress that ends the run after some tensors, as a signal would."""
    lock = threading.Lock()
    left = [count]

    def progress(done: int, total: int) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupt

    return progress


@pytest.mark.parametrize("to", ["universal", "dcp", "torch", "hf"])
@pytest.mark.parametrize("count", [0, 1, 10, 20])
def test_interrupted_run_leaves_no_marker_and_goes_on(to: str, count: int, tmp_path: Path) -> None:
    """A job that is killed at 90 percent of 10 TB would begin anew, or leave a torn checkpoint that looks whole."""
    target = tmp_path / ("x.pt" if to == "torch" else "x")
    with pytest.raises(Interrupt):
        convert(SOURCE, target, to=to, settings=Settings(progress=stop_after(count), threads=2))
    markers = {"universal": "universal.json", "dcp": ".metadata", "torch": "x.pt", "hf": "config.json"}
    folder = tmp_path if to == "torch" else target
    assert not (folder / markers[to]).exists()
    with pytest.raises(UsageError, match="--resume"):
        convert(SOURCE, target, to=to)
    convert(SOURCE, target, to=to, settings=Settings(resume=True))
    convert(SOURCE, tmp_path / ("whole.pt" if to == "torch" else "whole"), to=to)
    assert diff(read(tmp_path / ("whole.pt" if to == "torch" else "whole")), read(target)) == []
    assert [entry for entry in folder.iterdir() if entry.name.endswith((".part", ".jsonl"))] == []


def test_resume_trusts_digests_and_not_the_journal(tmp_path: Path) -> None:
    """A machine that lost power has a journal, but not the bytes that it speaks of."""
    with pytest.raises(Interrupt):
        convert(SOURCE, tmp_path / "x", to="universal", settings=Settings(progress=stop_after(40), threads=1))
    for part in (tmp_path / "x").glob(".*.part"):
        size = part.stat().st_size
        part.write_bytes(bytes(size))
    convert(SOURCE, tmp_path / "x", to="universal", settings=Settings(resume=True))
    assert verify(tmp_path / "x").problems == []
    assert diff(read(SOURCE), read(tmp_path / "x")) == []


def test_resume_of_something_else_is_refused(tmp_path: Path) -> None:
    """Two conversions would be mixed in one directory."""
    with pytest.raises(Interrupt):
        convert(SOURCE, tmp_path / "x", to="universal", settings=Settings(progress=stop_after(3)))
    with pytest.raises(UsageError, match=f"an interrupted conversion of {SOURCE}, as it was then"):
        convert(FIXTURES / "dcp_fsdp2_w2" / "ckpt", tmp_path / "x", to="universal", settings=Settings(resume=True))
    with pytest.raises(FormatError, match="interrupted"):
        read(tmp_path / "x")


def test_full_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("mine")
    with pytest.raises(UsageError, match="precious"):
        convert(SOURCE, tmp_path / "x", to="universal")
    (tmp_path / "y.pt").write_text("mine")
    with pytest.raises(UsageError, match="y.pt"):
        convert(SOURCE, tmp_path / "y.pt", to="torch")
    assert (tmp_path / "y.pt").read_text() == "mine"


def test_source_that_breaks_midway_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = tmp_path / "c"
    shutil.copytree(SOURCE, source)
    state = read(source)
    file = source / "__3_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:70_000])
    options: dict[str, Any] = {"layout": {}}
    with pytest.raises(CorruptionError, match="__3_0"):
        writer_for("universal").write(state, tmp_path / "x", Settings(), identity="i", options=options)
    assert not (tmp_path / "x" / "universal.json").exists()


def test_large_files_are_sharded_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools that read shards of the usual size would choke."""
    monkeypatch.setattr(universal_writer, "SHARD_BYTES", 20_000)
    convert(SOURCE, tmp_path / "u", to="universal")
    files = sorted(path.name for path in (tmp_path / "u").glob("model*.safetensors"))
    assert len(files) > 2
    assert f"model-00001-of-{len(files):05d}.safetensors" == files[0]
    index = json.loads((tmp_path / "u" / "model.safetensors.index.json").read_text())
    assert set(files) == set(index["weight_map"].values())
    convert(tmp_path / "u", tmp_path / "hf", to="hf")
    assert [item for item in diff(read(SOURCE), read(tmp_path / "hf")) if item.kind in ("model", "buffer")] == []
    assert diff(read(SOURCE), read(tmp_path / "u")) == []


def test_thousands_of_files_need_few_descriptors(tmp_path: Path) -> None:
    """A world of 2,000 ranks has 2,000 files; a process may open 1,024."""
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from snapshotd.universal import convert\n"
        f"convert({str(SOURCE)!r}, {str(tmp_path / 'x')!r}, to='dcp', layout={{'dp': 500}})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    assert 500 == len(list((tmp_path / "x").glob("*.distcp")))
    assert [] == diff(read(SOURCE), read(tmp_path / "x"))


def test_dtype_and_only(tmp_path: Path) -> None:
    report = convert(SOURCE, tmp_path / "m", to="universal", only="model", dtype="bf16")
    assert {"model", "buffer"} == set(report.kinds)
    there = read(tmp_path / "m")
    assert {"bfloat16"} == {tensor.dtype for tensor in there.of_kind("model").values()}
    assert {"float32", "int64"} == {tensor.dtype for tensor in there.of_kind("buffer").values()}
    report = convert(SOURCE, tmp_path / "o", to="universal", only="optimizer")
    assert {"step", "exp_avg", "exp_avg_sq"} == set(report.kinds)
    assert read(SOURCE).param_groups == read(tmp_path / "o").param_groups


def test_strict_refuses_what_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exp_avg"):
        convert(SOURCE, tmp_path / "x", to="hf", strict=True)
    assert not (tmp_path / "x").exists()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = convert(SOURCE, tmp_path / "x", to="universal", dry_run=True)
    assert report.tensors == 91
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["dp", "dp=0", "xx=2", "dp=2,dp=3", "dp=-1", "dp=a"])
def test_layouts_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_layout(text)
    assert parse_layout("dp=2,tp=4") == {"dp": 2, "tp": 4}


def test_lazy_slices() -> None:
    """Somebody reads one row of a table of a terabyte."""
    checkpoint = open_checkpoint(SOURCE)
    whole = read_all(checkpoint.state.of_kind("model")["embed.weight"].view).view(np.float32)
    lazy = checkpoint["embed.weight"]
    assert lazy.shape == (97, 24)
    assert np.array_equal(whole[20:30, 3:], lazy[20:30, 3:])
    assert np.array_equal(whole[-1], lazy[-1])
    assert np.array_equal(whole, lazy[...])
    assert whole[5, 6] == lazy[5, 6]
    assert np.array_equal(whole[..., 2], lazy[..., 2])
    assert len(checkpoint.names("exp_avg")) == 21
    with pytest.raises(UsageError):
        checkpoint.tensor("nope")
    with pytest.raises(IndexError):
        lazy[97]


def test_a_number_stays_a_number() -> None:
    """A step of shape [1] is not what the optimizer had."""
    torch = pytest.importorskip("torch")
    lazy = open_checkpoint(SOURCE).tensor("tokens_seen", "buffer")
    assert () == lazy.shape == lazy[...].shape == tuple(lazy.torch().shape)
    assert torch.int64 == lazy.torch().dtype


def run_command(command: Any, *words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.configure(parser)
    return int(command.run(parser.parse_args(list(words))))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "u"
    assert run_command(convert_command, str(SOURCE), str(target), "--to", "universal", "--json") == 0
    assert json.loads(capsys.readouterr().out)["source_format"] == "dcp"
    assert run_command(verify_command, str(target)) == 0
    assert "91 digests match" in capsys.readouterr().out
    assert run_command(diff_command, str(SOURCE), str(target)) == 0
    assert run_command(diff_command, str(target), str(FIXTURES / "dcp_fsdp2_w2" / "ckpt"), "--json") == 1
    capsys.readouterr()


def test_verify_finds_one_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rot that nobody sees goes into the next run."""
    target = tmp_path / "u"
    convert(SOURCE, target, to="universal")
    file = target / "optimizer.exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert run_command(verify_command, str(target)) == 7
    captured = capsys.readouterr()
    assert "exp_avg of" in captured.err
    assert "digest" in captured.err
    found = diff(read(SOURCE), read(target))
    assert [item.what for item in found] == ["bytes"]
    assert found[0].elements == 1


def test_broken_universal_directories(tmp_path: Path) -> None:
    target = tmp_path / "u"
    convert(SOURCE, target, to="universal")
    marker = target / "universal.json"
    text = marker.read_text()
    good = json.loads(text)

    def expect(match: str, **changed: Any) -> None:
        marker.write_text(json.dumps({**good, **changed}))
        with pytest.raises(FormatError, match=match):
            read(target).check()

    expect("version 2", version=2)
    expect("not a snapshotd-universal", format="other")
    expect("step", step=-1)
    first = good["tensors"][0]
    expect("not the name of a safetensors file", tensors=[{**first, "file": "../x.safetensors"}])
    expect("lacks", tensors=[{**first, "key": "nope"}])
    expect("missing", tensors=[{**first, "file": "nope.safetensors"}])
    expect("says", tensors=[{**first, "shape": [3]}])
    expect("twice", tensors=[first, first])
    expect("unknown dtype", tensors=[{**first, "dtype": "float7"}])
    expect("tied", tied={"a": "nobody"})
    marker.write_text(text[: len(text) // 2])
    with pytest.raises(FormatError):
        read(target)
    marker.write_text(text)
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(FormatError, match="cut short"):
        read(target)


def test_hugging_face_folders_that_are_broken(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(FIXTURES / "hf_llama_sharded" / "ckpt", source)
    file = source / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(FormatError, match="model-00002-of-00003.safetensors is missing"):
        read(source)
    file.write_bytes(data[:-1])
    with pytest.raises(FormatError, match="cut short"):
        read(source)
    for header in (b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (3).to_bytes(8, "little") + b"[1]"):
        file.write_bytes(header + data[8:] if len(header) == 8 else header)
        with pytest.raises(FormatError, match="model-00002"):
            read(source)


def test_weights_that_are_tied_by_the_config(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"model.embed_tokens.weight": np.ones((3, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    state = read(tmp_path)
    assert state.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_unknown_things_are_said_to_be_unknown(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="not a checkpoint"):
        detect(tmp_path / "x")
    with pytest.raises(UsageError, match="does not exist"):
        detect(tmp_path / "y")
    with pytest.raises(UsageError, match="unknown format"):
        read(tmp_path / "x", "keras")


def test_steps_and_scalars_round_trip(tmp_path: Path) -> None:
    """A step that was an int must not come back as a tensor, nor the other way round."""
    weight = Stored(BytesSource(bytes(16)), 0, "float32", (4,))
    tensors = [Tensor("model", "w", weight), Tensor("step", "w", scalar(7, "int64")), Tensor("fp32", "w", weight)]
    generator = Stored(BytesSource(bytes(16)), 0, "uint8", (16,))
    tensors += [Tensor("exp_avg", "w", weight), Tensor("rng", "0/cuda:1", generator), Tensor("rng", "0", generator)]
    extra = {"a": [1, {"$float": "nan"}, {"$bytes": "YWI="}], "s": {"$set": [1, 2]}, "k": {"$items": [[3, "x"]]}}
    state = State(
        format="x",
        tensors=tensors,
        step=9,
        param_groups=[{"names": ["w"], "lr": 0.1, "betas": [0.9, 0.99], "fused": None}],
        tied={"alias": "w"},
        frozen=[],
        extra=extra,
    )
    for to in ("universal", "torch", "dcp"):
        target = tmp_path / (f"{to}.pt" if to == "torch" else to)
        writer_for(to).write(state, target, Settings(), identity="i", options={"layout": {"dp": 2}})
        back = read(target)
        back.check()
        assert diff(state, back) == [], to
    assert not (tmp_path / "universal" / JOURNAL).exists()
