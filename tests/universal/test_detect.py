"""What a path is: found by names and first bytes, without importing readers that have nothing to do with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.errors import UsageError
from snapshotd.universal import convert, readers
from snapshotd.universal.readers import FORMATS, detect

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
PLACES = sorted(
    place.relative_to(FIXTURES).as_posix()
    for case in FIXTURES.iterdir()
    if case.is_dir()
    for place in (case, *case.rglob("*"))
    if place.is_dir() or place.name in ("latest", ".metadata", "checkpoint.pt", "latest_checkpointed_iteration.txt")
)


def found(path: Path) -> str | None:
    try:
        return detect(path)
    except UsageError:
        return None


def test_hints_rule_out_nothing_that_a_reader_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint that can be read would be called unknown."""
    paths = [FIXTURES / place for place in PLACES]
    for to in ("universal", "dcp", "hf", "torch", "deepspeed"):
        target = tmp_path / (f"{to}.pt" if to == "torch" else to)
        convert(FIXTURES / "ds_z2_bf16_w2" / "ckpt", target, to=to)
        paths.append(target)
    convert(FIXTURES / "megatron_tp2_pp2" / "ckpt", tmp_path / "megatron", to="megatron")
    paths.append(tmp_path / "megatron")
    with_hints = [found(path) for path in paths]
    monkeypatch.setattr(readers, "_HINTS", {})
    assert [found(path) for path in paths] == with_hints
    assert {"universal", "megatron", "deepspeed", "dcp", "hf", "torch"} == {*with_hints} - {None}


@pytest.mark.parametrize(
    ("place", "absent"),
    [
        ("dcp_fsdp2_w4/ckpt", ("deepspeed", "megatron", "snapshot", "hf")),
        ("ds_z2_bf16_w2/ckpt", ("megatron", "snapshot", "hf")),
        ("hf_llama_sharded/ckpt", ("deepspeed", "megatron", "snapshot")),
        ("torch_save_plain/checkpoint.pt", ("deepspeed", "megatron", "snapshot", "dcp", "hf")),
    ],
)
def test_only_the_readers_that_may_fit_are_imported(place: str, absent: tuple[str, ...]) -> None:
    """Each command would pay for the imports of all formats, and of the daemon's code."""
    assert set(absent) <= set(FORMATS)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from snapshotd.universal import readers\n"
        f"readers.detect(Path({str(FIXTURES / place)!r}))\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    loaded = done.stdout.split()
    assert [] == [name for name in absent if f"snapshotd.universal.readers.{name}" in loaded]
    assert [] == [name for name in ("google.protobuf", "grpc", "ssl", "rich") if name in loaded]
