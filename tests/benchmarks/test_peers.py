"""Like stands beside like, where ours is compared with what others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import Run
from benchmarks.parts import peers
from benchmarks.peers.turns import InTurns, Turns


def system(seconds: float, *, outlives: str = "worker") -> dict[str, Any]:
    sample = {"stall_s": seconds, "complete_s": seconds, "step_s": 1 + seconds, "plain_s": 1.0}
    return {"outlives": outlives, "lacks": "", "samples": [sample] * 3}


FAMILIES = {
    "ours": {
        "snapshotd": system(0.001),
        "snapshotd without digests": system(0.002),
        "a bare copy and digest": system(0.003, outlives="nothing"),
    },
    "torch_native": {"slow": system(0.08), "fast": system(0.01)},
    "lm_resiliency": {"is lost": system(0.004, outlives="nothing")},
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, peers.Row]:
    def measure(run: Run, family: str, world: int, *more: object) -> peers.Found:
        if world == 2:
            return {peers.OURS: system(0.1, outlives="node")} if family == "ours" else {}
        return FAMILIES.get(family, {})

    def measure_in_turns(run: Run, families: list[str], nbytes: int, found: peers.Found) -> dict[str, str]:
        for family in families:
            found.update(FAMILIES.get(family, {}))
        return {"dlrover": "ended"}

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "measure_in_turns", measure_in_turns)
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


def test_bare_parts_are_no_peer_and_stand_beside_the_peers(found: dict) -> None:
    """Breaks: what is the least that a digest costs is taken for somebody's checkpoint, or is judged."""
    bare = found["added to a step, one rank, by a bare copy and digest"]
    assert (bare.goal, bare.against, bare.peers) == (None, "the best: is lost", {})
    assert bare.ours.median == pytest.approx(0.003)
    assert all("a bare copy and digest" not in row.peers for row in found.values())


def test_a_family_that_ends_is_named_with_its_reason(found: dict) -> None:
    assert found["dlrover, 1 rank"].text == "does not run here: ended"


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Turns]:
    with Turns(tmp_path / "turns") as turns:
        yield turns


def test_who_takes_turns_never_measures_beside_another(turns: Turns, tmp_path: Path) -> None:
    log: list[tuple[str, int, str]] = []
    children = {name: player(tmp_path / "turns", name, log) for name in ("a", "b")}
    assert turns.gather(dict.fromkeys(children, Running()), 10.0) == {}
    assert [turns.go_round(backwards=count == 1) for count in range(3)] == [{}] * 3
    turns.end()
    for thread in children.values():
        thread.join(10.0)
        assert not thread.is_alive()
    order = [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert log == [(name, count, what) for name, count in order for what in ("begins", "ends")]


def test_who_ends_in_its_turn_has_no_other_and_holds_nobody_up(turns: Turns, tmp_path: Path) -> None:
    log: list[tuple[str, int, str]] = []
    children = {name: player(tmp_path / "turns", name, log, rounds=2 if name == "a" else 9) for name in ("a", "b")}
    assert turns.gather(dict.fromkeys(children, Running()), 10.0) == {}
    assert [turns.go_round() for _ in range(4)] == [{}, {"a": "ended"}, {}, {}]
    turns.end()
    for thread in children.values():
        thread.join(10.0)
        assert not thread.is_alive()
    assert [count for name, count, what in log if (name, what) == ("b", "ends")] == [0, 1, 2, 3]


def test_who_ends_before_its_first_turn_is_named_with_its_last_words(turns: Turns) -> None:
    assert turns.gather({"a": Ended()}, 10.0) == {"a": "ended with code 1: no such module"}


class Running:
    code = None


class Ended:
    code = 1

    def last_words(self) -> str:
        return "no such module"


def player(path: Path, name: str, log: list[tuple[str, int, str]], rounds: int = 9) -> threading.Thread:
    """Takes turns, and goes away after so many."""

    def play() -> None:
        mine = InTurns(str(path), name)
        for count in range(rounds):
            if not mine.another(count):
                break
            log.append((name, count, "begins"))
            log.append((name, count, "ends"))
        mine.close()

    thread = threading.Thread(target=play)
    thread.start()
    return thread
