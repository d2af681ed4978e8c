"""Like stands beside like, where ours is compared with what others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import Run
from benchmarks.parts import peers


def system(seconds: float, *, outlives: str = "worker") -> dict[str, Any]:
    sample = {"stall_s": seconds, "complete_s": seconds, "step_s": 1 + seconds, "plain_s": 1.0}
    return {"outlives": outlives, "lacks": "", "samples": [sample] * 3}


FAMILIES = {
    "ours": {"snapshotd": system(0.001), "snapshotd without digests": system(0.002)},
    "torch_native": {"slow": system(0.08), "fast": system(0.01)},
    "lm_resiliency": {"is lost": system(0.004, outlives="nothing")},
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, peers.Row]:
    def measure(run: Run, family: str, world: int, *more: object) -> peers.Found:
        if world == 2:
            return {peers.OURS: system(0.1, outlives="node")} if family == "ours" else {}
        return FAMILIES.get(family, {})

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "_installed", lambda module: True)
    with Run(tmp_path) as run:
        return {row.what: row for row in peers.rows(run)}


@pytest.mark.parametrize(("label", "seconds"), [("", 0.001), (", without digests", 0.002)])
def test_ours_stands_beside_all_with_and_without_digests(found: dict, label: str, seconds: float) -> None:
    stall = found[f"stall per step, one rank{label}"]
    assert (seconds, "the best: is lost") == (stall.ours.median, stall.against)
    assert ["fast", "is lost", "slow"] == sorted(stall.peers)


def test_what_is_lost_with_the_worker_is_not_compared_by_when_it_survives(found: dict) -> None:
    """Breaks: a system that keeps nothing outside the worker is the best of those that survive it."""
    survives = found["survives the worker after"]
    assert (["fast", "slow"], "the best: fast") == (sorted(survives.peers), survives.against)
