"""What a stranger does at the command line: broken, odd and hostile input. One clear message, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotd import cli
from snapshotd.errors import BudgetError, FormatError, UsageError
from snapshotd.universal import convert, stream
from snapshotd.universal.readers import read

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DCP = FIXTURES / "dcp_fsdp2_w2" / "ckpt"
HF = FIXTURES / "hf_llama_sharded" / "ckpt"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return call


def test_targets_that_cannot_be(run: Run, tmp_path: Path) -> None:
    """Each is there already, or is nothing that can be written into; what is there stays as it is."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("file", "is no directory"),
        ("dangling", "is a link to nowhere"),
        ("loop", "loop"),
        ("file/x", "file"),
        ("x" * 300, "name too long"),
    ):
        for to in ("universal", "dcp"):
            code, said = run("convert", DCP, tmp_path / name, "--to", to)
            assert (2, True) == (code, message in said), said
    assert before == sorted(tmp_path.iterdir())
    assert "mine" == (tmp_path / "file").read_text()


def test_sources_that_are_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source in ("/dev/null", tmp_path, tmp_path / "loop", tmp_path / ("x" * 300), __file__):
        for command in (("convert", source, tmp_path / "u", "--to", "dcp"), ("verify", source)):
            code, said = run(*command)
            assert (2, True) == (code, str(source)[:100] in said), said
    assert not (tmp_path / "u").exists()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that is full was called corrupt, or ended in a traceback; and nothing half-written has a final name."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "pwrite", full)
    with pytest.raises(BudgetError, match=r"cannot be written: No space left on device; --resume goes on"):
        convert(DCP, tmp_path / "u", to="universal")
    assert [] == [path.name for path in (tmp_path / "u").iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    convert(DCP, tmp_path / "u", to="universal", settings=stream.Settings(resume=True))
    monkeypatch.setattr(stream._Journal, "flush", full)
    with pytest.raises(BudgetError, match="No space left"):
        convert(DCP, tmp_path / "v", to="dcp")


@pytest.mark.parametrize(
    "extra",
    [
        {"$tensor": "nope"},
        {"$items": 5},
        {"$items": [[{"a": 1}, 2]]},
        {"$float": "zz"},
        {"$bytes": "###"},
        {"$set": [[1]]},
        {"$complex": ["1"]},
        {"$dtype": 5},
    ],
)
@pytest.mark.parametrize("place", ["extra", "param_groups"])
def test_marks_that_mean_nothing(extra: Any, place: str, run: Run, tmp_path: Path) -> None:
    """verify called it whole, and the conversion ended in a traceback."""
    convert(DCP, tmp_path / "u", to="universal")
    marker = tmp_path / "u" / "universal.json"
    values = json.loads(marker.read_text())
    (values["extra"] if place == "extra" else values["param_groups"][0])["odd"] = extra
    marker.write_text(json.dumps(values))
    for command in (("verify", tmp_path / "u"), ("convert", tmp_path / "u", tmp_path / "t", "--to", "dcp")):
        code, said = run(*command)
        assert (7, True) == (code, ": in extra or param_groups" in said), said
    assert not (tmp_path / "t").exists()


def test_an_index_that_is_gone(run: Run, tmp_path: Path) -> None:
    """The files count themselves, so all of the weights are known to be there, or which file is not."""
    shutil.copytree(HF, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    whole, found = read(HF).of_kind("model"), read(tmp_path / "hf").of_kind("model")
    assert {name: (t.dtype, t.shape) for name, t in whole.items()} == {n: (t.dtype, t.shape) for n, t in found.items()}
    assert (0, "") == run("convert", tmp_path / "hf", tmp_path / "u", "--to", "universal")
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    code, said = run("convert", tmp_path / "hf", tmp_path / "v", "--to", "universal")
    assert (7, True) == (code, "model-00002-of-00003.safetensors is missing" in said)


@pytest.mark.parametrize("file", ["exp_avg.pt", "exp_avg_sq.pt", "step.pt"])
def test_one_moment_of_one_parameter_is_missing(file: str, run: Run, tmp_path: Path) -> None:
    """DeepSpeed Universal is a file per state: without this one, training would go on with a moment of zero."""
    shutil.copytree(FIXTURES / "ds_universal_from_z2_bf16" / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "global_step4_universal" / "zero" / "layers.1.attn.qkv.weight" / file
    path.unlink()
    code, said = run("convert", tmp_path / "ckpt", tmp_path / "u", "--to", "universal")
    assert (7, True) == (code, f"{path} is missing" in said), said


def test_odd_tensors_and_names(run: Run, tmp_path: Path) -> None:
    """Empty ones, numbers, slashes, other scripts: they come back as they were."""
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.ones(i + 1)
        for i, name in enumerate(("a/b.weight", "../up", "层.0.权重", "e\u0301", "\u00e9", "a\nb", "x" * 5000))
    }
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(-0.0)}
    torch.save({"model": tensors}, tmp_path / "odd.pt")
    for to in ("universal", "dcp", "hf", "torch"):
        assert 0 == run("convert", tmp_path / "odd.pt", tmp_path / to, "--to", to)[0]
        assert (0, "") == run("diff", tmp_path / "odd.pt", tmp_path / to)
    assert ["dcp", "hf", "odd.pt", "torch", "universal"] == sorted(os.listdir(tmp_path))


def test_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a\ud800": torch.ones(1)}}, tmp_path / "odd.pt")
    code, said = run("convert", tmp_path / "odd.pt", tmp_path / "u", "--to", "universal")
    assert (7, True) == (code, r"'a\ud800' has a name that is no Unicode text" in said)


def test_a_kilobyte_that_would_fill_the_disk(tmp_path: Path) -> None:
    """One element that is repeated without end is a legal tensor of torch's."""
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.zeros(1).expand(1 << 40)}}, tmp_path / "bomb.pt")
    with pytest.raises(FormatError, match=r"repeats the 4 bytes of its storage until they are 4398046511104"):
        read(tmp_path / "bomb.pt")
    torch.save({"model": {"a": torch.arange(2.0).expand(3, 2)}}, tmp_path / "fine.pt")
    assert (3, 2) == read(tmp_path / "fine.pt").of_kind("model")["a"].shape


