"""Conversions that are killed midway, for real, and go on: the same files in the end, and nothing done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.cli import main
from snapshotd.universal import convert
from snapshotd.universal.compare import verify

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SOURCES = {"megatron": FIXTURES / "megatron_tp2_pp2" / "ckpt"}
SOURCE = FIXTURES / "ds_z2_bf16_w2" / "ckpt"

CHILD = """
import sys
from snapshotd.universal import Settings, convert
source, target, to, percent = sys.argv[1:]

def progress(done, total):
    if done * 100 >= total * int(percent):
        print("now", flush=True)
        sys.stdin.read()  # until the end comes from outside

convert(source, target, to=to, layout={"dp": 3} if to == "dcp" else {}, settings=Settings(progress=progress, threads=1))
"""


def killed_at(percent: int, source: Path, target: Path, to: str) -> None:
    """A conversion that SIGKILL ends when that much of it is done."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(target), to, str(percent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        assert "now\n" == child.stdout.readline()
        child.kill()
        assert -9 == child.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def identity_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of whatever has its final name."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("percent", [1, 50, 90, 100])
@pytest.mark.parametrize("to", ["universal", "dcp", "deepspeed", "megatron", "hf", "torch"])
def test_a_killed_conversion_goes_on_where_it_was(to: str, percent: int, tmp_path: Path) -> None:
    """The machine of a conversion of 10 TB is taken away after 9; the rest must be enough, and as good."""
    source = SOURCES.get(to, SOURCE)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    name = "x.pt" if to == "torch" else "x"
    layout = ["--layout", "dp=3"] if to == "dcp" else []
    undisturbed, killed = tmp_path / "a" / name, tmp_path / "b" / name
    assert 0 == main(["convert", str(source), str(undisturbed), "--to", to, *layout])
    killed_at(percent, source, killed, to)
    whole = contents(tmp_path / "a")
    finished = identity_of(tmp_path / "b")
    half_done = contents(tmp_path / "b")
    assert [] == [path for path in finished if half_done[path] != whole[path]]
    assert len(finished) < len(whole)
    with_resume = ["convert", str(source), str(killed), "--to", to, *layout]
    assert 2 == main(with_resume)
    assert 0 == main([*with_resume, "--resume"])
    assert whole == contents(tmp_path / "b")
    assert finished == {path: found for path, found in identity_of(tmp_path / "b").items() if path in finished}


def test_finished_files_are_read_and_not_written_again(tmp_path: Path) -> None:
    killed_at(90, SOURCE, tmp_path / "x", "universal")
    finished = identity_of(tmp_path / "x")
    assert {"model.safetensors", "fp32.safetensors"} < set(finished)
    convert_again(tmp_path / "x")
    assert finished.items() <= identity_of(tmp_path / "x").items()


def test_a_finished_file_that_rotted_is_mended(tmp_path: Path) -> None:
    """After a loss of power names may be there whose bytes are not."""
    assert 0 == main(["convert", str(SOURCE), str(tmp_path / "a"), "--to", "universal"])
    for at in (3, 100, -3):  # the header's length, the header, a tensor
        target = tmp_path / f"x{at}"
        killed_at(90, SOURCE, target, "universal")
        file = target / "fp32.safetensors"
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        convert_again(target)
        assert contents(tmp_path / "a") == contents(target)


def test_a_finished_file_that_lost_its_end_is_mended(tmp_path: Path) -> None:
    assert 0 == main(["convert", str(SOURCE), str(tmp_path / "a"), "--to", "universal"])
    killed_at(90, SOURCE, tmp_path / "x", "universal")
    file = tmp_path / "x" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    convert_again(tmp_path / "x")
    assert contents(tmp_path / "a") == contents(tmp_path / "x")
    assert [] == verify(tmp_path / "x").problems


def test_resume_with_other_options_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the tensors would be bfloat16."""
    killed_at(50, SOURCE, tmp_path / "x", "universal")
    words = ["convert", str(SOURCE), str(tmp_path / "x"), "--to", "universal", "--resume", "--dtype", "fp32"]
    assert 2 == main(words)
    assert "give the same ones" in capsys.readouterr().err
    journal = (tmp_path / "x" / ".snapshotd-convert.jsonl").read_text().splitlines()
    assert "identity" in json.loads(journal[0])


def convert_again(target: Path) -> None:
    from snapshotd.universal import Settings

    convert(SOURCE, target, to="universal", settings=Settings(resume=True))
