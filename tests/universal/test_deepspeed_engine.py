"""Small checkpoints of DeepSpeed's own engine, with all that it held when it wrote them, steps and groups too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.glob("deepspeed_*"))
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")
TAGS = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "bool": "BOOL",
    "uint8": "U8",
}
Held = dict[str, tuple[str, tuple[int, ...], bytes]]


def truth_of(folder: Path) -> tuple[dict[str, Any], Held]:
    """What the engine held: facts, and {kind/name: (dtype, shape, bytes)}."""
    data = (folder / "truth.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    found = {
        key: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }
    return json.loads((folder / "truth.json").read_text()), found


def tensors_of(state: State) -> Held:
    return {
        f"{tensor.kind}/{tensor.name}": (TAGS[tensor.dtype], tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
        if tensor.kind != "extra"
    }


def expect_truth(
    folder: Path, state: State, *, lost: tuple[str, ...] = (), without_group: tuple[str, ...] = ()
) -> None:
    """``state`` is what the engine held, but for names in ``lost``, groups of ``without_group``, what no file says."""
    truth, expected = truth_of(folder)
    expected = {key: value for key, value in expected.items() if key.partition("/")[2] not in lost}
    found = {key: value for key, value in tensors_of(state).items() if key in expected or not key.startswith("rng/")}
    assert sorted(expected) == sorted(found)
    assert [key for key, value in expected.items() if found[key] != value] == []
    assert truth["tied"] == state.tied
    assert [name for name in truth["frozen"] if name not in lost] == state.frozen
    if truth["ds_config"]["zero_optimization"].get("elastic_checkpoint"):  # hyperparameters are in no file
        truth["param_groups"] = [{"names": group["names"]} for group in truth["param_groups"]]
    for group in truth["param_groups"]:
        group["names"] = [name for name in group["names"] if name not in without_group]
    assert truth["param_groups"] == state.param_groups
    assert [truth[key] for key in COUNTERS] == [state.extra[key] for key in COUNTERS]
    assert truth["client_state"] == state.extra["client_state"]
    assert truth["ds_config"] == state.extra["deepspeed"]["ds_config"]


def test_all_are_there() -> None:
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_universal_is_what_the_engine_held_and_so_is_the_way_back(case: str, tmp_path: Path) -> None:
    """A run goes on with other numbers than it stopped with, in an option that nobody thought of."""
    convert(FIXTURES / case / "ckpt", tmp_path / "universal", to="universal")
    state = read(tmp_path / "universal")
    state.check()
    expect_truth(FIXTURES / case, state)
    convert(tmp_path / "universal", tmp_path / "deepspeed", to="deepspeed")
    assert diff(state, read(tmp_path / "deepspeed")) == []
