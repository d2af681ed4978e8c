"""
Against the real DeepSpeed, on CPU: ``make test-deepspeed``.

Each case is trained and saved by DeepSpeed, and read and compared with what its engine held, bit for bit; then it goes
through our format into a DeepSpeed Universal folder, which the engine loads, and trains on from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from tests.universal.test_deepspeed_engine import COUNTERS, expect_truth, truth_of

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")
from deepspeed.accelerator import get_accelerator  # noqa: E402

from tests.frameworks.deepspeed_cases import OTHER, READ, SAME, SOURCES  # noqa: E402
from tests.frameworks.deepspeed_job import Case, launch  # noqa: E402

Trained = Callable[[Case], Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run a case, once, and return its folder."""
    root = tmp_path_factory.mktemp("deepspeed")

    def run(case: Case) -> Path:
        if case.dtype == "fp16" and not get_accelerator().is_fp16_supported():
            pytest.skip("this CPU has no half precision, without which DeepSpeed refuses to train in it")
        folder = root / case.name
        if not (folder / "truth.json").exists():
            launch("train", case, folder)
        return folder

    return run


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_what_deepspeed_saved_is_what_its_engine_held(case: Case, trained: Trained, tmp_path: Path) -> None:
    """A run goes on with other numbers than it stopped with, in an option that nobody thought of."""
    folder = trained(case)
    warnings = convert(folder / "ckpt", tmp_path / "universal", to="universal").warnings
    state = read(tmp_path / "universal")
    state.check()
    frozen = tuple(truth_of(folder)[0]["frozen"])
    empty = ("spare.nothing",) if "empty" in case.changes else ()
    without_group = () if (case.stage, case.dtype) == (0, "fp32") else empty  # DeepSpeed's own optimizers leave it out
    assert bool(without_group) == any("spare.nothing without elements" in line for line in warnings)
    expect_truth(folder, state, lost=frozen if case.exclude_frozen else (), without_group=without_group)


def loaded(source: Path, case: Case, tmp_path: Path) -> tuple[Path, list[str]]:
    """Go through Universal to DeepSpeed Universal, load it in a run of ``case``, and return that run's truth."""
    convert(source / "ckpt", tmp_path / "universal", to="universal")
    warnings = convert(tmp_path / "universal", tmp_path / "deepspeed", to="deepspeed").warnings
    assert diff(read(tmp_path / "universal"), read(tmp_path / "deepspeed")) == []
    launch("resume", case, tmp_path / "run", source=str(tmp_path / "deepspeed"))
    return tmp_path / "run", warnings


def differing(source: Path, run: Path) -> list[str]:
    """What ``run`` loaded and does not hold as ``source`` did."""
    expected, found = truth_of(source)[1], truth_of(run)[1]
    kept = {key: value for key, value in expected.items() if not key.startswith(("rng/", "buffer/"))}
    return [key for key, value in kept.items() if found.get(key) != value]


def compare(source: Path, run: Path, warnings: list[str]) -> None:
    """The same state, but for what the warnings say that DeepSpeed's loader leaves alone."""
    truth, now = truth_of(source)[0], truth_of(run)[0]
    assert any("no buffers" in line for line in warnings)
    assert differing(source, run) == []
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


def test_what_is_warned_of_round_robin_gradients_is_so(trained: Trained, tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 takes the places that parameters had before they were dealt out. Once it does not, warn less."""
    source = trained(SOURCES["z2_round_robin"])
    run, warnings = loaded(source, SOURCES["z2_round_robin"], tmp_path)
    assert any("load it with round_robin_gradients false" in line for line in warnings)
    assert "model/layers.0.attn.out.weight" in differing(source, run)
