"""Like stands beside like, where ours is compared with what others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import Run
from benchmarks.parts import peers


def system(seconds: float, *, holds: bool, outlives: str = "worker") -> dict[str, Any]:
    sample = {"stall_s": seconds, "complete_s": seconds, "step_s": 1 + seconds, "plain_s": 1.0}
    return {"holds": holds, "outlives": outlives, "lacks": "", "samples": [sample] * 3}


FAMILIES = {
    "ours": {
        "snapshotd": system(0.001, holds=False),
        "snapshotd without digests": system(0.002, holds=False),
        "snapshotd, training held": system(0.06, holds=True),
        "snapshotd without digests, training held": system(0.05, holds=True),
    },
    "torch_native": {"holds": system(0.08, holds=True), "does not": system(0.01, holds=False)},
    "lm_resiliency": {"is lost": system(0.04, holds=True, outlives="nothing")},
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, peers.Row]:
    def measure(run: Run, family: str, world: int, *more: object) -> peers.Found:
        if world == 2:
            return {peers.OURS: system(0.1, holds=False, outlives="node")} if family == "ours" else {}
        return FAMILIES.get(family, {})

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "_installed", lambda module: True)
    with Run(tmp_path) as run:
        return {row.what: row for row in peers.rows(run)}


@pytest.mark.parametrize(("label", "seconds"), [("", 0.06), (", without digests", 0.05)])
def test_a_training_that_is_held_stands_beside_those_that_are(found: dict, label: str, seconds: float) -> None:
    """Breaks: our copy behind training is judged by one that holds it, or the other way round."""
    stall = found[f"stall per step, one rank{label}, training held"]
    survives = found[f"survives the worker after{label}, training held"]
    assert (seconds, ["holds", "is lost"]) == (stall.ours.median, sorted(stall.peers))
    assert (seconds, ["holds"], "the best: holds") == (survives.ours.median, list(survives.peers), survives.against)


def test_a_training_that_goes_on_stands_beside_all(found: dict) -> None:
    stall, survives = found["stall per step, one rank"], found["survives the worker after"]
    assert (0.001, ["does not", "holds", "is lost"]) == (stall.ours.median, sorted(stall.peers))
    assert ["does not", "holds"] == sorted(survives.peers)


def test_rows_of_two_ranks_have_no_held_training(found: dict) -> None:
    """Breaks: the table of one rank and that of two, which stand in a row, become one with empty cells."""
    held = [what for what in found if what.endswith("training held")]
    assert 6 == len(held)
    assert held == list(found)[-6:]
