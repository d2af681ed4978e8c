"""
Against the real DeepSpeed, on CPU: ``make test-deepspeed``.

Each case is trained and saved by DeepSpeed, and read and compared with what its engine held, bit for bit; then it goes
through our format into a DeepSpeed Universal folder, which the engine loads, and trains on from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")
from tests.frameworks.deepspeed_cases import OTHER, READ, SAME, SOURCES  # noqa: E402
from tests.frameworks.deepspeed_job import Case, launch  # noqa: E402

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")
Trained = Callable[[Case], Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run a case, once, and return its folder."""
    root = tmp_path_factory.mktemp("deepspeed")

    def run(case: Case) -> Path:
        folder = root / case.name
        if not (folder / "truth.json").exists():
            launch("train", case, folder)
        return folder

    return run


def truth_of(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
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


TAGS = {
    "float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "bool": "BOOL",
    "uint8": "U8",
}


def tensors_of(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{tensor.kind}/{tensor.name}": (TAGS[tensor.dtype], tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
        if tensor.kind != "extra"
    }


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_what_deepspeed_saved_is_what_its_engine_held(case: Case, trained: Trained, tmp_path: Path) -> None:
    """A run goes on with other numbers than it stopped with, in an option that nobody thought of."""
    folder = trained(case)
    truth, expected = truth_of(folder)
    convert(folder / "ckpt", tmp_path / "universal", to="universal")
    state = read(tmp_path / "universal")
    state.check()
    if case.exclude_frozen:  # then they are in no file
        for name in truth.pop("frozen"):
            del expected[f"model/{name}"]
        truth["frozen"] = []
    found = {key: value for key, value in tensors_of(state).items() if key in expected or not key.startswith("rng/")}
    assert expected == found
    assert truth["tied"] == state.tied
    assert truth["frozen"] == state.frozen
    if case.zero.get("elastic_checkpoint"):  # which has no hyperparameters
        truth["param_groups"] = [{"names": group["names"]} for group in truth["param_groups"]]
    assert truth["param_groups"] == state.param_groups
    assert [truth[key] for key in COUNTERS] == [state.extra[key] for key in COUNTERS]
    assert truth["client_state"] == state.extra["client_state"]
    assert truth["ds_config"] == state.extra["deepspeed"]["ds_config"]


def loaded(source: Path, case: Case, tmp_path: Path) -> tuple[Path, list[str]]:
    """Go through Universal to DeepSpeed Universal, load it in a run of ``case``, and return that run's truth."""
    convert(source / "ckpt", tmp_path / "universal", to="universal")
    warnings = convert(tmp_path / "universal", tmp_path / "deepspeed", to="deepspeed").warnings
    assert diff(read(tmp_path / "universal"), read(tmp_path / "deepspeed")) == []
    launch("resume", case, tmp_path / "run", source=str(tmp_path / "deepspeed"))
    return tmp_path / "run", warnings


def compare(source: Path, run: Path, warnings: list[str]) -> None:
    """The same state, but for what the warnings say that DeepSpeed's loader leaves alone."""
    truth, expected = truth_of(source)
    now, found = truth_of(run)
    assert any("no buffers" in line for line in warnings)
    kept = {key: value for key, value in expected.items() if not key.startswith(("rng/", "buffer/"))}
    assert kept == {key: found.get(key) for key in kept}
    assert truth["param_groups"] == now["param_groups"]
    assert [truth[key] for key in COUNTERS] == [now[key] for key in COUNTERS]
    assert truth["client_state"] == now["client_state"]


@pytest.mark.parametrize("name", SAME)
def test_the_same_run_goes_on_with_the_very_same_losses(name: str, trained: Trained, tmp_path: Path) -> None:
    """What a user sees of a conversion that went wrong: a loss curve with a bend."""
    source = trained(SOURCES[name])
    run, warnings = loaded(source, SOURCES[name], tmp_path)
    compare(source, run, warnings)
    assert truth_of(source)[0]["next_losses"] == truth_of(run)[0]["next_losses"]


@pytest.mark.parametrize(("name", "change"), OTHER, ids=lambda value: value if isinstance(value, str) else "-".join(
    f"{key}{number}" for key, number in value.items() if key in ("stage", "world")))
def test_another_world_and_stage_hold_the_same_state(
    name: str, change: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    """Eight cards became six: the state is cut anew, and nothing of it may change."""
    source = trained(SOURCES[name])
    run, warnings = loaded(source, replace(SOURCES[name], **change), tmp_path)
    compare(source, run, warnings)