@pytest.mark.parametrize("to", ["universal", "dcp", "torch"])
@pytest.mark.parametrize("only", ["model", "optimizer"])
def test_a_part_can_be_read_again(to: str, only: str, run: Run, tmp_path: Path) -> None:
    """An optimizer that was converted alone was said to be broken: there was no model in it."""
    assert (0, "") == run("convert", DCP, tmp_path / "part", "--to", to, "--only", only)
    assert (0, "") == run("verify", tmp_path / "part")
    assert (0, "") == run("convert", tmp_path / "part", tmp_path / "again", "--to", "universal")
    whole, part = read(DCP), read(tmp_path / "again")
    kinds = {"model", "buffer"} if only == "model" else {"step", "exp_avg", "exp_avg_sq"}
    assert {t.key for t in whole.tensors if t.kind in kinds} == {t.key for t in part.tensors}
    assert (whole.param_groups if only == "optimizer" else []) == part.param_groups


@pytest.mark.parametrize(
    ("to", "layout", "message"),
    [
        ("dcp", "ep=2", "ep means nothing to DCP"),
        ("torch", "pp=2", "torch files hold whole tensors"),
        ("torch", "tp=2", "give --rules"),
        ("deepspeed", "tp=2", "DeepSpeed Universal has no layout"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(to: str, layout: str, message: str, run: Run, tmp_path: Path) -> None:
    for dry in ([], ["--dry-run"]):
        code, said = run("convert", DCP, tmp_path / "x", "--to", to, "--layout", layout, *dry)
        assert (2, True) == (code, message in said), said
        assert [] == os.listdir(tmp_path)


def test_a_dry_run_of_megatron_sees_layouts_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    source = FIXTURES / "megatron_tp2_pp2" / "ckpt"
    code, said = run("convert", source, tmp_path / "x", "--to", "megatron", "--layout", "pp=3", "--dry-run")
    assert (2, True) == (code, "4 layers cannot be on 3 pipeline stages" in said), said


@pytest.mark.parametrize("to", ["universal", "hf"])
def test_a_layout_where_there_is_none_is_said(to: str, run: Run, tmp_path: Path) -> None:
    code, said = run("convert", HF, tmp_path / "x", "--to", to, "--layout", "tp=2")
    assert (0, True) == (code, f"warning: --layout means nothing to {to}" in said), said


def test_hyperparameters_that_are_no_numbers_come_back_from_deepspeed(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float("inf"))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    assert 0 == run("convert", tmp_path / "x.pt", tmp_path / "ds", "--to", "deepspeed")[0]
    assert [{"$float": "inf"}] == [group["lr"] for group in read(tmp_path / "ds").param_groups]


@pytest.mark.parametrize(
    "options",
    [
        *(["--to", to] for to in ("universal", "dcp", "torch", "deepspeed", "hf")),
        ["--to", "universal", "--dtype", "bf16"],
        ["--to", "dcp", "--layout", "dp=2"],
    ],
    ids=" ".join,
)
def test_what_rotted_is_not_converted(options: list[str], run: Run, tmp_path: Path) -> None:
    """The marker's digests tell; a conversion reads every byte anyway, and its own digests would hide the rot."""
    convert(DCP, tmp_path / "u", to="universal")
    file = tmp_path / "u" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, said = run("convert", tmp_path / "u", tmp_path / "d", *options)
    assert (7, True) == (code, "model.safetensors" in said and "has the digest" in said), said
    with pytest.raises((FormatError, UsageError)):
        read(tmp_path / "d")
