"""`snapshotd verify` on files of torch.save: a bit that flipped in one of their records is found and named."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from snapshotd.cli import main
from snapshotd.errors import CorruptionError
from snapshotd.universal import Settings
from snapshotd.universal import open as open_checkpoint
from snapshotd.universal.compare import verify
from snapshotd.universal.readers import read

torch = pytest.importorskip("torch")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def flip(file: Path, at: int, bit: int = 1) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ bit]))


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Begin and bytes of each record, as Python's own reader of zips finds them."""
    found = {}
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            at = info.header_offset
            found[info.filename] = (at + 30 + sum(struct.unpack_from("<HH", data, at + 26)), info.file_size)
    return found


def training_state() -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}


def run(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> tuple[int, str, str]:
    code = main(["verify", str(path), *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/3"])
def test_a_flipped_bit_in_a_file_of_torch_save_is_named(
    record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rot that nobody sees goes into the conversion, whose new digests hide it."""
    file = tmp_path / "c.pt"
    torch.save(training_state(), file)
    records = places(file)
    code, out, _ = run(capsys, file)
    assert 0 == code
    assert f"{sum(nbytes > 0 for _, nbytes in records.values())} records match their CRC-32s\n" in out
    begin, nbytes = records[f"c/{record}"]
    flip(file, file.read_bytes().index(b"betas") if record == "data.pkl" else begin + nbytes // 2, 4)
    code, out, err = run(capsys, file)
    assert 7 == code
    assert "broken" in out
    assert f"{file}: the record c/{record} at [{begin}, {begin + nbytes}) has the CRC-32" in err
    assert 7 == main(["inspect", str(file), "--verify"])
    assert f"the record c/{record}" in capsys.readouterr().out


def test_no_flipped_bit_of_any_record_passes(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save(training_state(), file)
    whole = file.read_bytes()
    chance = random.Random(11)
    for begin, nbytes in places(file).values():
        for at in chance.sample(range(begin, begin + nbytes), min(nbytes, 12)):
            flip(file, at, 1 << chance.randrange(8))
            with contextlib.suppress(CorruptionError):  # the structure cannot be read any more
                assert verify(file).problems
            file.write_bytes(whole)
    assert [] == verify(file).problems


@pytest.mark.parametrize("name", ["dcp_fsdp2_w2", "megatron_dist_tp2_pp2"])
def test_a_flipped_bit_in_a_dcp_file_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .distcp file has an archive for each item; the bit is in one of hundreds."""
    shutil.copytree(FIXTURES / name / "ckpt", tmp_path / "c")
    code, out, _ = run(capsys, tmp_path / "c")
    assert 0 == code
    assert "records match their CRC-32s\n" in out
    weight = next(t for t in read(tmp_path / "c").tensors if t.kind == "exp_avg" and len(t.shape) == 2)
    row = open_checkpoint(tmp_path / "c").tensor(weight.name, "exp_avg")[0].tobytes()
    file = next(file for file in (tmp_path / "c").rglob("*.distcp") if row in file.read_bytes())
    at = file.read_bytes().index(row)
    flip(file, at + 5, 128)
    code, out, _ = run(capsys, tmp_path / "c", "--json", "--threads", "3")
    assert 7 == code
    (problem,) = json.loads(out)["problems"]
    begin, end = map(int, re.findall(r"record archive/data/0 at \[([0-9]+), ([0-9]+)\)", problem)[0])
    assert problem.startswith(f"{file}: ")
    assert begin <= at + 5 < end


def test_a_flipped_bit_in_an_object_of_dcp_is_found(tmp_path: Path) -> None:
    """No tensor shows that the learning rate is another one."""
    from torch.distributed.checkpoint import save

    save({"model": {"w": torch.ones(3)}, "lr": 0.1234}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert [] == verify(tmp_path / "c").problems
    (file,) = (tmp_path / "c").glob("*.distcp")
    flip(file, file.read_bytes().index(bytes.fromhex("3fbf972474538ef3")) + 7)
    (problem,) = verify(tmp_path / "c").problems
    assert str(file) in problem
    assert "data.pkl" in problem


@pytest.mark.parametrize("name", ["ds_z2_bf16_w2", "ds_z3_bf16_w2", "megatron_tp2_pp2"])
def test_a_flipped_bit_in_a_framework_s_file_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / name / "ckpt", tmp_path / "c")
    code, out, _ = run(capsys, tmp_path / "c")
    assert 0 == code
    assert "records match their CRC-32s" in out
    file = max((tmp_path / "c").rglob("*.pt"), key=lambda f: (f.stat().st_size, f.name))
    record, (begin, nbytes) = max(places(file).items(), key=lambda item: item[1][1])
    flip(file, begin + nbytes - 3)
    code, _, err = run(capsys, tmp_path / "c")
    assert 7 == code
    assert f"{file}: the record {record} at [{begin}, " in err


def test_a_file_without_crcs_is_not_called_rotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever turned them off to save time would be told that all his checkpoints are lost."""
    assert torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(training_state(), tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    count = sum(nbytes > 0 for _, nbytes in places(tmp_path / "c.pt").values())
    code, out, err = run(capsys, tmp_path / "c.pt")
    assert (0, "") == (code, err)
    assert f"all bytes are there (torch.save wrote no CRC-32s: {count} records have none)\n" in out


def test_storages_that_were_filled_later_have_no_crc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.serialization.skip_data leaves room for the bytes, which another program puts there."""
    with torch.serialization.skip_data():
        torch.save({"w": torch.arange(40.0), "b": torch.ones(3)}, tmp_path / "c.pt")
    flip(tmp_path / "c.pt", places(tmp_path / "c.pt")["c/data/0"][0])
    code, out, err = run(capsys, tmp_path / "c.pt")
    assert (0, "") == (code, err)
    assert "records match their CRC-32s; 2 are without\n" in out


def test_what_has_no_digests_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(training_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    code, out, _ = run(capsys, tmp_path / "old.pt")
    assert 0 == code
    assert "all bytes are there (the format has no digests)\n" in out
    shutil.copytree(FIXTURES / "hf_llama_sharded" / "ckpt", tmp_path / "hf")
    torch.save({"last_epoch": 3}, tmp_path / "hf" / "scheduler.pt")
    code, out, _ = run(capsys, tmp_path / "hf")
    assert 0 == code
    files = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert f"records match their CRC-32s; {files} other files have no digests\n" in out


def test_what_was_compared_is_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "c.pt")
    _, out, _ = run(capsys, tmp_path / "c.pt", "--json")
    found = json.loads(out)
    assert len(places(tmp_path / "c.pt")) == found["crcs"]
    assert (0, 0, 0, []) == (found["digests"], found["without_crc"], found["bare_files"], found["problems"])


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    torch.save({str(i): torch.full((12 << 20,), float(i)) for i in range(3)}, tmp_path / "c.pt")
    steps: list[tuple[int, int]] = []
    settings = Settings(memory_bytes=32 << 20, threads=2, progress=lambda done, total: steps.append((done, total)))
    tracemalloc.start()
    try:
        found = verify(tmp_path / "c.pt", settings=settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ([], 3 * 48 << 20) == (found.problems, found.nbytes)
    assert peak < 32 << 20
    assert steps == sorted(steps)
    done, total = steps[-1]
    assert 2 * found.nbytes < done <= total
