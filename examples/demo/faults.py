"""
The faults: whom they kill, and when they count as survived.

Rule 1: a fault strikes in mid-training, at a step that was planned before, and when the newest commit is protected.
Rule 2: what happened is measured, not assumed: exit by SIGKILL, the run's own record, the coordinator's timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from examples.demo.cluster import Cluster, Node
from examples.demo.processes import DemoFailed, kill, wait_for
from examples.demo.watch import Picture, Watcher

__all__ = ["FAULTS", "Outcome", "Plan", "Stage", "plan"]

_STRIKE_S = 120.0
_SURVIVE_S = 90.0


@dataclass(slots=True)
class Outcome:
    """One fault: planned, then struck, then survived. Seconds; phases as the coordinator names them."""

    name: str
    at_step: int
    what: str = ""
    struck_step: int | None = None
    survived: bool = False
    went_on_at: int = -1
    steps_lost: int = 0
    total_s: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def state(self) -> str:
        if self.struck_step is None:
            return "to come"
        return "survived" if self.survived else "recovering"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a list of faults needs. spares: nodes that wait from the start."""

    faults: tuple[str, ...]
    nodes: int
    spares: int
    nnodes: str
    parity: int

    @property
    def changes_world(self) -> bool:
        return bool({"shrink", "grow"} & set(self.faults))


ALL = ("worker", "daemon", "coordinator", "node")


