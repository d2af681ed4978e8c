"""
Peers: keeping the state each step with snapshotd, and with what people use instead.

Per system: how long training is held, how much longer a step takes, and after how long the snapshot would survive the
worker (one rank) or the node (two ranks on this machine, with half of the state each). Each family of systems trains
in a process of its own, and each step that keeps the state stands beside a plain one. Those that come near to ours are
measured in turns with it, round by round.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import Row, Run, Series
from ..cluster import Cluster, clean_environment
from ..peers.turns import Turns
from ..processes import BenchError, Child

GOAL = 20
SECONDS = 264

FAMILIES = {
    "torch_native": "",
    "torchsnapshot": "torchsnapshot",
    "dlrover": "dlrover",
    "nvrx": "nvidia_resiliency_ext",
    "lm_resiliency": "lm_resiliency",
}
"""Family to the module that it needs."""

IN_TURNS = ("dlrover", "lm_resiliency")
"""Families that hold training for a copy and no longer: the machine differs by as much from minute to minute."""

TWO_RANKS = ("dlrover", "nvrx", "lm_resiliency")
OURS, UNDIGESTED, BARE = "snapshotd", "snapshotd without digests", "a bare copy and digest"
DIRECTORY_VARIABLE = "SNAPSHOTD_BENCH_PEERS"
FAMILY_S = 150.0
_OURS_S = 14.0
_TURNS_S = 88.0
_ROUNDS = 20
_ADDED_SLACK = 0.5
"""What is added is a difference of steps that differ by a tenth: where 49 rounds had 12 % of a step for ours and the
best of the others, blocks of 10 of them had 8 to 16 % for either."""
_STATE_BYTES = 600_000_000
"""Half of what other parts have: there are ten systems, some of which take six times the step to keep it."""

Found = dict[str, dict[str, Any]]


def rows(run: Run) -> Iterator[Row]:
    one: Found = {}
    two: Found = {}
    if run.short:
        one = measure(run, "ours", 1, _bytes(run), _OURS_S)
        yield from _families(run, 1, ("torch_native",), one)
    else:
        there = [family for family in IN_TURNS if _installed(FAMILIES[family])]
        for family, reason in measure_in_turns(run, ["ours", *there], _bytes(run), one).items():
            yield _missing(family, 1, reason)
        yield from _families(run, 1, tuple(family for family in FAMILIES if family not in there), one)
    yield from _compare(one, "one rank", "survives the worker", "worker")
    if not run.short:
        two = measure(run, "ours", 2, _bytes(run), _OURS_S)
        yield from _families(run, 2, TWO_RANKS, two)
        yield from _compare(two, "two ranks", "survives the node", "node")


def _families(run: Run, world: int, families: tuple[str, ...], found: Found) -> Iterator[Row]:
    """Measure them all into `found`; a row says of each that cannot be measured why."""
    for family in families:
        if FAMILIES[family] and not _installed(FAMILIES[family]):
            if world == 1:
                yield Row.note(family, "not installed; `make bench-peers` installs it beside the environment")
            continue
        try:
            found.update(measure(run, family, world, _bytes(run)))
        except BenchError as error:
            yield _missing(family, world, str(error))


def _missing(family: str, world: int, reason: str) -> Row:
    return Row.note(f"{family}, {world} rank{'s' if world > 1 else ''}", f"does not run here: {reason}")


def _compare(found: Found, ranks: str, survives: str, level: str) -> Iterator[Row]:
    peers = {name: system for name, system in found.items() if not _is_ours(name) and name != BARE}
    yield from _rows(found, peers, ranks, survives, level)
    lacking = [f"{name}: {system['lacks']}" for name, system in found.items() if system["lacks"]]
    yield Row.note(f"what they do not do, {ranks}", "; ".join(lacking))


def _rows(found: Found, peers: Found, ranks: str, survives: str, level: str) -> Iterator[Row]:
    lasting = {name: system for name, system in peers.items() if system["outlives"] == level}
    for name, label in ((OURS, ""), (UNDIGESTED, ", without digests")):
        ours = found.get(name)
        if ours is not None:
            yield _row(f"stall per step, {ranks}{label}", "s", ours, peers, _stall)
            added = f"added to a step, {ranks}{label}"
            yield _row(added, "%", ours, peers, _inflation, whole_run_only=True, slack=_ADDED_SLACK)
            yield _row(f"{survives} after{label}", "s", ours, lasting, _complete)
    if BARE in found:
        # What is not to be had for less, with no goal of ours; it does not stand for us beside the others.
        bare = _row(f"added to a step, {ranks}, by {BARE}", "%", found[BARE], peers, _inflation, at_most=None)
        yield replace(bare, peers={})


def _is_ours(name: str) -> bool:
    return name.startswith(OURS)


def _row(what: str, unit: str, ours: Mapping[str, Any], peers: Found, of: Any, **more: Any) -> Row:
    """Ours beside all, and the ratio to the best of them."""
    beside = {name: of(system) for name, system in peers.items()}
    if not beside:
        return Row.shown(what, of(ours), unit=unit, text="none of the others does")
    best = min(beside, key=lambda name: beside[name].median)
    against = f"the best: {best}"
    more.setdefault("at_most", 1.0)
    return Row.cost(what, of(ours), beside[best], against=against, unit=unit, peers=beside, **more)


def _stall(system: Mapping[str, Any]) -> Series:
    return Series(tuple(sample["stall_s"] for sample in system["samples"]))


def _complete(system: Mapping[str, Any]) -> Series:
    return Series(tuple(sample["complete_s"] for sample in system["samples"]))


def _inflation(system: Mapping[str, Any]) -> Series:
    """Each step beside the plain one before it: the machine is another one some steps later."""
    return Series(tuple(sample["step_s"] / sample["plain_s"] - 1 for sample in system["samples"]))


# ---------------------------------------------------------------- measuring


def measure(run: Run, family: str, world: int, nbytes: int, within_s: float = 7.0) -> Found:
    """
    What each system of a family costs, with so many ranks that have a state of ``nbytes`` together, each measured for
    ``within_s``.
    """
    with contextlib.ExitStack() as stack:
        places = _clusters(run, world, nbytes, stack) if family == "ours" else {}
        within_s *= run.pace
        children = [_start(run, family, world, rank, nbytes, within_s, places) for rank in range(world)]
        try:
            for child in children:
                child.wait(FAMILY_S)
        finally:
            for child in children:
                child.end()
    return _answer(run, family, world)


def measure_in_turns(run: Run, families: Sequence[str], nbytes: int, found: Found) -> dict[str, str]:
    """
    Put into ``found`` what each system of these families costs one rank; each family has a process of its own, and one
    measures while the others wait. Returns why some families could not be measured. BenchError when it is ours.
    """
    with contextlib.ExitStack() as stack:
        turns = stack.enter_context(Turns(run.directory / "turns"))
        children: dict[str, Child] = {}
        turns_s = _TURNS_S * run.pace
        for family in families:
            places = _clusters(run, 1, nbytes, stack) if family == "ours" else {}
            children[family] = _start(run, family, 1, 0, nbytes, turns_s, places, turns=run.directory / "turns")
            stack.callback(children[family].end)
        failed = {**turns.gather(children, FAMILY_S), **turns.go_round()}
        began = time.monotonic()
        for count in range(_ROUNDS):
            if count >= 3 and time.monotonic() - began > turns_s:
                break
            failed |= turns.go_round(backwards=count % 2 == 1)
        turns.end()
        for family, child in children.items():
            try:
                if family not in failed:
                    child.wait(FAMILY_S)
                    found.update(_answer(run, family, 1))
            except BenchError as error:
                failed[family] = str(error)
            if family in failed and family == "ours":
                raise BenchError(f"ours {failed[family]}: {child.last_words()}")
    return failed


def _start(
    run: Run,
    family: str,
    world: int,
    rank: int,
    nbytes: int,
    within_s: float,
    places: dict[str, Any],
    turns: Path | None = None,
) -> Child:
    """A process that trains and measures as one rank."""
    home = _home(run, family, world)
    home.mkdir(exist_ok=True)
    path = home / f"spec-{rank}.json"
    spec = {
        "family": family,
        "nbytes": nbytes // world,
        "world": world,
        "rank": rank,
        "cores": 1 if run.short else len(os.sched_getaffinity(0)),
        "rounds": 2 if run.short else _ROUNDS,
        "turns": str(turns or ""),
        "within_s": 2 if run.short else within_s,
        "home": str(home / str(rank)),
        "answer": str(home / f"answer-{rank}.json"),
        "store": str(home / "store"),
        "path": [str(_peers_directory())],
        "places": places,
    }
    path.write_text(json.dumps(spec))
    arguments = ["-m", f"{__package__.rpartition('.')[0]}.peers.trainer", str(path)]
    environment = {**clean_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    return run.start(f"{family}-{world}-{rank}", arguments, env=environment)


def _home(run: Run, family: str, world: int) -> Path:
    return run.directory / f"{family}-{world}"


def _answer(run: Run, family: str, world: int) -> Found:
    home = _home(run, family, world)
    found: Found = json.loads((home / "answer-0.json").read_text())["systems"]
    shutil.rmtree(home)
    return found


def _bytes(run: Run) -> int:
    return run.size(_STATE_BYTES) // (5 if run.short else 1)


def _clusters(run: Run, world: int, nbytes: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Clusters for our systems: with two ranks all that there is, with one what others do, too; their processes."""
    pids: list[int] = []

    def place(name: str, level: str, lacks: str, **options: Any) -> dict[str, Any]:
        home = run.directory / f"{name.replace(' ', '-')}-{world}"
        # Two slots and two parities, and some more.
        budget = str(5 * nbytes // world + (64 << 20))
        cluster = stack.enter_context(Cluster(home, world, m=world - 1, budget=budget, **options))
        sockets = [str(node.socket) for node in cluster.nodes]
        pids.extend(cluster.pids)
        return {"name": name, "sockets": sockets, "coordinator": cluster.address, "level": level, "lacks": lacks}

    if world > 1:
        found = [place(OURS, "protected", "")]
    else:
        found = [place(OURS, "sealed", "redundancy")]
        if not run.short:
            program = f"{__package__.rpartition('.')[0]}.peers.undigested"
            found.append(place(UNDIGESTED, "sealed", "digests, redundancy", program=program))
    return {"clusters": found, "pids": pids, "bare": world == 1 and not run.short}


def _peers_directory() -> Path:
    default = Path(__file__).resolve().parents[2] / ".venv" / "peers"
    return Path(os.environ.get(DIRECTORY_VARIABLE) or default)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or (_peers_directory() / module).is_dir()
