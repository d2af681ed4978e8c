"""
Memory does not grow with the checkpoint: ten times the bytes have the same peak, whatever the source.

The sources are sparse files: the writers lay them out, and their tensors are holes. SNAPSHOTD_TEST_BIG=1 makes them of
1 and 10 GB (`make test-big`), else they have 60 and 600 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import xxhash

from snapshotd.universal import Settings
from snapshotd.universal.sources import BytesSource
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.stream import OutFile, Written
from snapshotd.universal.views import Stored
from snapshotd.universal.writers import writer_for

BIG = os.environ.get("SNAPSHOTD_TEST_BIG") == "1"
LARGE_BYTES = 10_000_000_000 if BIG else 600_000_000
KINDS = ("model", "exp_avg", "exp_avg_sq")
MEMORY = "64MiB"
_ZEROS = bytes(1 << 20)

CHILD = """
import json, re, sys
from pathlib import Path
from snapshotd.sizes import parse_bytes
from snapshotd.universal import Settings, convert
from snapshotd.universal.readers import detect, universal, _reader
from snapshotd.universal.writers import writer_for
source, target, memory = sys.argv[1:]

def kept(name):
    # Of this program alone: getrusage counts what the process was before it became this program.
    return int(re.search(name + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) << 10

_reader(detect(Path(source)))
writer_for("universal")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = kept("VmRSS")
report = convert(source, target, to="universal", settings=Settings(memory_bytes=parse_bytes(memory), threads=2))
print(json.dumps([report.nbytes, kept("VmHWM") - before]))
"""


def state_of(nbytes: int) -> State:
    """As many bytes in twelve layers of a Megatron-core GPT, whose tensors grow with them."""
    width = int((nbytes / len(KINDS) / 4 / 12 / 12) ** 0.5) // 8 * 8
    shapes = {"embedding.word_embeddings.weight": (128, width)}
    for i in range(12):
        at = f"decoder.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (width,)
        shapes[f"{at}.self_attention.linear_proj.weight"] = (width, width)
        shapes[f"{at}.self_attention.linear_qkv.weight"] = (3 * width, width)
        shapes[f"{at}.mlp.linear_fc1.weight"] = (4 * width, width)
        shapes[f"{at}.mlp.linear_fc2.weight"] = (width, 4 * width)
    shapes["decoder.final_layernorm.weight"] = (width,)
    shapes["output_layer.weight"] = (128, width)
    nothing = BytesSource(bytes(4))
    state = State(format="made", tensors=[], step=1)
    for name, shape in shapes.items():
        state.tensors += [Tensor(kind, name, Stored(nothing, 0, "float32", shape, (0,) * len(shape))) for kind in KINDS]
        state.tensors.append(Tensor("step", name, scalar(1, "float32")))
    for decay, matrices in ((0.1, True), (0.0, False)):
        names = [name for name, shape in shapes.items() if (len(shape) > 1) == matrices]
        state.param_groups.append({"names": names, "lr": 0.1, "weight_decay": decay, "wd_mult": float(matrices)})
    return state


@cache
def digest_of_zeros(nbytes: int, begin: bytes) -> str:
    """The digest of a tensor that is all zeros behind its first bytes."""
    digest = xxhash.xxh3_128(begin)
    for at in range(len(begin), nbytes, len(_ZEROS)):
        digest.update(_ZEROS[: nbytes - at])
    return f"xxh3_128:{digest.hexdigest()}"


def leave_holes(target: Path, files: Sequence[OutFile], settings: Settings, **_: Any) -> dict[str, dict[str, Written]]:
    """In the place of write_files: all but the tensors' bytes."""
    result = {}
    for file in files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = {placed.key: b"\0\0\x80?"[: placed.view.nbytes] for placed in file.tensors if placed.view.nbytes <= 8}
        written = {
            placed.key: Written(digest_of_zeros(placed.view.nbytes, small.get(placed.key, b"")), 0)
            for placed in file.tensors
        }
        with path.open("wb") as out:
            out.truncate(file.nbytes)
            for offset, data in [*file.blocks, *(file.finish(written) if file.finish else ())]:
                out.seek(offset)
                out.write(data)
            for placed in file.tensors:
                out.seek(placed.offset)
                out.write(small.get(placed.key, b""))
        result[file.name] = written
    return result


Make = Callable[[State, Path, pytest.MonkeyPatch], Path]


def made(to: str, layout: dict[str, int]) -> Make:
    def make(state: State, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        writer = writer_for(to)
        monkeypatch.setattr(writer, "write_files", leave_holes)
        target = folder / ("source.pt" if to == "torch" else "source")
        folder.mkdir()
        writer.write(state, target, Settings(), identity="", options={"layout": layout})
        return target

    return make


SOURCES = {
    "universal": made("universal", {}),
    "dcp": made("dcp", {"dp": 4}),
    "torch": made("torch", {}),
    "hf": made("hf", {}),
    "deepspeed": made("deepspeed", {}),
    "megatron": made("megatron", {"tp": 2, "pp": 2}),
}


def peak_of(source: Path, target: Path) -> tuple[int, int]:
    """(bytes converted, bytes of memory above start and imports)"""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(target), MEMORY], check=True, capture_output=True, text=True
    )
    nbytes, peak = json.loads(done.stdout)
    return nbytes, peak


@pytest.mark.timeout(1200 if BIG else 120)
@pytest.mark.parametrize("case", SOURCES)
def test_ten_times_the_bytes_have_the_same_peak(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is larger than the machine's memory would end in the out-of-memory killer."""
    peaks = []
    for size in (LARGE_BYTES // 10, LARGE_BYTES):
        folder = tmp_path / str(size)
        source = SOURCES[case](state_of(size), folder, monkeypatch)
        nbytes, peak = peak_of(source, folder / "u")
        share = 1 / 3 if case == "hf" else 1
        assert abs(nbytes - size * share) < size * share / 8
        peaks.append(peak)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    print(f"{case}: {peaks[0] / 1e6:.1f} MB at {LARGE_BYTES / 1e10:g} GB, {peaks[1] / 1e6:.1f} MB at ten times that")
    assert min(peaks) > 1 << 19, "a slab is larger than that: the measurement is broken"
    assert max(peaks) < 64 << 20
    assert peaks[1] < peaks[0] + (8 << 20)