def plan(text: str) -> Plan:
    """The plan for a list like "worker,node"; ValueError that says what can be chosen."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    faults = tuple(one for name in names for one in (ALL if name == "all" else () if name == "none" else (name,)))
    unknown = [name for name in faults if name not in FAULTS]
    if unknown or not names:
        raise ValueError(f"--faults {text!r}: choose all, none, or a list of {', '.join(FAULTS)}")
    if any(name in ("shrink", "grow") for name in faults[:-1]):
        raise ValueError("shrink and grow change the number of workers: only the last fault can be one of them")
    spares = faults.count("node") + 2 * faults.count("nodes2")
    nodes, nnodes = 4, "4:4"
    if "shrink" in faults:
        nnodes = "1:4"
    if "grow" in faults:
        nodes, nnodes = 3, "3:4"
        if spares:
            raise ValueError("grow needs a free place; it cannot be combined with node or nodes2")
    if "shrink" in faults and spares:
        raise ValueError("shrink needs that nobody waits; it cannot be combined with node or nodes2")
    parity = 2 if "nodes2" in faults else 1
    return Plan(faults=faults, nodes=nodes, spares=spares, nnodes=nnodes, parity=parity)


@dataclass(slots=True)
class Stage:
    """Where a fault happens."""

    cluster: Cluster
    watcher: Watcher
    refresh: Callable[[], None]

    @property
    def picture(self) -> Picture:
        return self.watcher.picture

    def play(self, outcome: Outcome) -> None:
        """Wait for the fault's step, strike, and wait until it is survived; DemoFailed otherwise."""
        wait_for(
            lambda: self.picture.step >= outcome.at_step and self._ready(),
            f"step {outcome.at_step}, protected",
            timeout_s=_STRIKE_S,
            each=self._each,
        )
        FAULTS[outcome.name](self, outcome)
        outcome.survived = True
        self.watcher.tell(f"survived: {outcome.note}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(condition, what, timeout_s=_SURVIVE_S, each=self._each)

    def member(self, index: int) -> Node:
        """A node of the present epoch."""
        return self.cluster.nodes[self.picture.members[index]]

    def struck(self, outcome: Outcome, what: str) -> None:
        outcome.what = what
        outcome.struck_step = self.picture.step
        self.watcher.tell(f"{what}, at step {outcome.struck_step}")

    def after_restart(self, outcome: Outcome, began: float, epoch: int, starts: int, world: int) -> None:
        """Wait until workers go on, and take the times."""
        self.until(lambda: len(self.picture.starts) > starts, "the workers to start again")
        self.until(
            lambda: bool(self.picture.losses) and self.picture.losses[-1].time > self.picture.starts[-1].time,
            "the first step after the restore",
        )
        picture = self.picture
        last = picture.starts[-1]
        before = [loss.step for loss in picture.losses if loss.time < picture.starts[starts].time]
        if last.first == 0:
            raise DemoFailed("the job began again at step 0: its state was lost")
        if last.world != world:
            raise DemoFailed(f"the job went on with {last.world} workers instead of {world}")
        first_loss = next(loss for loss in picture.losses if loss.time > last.time)
        outcome.went_on_at = last.first
        outcome.steps_lost = max(before) + 1 - last.first
        outcome.total_s = first_loss.time - began
        self.until(lambda: self._timed(epoch), "the coordinator's timing of the recovery")
        recovery = self.picture.recoveries[max(self.picture.recoveries)]
        outcome.phases = recovery.phases
        again = f"{outcome.steps_lost} step{'s' if outcome.steps_lost != 1 else ''} done again"
        outcome.note = f"training went on with step {last.first} after {outcome.total_s:.1f} s, {again}"

    def goes_on(self, outcome: Outcome, began: float, starts: int, committed: int) -> None:
        """Wait for a newer protected commit, and see that no worker was restarted."""
        self.until(
            lambda: self.picture.protected() and self.picture.committed_step > committed,
            f"a protected commit after step {committed}",
        )
        if len(self.picture.starts) != starts:
            raise DemoFailed(f"training was interrupted by: {outcome.what}")
        outcome.went_on_at = self.picture.step
        outcome.total_s = time.time() - began
        outcome.note = f"training never stopped; protected again after {outcome.total_s:.1f} s"

    def _ready(self) -> bool:
        picture = self.picture
        return picture.protected() and len(picture.members) == picture.job["world_size"]

    def _timed(self, epoch: int) -> bool:
        recoveries = self.picture.recoveries
        newest = max(recoveries, default=-1)
        return newest > epoch and "first_step" in recoveries[newest].phases

    def _each(self) -> None:
        self.refresh()
        self.cluster.check()
        if all(node.launcher.code is not None for node in self.cluster.running()):
            raise DemoFailed("the training ended before that: give it more --steps")


def _worker(stage: Stage, outcome: Outcome) -> None:
    node, before = stage.member(2), stage.picture
    workers = node.workers()
    if not workers:
        raise DemoFailed(f"{node.name} has no worker to kill")
    began = time.time()
    kill(workers)
    stage.struck(outcome, f"killed the worker on {node.name}")
    stage.after_restart(outcome, began, before.epoch, len(before.starts), len(before.members))


def _daemon(stage: Stage, outcome: Outcome) -> None:
    node, before = stage.member(1), stage.picture
    began = time.time()
    node.daemon.kill()
    node.start_daemon()  # as a supervisor would
    stage.struck(outcome, f"killed the daemon of {node.name} and started it again")
    stage.goes_on(outcome, began, len(before.starts), before.step)


def _coordinator(stage: Stage, outcome: Outcome) -> None:
    before = stage.picture
    began = time.time()
    stage.cluster.coordinator.kill()
    stage.struck(outcome, "killed the coordinator and started it again")
    stage.cluster.start_coordinator()
    stage.goes_on(outcome, began, len(before.starts), before.step)


def _nodes(stage: Stage, outcome: Outcome, count: int, *, replaced: bool) -> None:
    before = stage.picture
    lost = [stage.member(index) for index in range(len(before.members) - count, len(before.members))]
    began = time.time()
    for node in lost:
        node.fail()
    names = " and ".join(node.name for node in lost)
    stage.struck(outcome, f"killed all of {names} and removed its memory")
    world = len(before.members) - (0 if replaced else count)
    stage.after_restart(outcome, began, before.epoch, len(before.starts), world)
    still = {node.name for node in lost} & set(stage.picture.members)
    if still:
        raise DemoFailed(f"{', '.join(sorted(still))} should be lost, but is in the epoch")
    new = sorted(set(stage.picture.members) - set(before.members))
    outcome.note += f"; {', '.join(new)} took its place" if new else f"; on {world} nodes"


def _node(stage: Stage, outcome: Outcome) -> None:
    _nodes(stage, outcome, 1, replaced=True)


def _nodes2(stage: Stage, outcome: Outcome) -> None:
    _nodes(stage, outcome, 2, replaced=True)


def _shrink(stage: Stage, outcome: Outcome) -> None:
    _nodes(stage, outcome, 1, replaced=False)


def _grow(stage: Stage, outcome: Outcome) -> None:
    before = stage.picture
    began = time.time()
    node = stage.cluster.add_node(f"n{len(stage.cluster.nodes)}")
    stage.struck(outcome, f"added {node.name}")
    stage.cluster.launch([node])
    stage.after_restart(outcome, began, before.epoch, len(before.starts), len(before.members) + 1)
    outcome.note += f"; on {len(before.members) + 1} nodes"


FAULTS: dict[str, Callable[[Stage, Outcome], None]] = {
    "worker": _worker,
    "daemon": _daemon,
    "coordinator": _coordinator,
    "node": _node,
    "nodes2": _nodes2,
    "shrink": _shrink,
    "grow": _grow,
}
