"""Checkpoints that DeepSpeed itself wrote, against the live state they were written from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from snapshotd.universal import Settings, convert
from snapshotd.universal.readers import deepspeed, detect, read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.glob("ds_*"))


def truth_of(case: str) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """What truth.json says, and {kind/name: (dtype tag, shape, bytes)} of truth.safetensors."""
    path = FIXTURES / case / "truth.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            found[key] = (entry["dtype"], tuple(entry["shape"]), data[8 + length + begin : 8 + length + end])
    return json.loads((FIXTURES / case / "truth.json").read_text()), found


TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "uint8": "U8"}


def tensors_of(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{tensor.kind}/{tensor.name}": (TAGS[tensor.dtype], tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
    }


def test_all_fixtures_are_there() -> None:
    assert len(CASES) == 8


@pytest.mark.parametrize("case", CASES)
def test_reader_gives_the_live_state_bit_for_bit(case: str) -> None:
    """A user's training goes on from other numbers than it stopped with."""
    state = read(FIXTURES / case / "ckpt")
    state.check()
    truth, expected = truth_of(case)
    found = tensors_of(state)
    assert [key for key, value in expected.items() if found.get(key) != value] == []
    # What the truth leaves out: steps, which it has as one number, and the same generator on the other ranks.
    steps = {key for key in found if key.startswith("step/")}
    assert {np.float32(truth["optimizer_step"]).tobytes()} == {found[key][2] for key in steps}
    assert {key.replace("exp_avg/", "step/") for key in expected if key.startswith("exp_avg/")} == steps
    assert found.keys() - expected.keys() - steps <= {"rng/1"}


@pytest.mark.parametrize("case", CASES)
def test_reader_gives_groups_ties_counters_and_client_state(case: str) -> None:
    """Weight decay reaches norms, a tied weight comes apart, the scheduler starts again."""
    state = read(FIXTURES / case / "ckpt")
    truth, _ = truth_of(case)
    assert truth["param_groups"] == state.param_groups
    assert truth["tied"] == state.tied
    assert truth["frozen"] == state.frozen
    assert truth["step"] == state.step
    for key in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "client_state"):
        assert truth[key] == state.extra[key]
    assert truth["ds_config"] == state.extra["deepspeed"]["ds_config"]
    assert truth["world_size"] == state.source["topology"]["dp"]
    assert state.warnings == []


@pytest.mark.parametrize("case", ["ds_z1_bf16_w2", "ds_z3_bf16_w2", "ds_universal_from_z3_bf16"])
def test_convert_to_universal_equals_the_truth(case: str, tmp_path: Path) -> None:
    """The whole way: what lies in the safetensors files is the live state."""
    target = tmp_path / "universal"
    convert(FIXTURES / case / "ckpt", target, to="universal", settings=Settings())
    _, expected = truth_of(case)
    manifest = json.loads((target / "universal.json").read_text())
    places = {f"{entry['kind']}/{entry['name']}": entry for entry in manifest["tensors"]}
    for key, (tag, shape, data) in expected.items():
        with safe_open(target / places[key]["file"], "pt") as file:
            tensor = file.get_tensor(places[key]["key"])
        assert (tag, shape) == (TAGS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        assert data == bytes(tensor.contiguous().reshape(-1).view(dtype=__import__("torch").uint8).numpy())


def test_detection_by_root_by_tag_and_by_latest() -> None:
    root = FIXTURES / "ds_z1_bf16_w2" / "ckpt"
    for path in (root, root / "global_step4", root / "latest"):
        assert detect(path) == "deepspeed"
        assert read(path).step == 4
    assert not deepspeed.detect(FIXTURES)
    assert not deepspeed.detect(root / "nowhere")


def test_reading_imports_neither_torch_nor_deepspeed() -> None:
    """The start of torch alone takes longer than the conversion of a small checkpoint."""
    code = (
        "import sys; from pathlib import Path; from snapshotd.universal.readers import deepspeed\n"
        f"state = deepspeed.read(Path({str(FIXTURES / 'ds_z3_bf16_w2' / 'ckpt')!r}))\n"
        "assert state.tensors and not {'torch', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], check=True)
