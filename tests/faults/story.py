"""
Plays a scenario's story on a cluster, and judges how it ended.

A story is a line of sentences, "at 6; kill worker n1; go". The verbs:

at N                      wait until all workers stand still at the end of a step >= N, and the step is committed
go                        let them go on
kill worker|daemon|launcher N..., kill workers, kill coordinator, kill node N...
pause worker N, resume worker N            SIGSTOP, SIGCONT
start daemon|launcher|node N, start coordinator
relaunch SCRIPT N         another job script of the same job, on nodes n0 to n(N-1); those that are gone start anew
universal                 convert the step where all stand still, which is durable; what is launched from now on is a
                          new job that starts from that
dies worker|daemon N, dies coordinator     wait until an armed failpoint has killed it
reached NAME              wait until an armed failpoint has touched {dir}/NAME
flip slot|parity N        flip a bit in what the node holds of the newest committed step
restarted                 wait until workers that were restarted have made a step
redundant                 wait until as many losses can be borne again as there is parity for
persisted [held]          wait until a durable snapshot is there [of the very step where all stand still]
counted NAME              wait until a counter of daemons or job is above 0 in the status
away                      wait until the coordinator counts a node as lost

The oracle. Same script and number of workers: each loss, and at the end each byte of state, is that of an undisturbed
run. Another one: what was restored, gathered from all ranks, is what the step before held, byte by byte.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tests.faults.cluster import PATIENCE_S, Cluster, Options, flip_bit
from tests.faults.notes import Notes
from tests.faults.processes import ROOT

ENDS_S = 120.0
KINDS = {1: "fresh", 2: "memory", 3: "durable", 4: "refused"}
EXIT_LOST = 6

Outcome = Literal["undisturbed", "memory", "durable", "fresh", "refused"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """
    One disaster.

    outcome: "undisturbed": no worker restarts; else where the last restore came from.
    says: a regular expression that the reason of that restore or of the refusal, or a note before it, must match.
    world: number of workers at the end, where it is not that of the beginning.
    exact: the restore must be of the very step of the last `at`, not of an older one.
    """

    name: str
    options: Options
    story: str
    outcome: Outcome
    says: str = ""
    world: int = 0
    exact: bool = False


class Player:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, cluster: Cluster) -> None:
        self.scenario = scenario
        self.cluster = cluster
        self.hold: int | None = None
        self.held = -1
        self.committed_before = -1
        self.relaunched: set[int] = set()  # pids of the workers before

    # ------------------------------------------------------------ the story

    def play(self) -> None:
        self.cluster.start()
        for sentence in filter(None, map(str.strip, self.scenario.story.split(";"))):
            verb, *words = sentence.split()
            try:
                getattr(self, f"_do_{verb}")(*words)
            except AssertionError as error:
                raise AssertionError(f"at {sentence!r} of {self.scenario.story!r}: {error}") from error
        for name, agent in self.cluster.agents.items():
            self.cluster.until(lambda agent=agent: agent.poll() is not None, ENDS_S, f"the launcher {name} ends")

    def _do_at(self, step: str) -> None:
        """Each step that is not captured (it may be: late means skip) is followed by one more."""
        self.hold = int(step)
        idle_polls = 0
        stand = -1

        def stands() -> int | None:
            nonlocal stand, idle_polls
            steps = {notes.holding for notes in self._living_notes()}
            if len(steps) != 1 or None in steps or len(self._living_notes()) != self._world():
                return None
            (here,) = steps
            if here < int(step):
                return None
            if here != stand:
                stand, idle_polls = here, 0
            job = self.cluster.job()
            if (job.get("committed") or {}).get("step", -1) == here:
                return here + 1  # so that step 0 is true
            idle = not job.get("pending", {}).get("sealed") and job.get("pending", {}).get("protecting") is None
            idle_polls = idle_polls + 1 if idle else 0
            if idle_polls > 25 and here < self.scenario.options.steps - 3:
                (self.cluster.directory / f"go-{here}").touch()
                idle_polls = 0
            return None

        self.held = (
            self.cluster.until(stands, PATIENCE_S, lambda: f"a committed step to hold at (stand at {stand})") - 1
        )
        self.committed_before = max(self.committed_before, self.held)

    def _do_go(self) -> None:
        (self.cluster.directory / f"done-{self.hold}").touch()

    def _do_kill(self, what: str, *names: str) -> None:
        cluster = self.cluster
        if what == "coordinator":
            cluster.kill(cluster.coordinator)
            cluster.coordinator.wait(5, "the killed coordinator")
        elif what == "workers":
            cluster.kill_workers(*cluster.workers())
        elif what == "node":
            cluster.kill_node(*names)
        else:
            for name in names:
                if what == "worker":
                    cluster.kill_workers(cluster.worker(name))
                else:
                    process = {"daemon": cluster.daemons, "launcher": cluster.agents}[what]
                    cluster.kill(process[name])
                    process[name].wait(5, f"the killed {what} {name}")
                    if what == "launcher":
                        del cluster.agents[name]

    def _do_pause(self, what: str, name: str) -> None:
        assert what == "worker"
        os.kill(self.cluster.worker(name), signal.SIGSTOP)

    def _do_resume(self, what: str, name: str) -> None:
        assert what == "worker"
        os.kill(self.cluster.worker(name), signal.SIGCONT)

    def _do_start(self, what: str, *names: str) -> None:
        cluster = self.cluster
        if what == "coordinator":
            cluster.start_coordinator()
        for name in names:
            if what in ("daemon", "node"):
                cluster.start_daemon(name)
                cluster.wait_daemon(name)
            if what in ("launcher", "node"):
                cluster.start_agent(name)

    def _do_relaunch(self, script: str, nodes: str) -> None:
        cluster, count = self.cluster, int(nodes)
        self.relaunched = {notes.pid for notes in cluster.notes()}
        cluster.options = replace(cluster.options, script=script, nodes=count, least=count, most=count)
        for name in [f"n{i}" for i in range(count)]:
            if name not in cluster.daemons:
                cluster.start_daemon(name)
                cluster.wait_daemon(name)
            cluster.start_agent(name)

    def _do_universal(self) -> None:
        cluster = self.cluster
        (source,) = [one["path"] for one in cluster.job()["durables"] if one["step"] == self.held]
        cluster.start_path = str(cluster.directory / "universal")
        self._run_cli("convert", source, cluster.start_path, "--to", "universal")
        cluster.job_name = "another"

    def _do_dies(self, what: str, name: str = "", launch: str = "1") -> None:
        cluster = self.cluster
        if what == "coordinator":
            cluster.expect_death(cluster.coordinator, "the coordinator")
        elif what == "daemon":
            cluster.expect_death(cluster.daemons[name], f"daemon {name}")
        else:
            what = f"launch {launch} of the worker on {name} dies"
            cluster.until(lambda: cluster.has_died(name, int(launch)), PATIENCE_S, what)

    def _do_reached(self, name: str) -> None:
        self.cluster.until((self.cluster.directory / name).exists, PATIENCE_S, f"a failpoint touches {name}")

    def _do_flip(self, what: str, name: str) -> None:
        files = sorted((self.cluster.directory / name / "arena").rglob(f"*.{what}"))
        sealed = [path for path in files if path.with_suffix(".rec").exists()]
        assert sealed, f"{name} holds no sealed {what}"
        for seed, path in enumerate(sealed):
            flip_bit(path, seed)

    def _do_restarted(self) -> None:
        def go_on() -> bool:
            return any((notes.first or 0) > max(self.held, 0) and notes.losses for notes in self._living_notes())

        self.cluster.until(go_on, PATIENCE_S, "workers go on from a restore")

    def _do_redundant(self) -> None:
        parity = self.scenario.options.parity
        self.cluster.until(
            lambda: (self.cluster.job().get("margin") or -1) >= parity,
            PATIENCE_S,
            lambda: f"redundancy: {self.cluster.job()}",
        )

    def _do_persisted(self, which: str = "") -> None:
        def persisted() -> bool:
            steps = [durable["step"] for durable in self.cluster.job().get("durables", [])]
            return self.held in steps if which == "held" else bool(steps)

        self.cluster.until(persisted, PATIENCE_S, lambda: f"persisted: {self.cluster.job()}")

    def _do_counted(self, name: str) -> None:
        def count() -> int:
            status = self.cluster.status()
            nodes = sum(node["counters"].get(name, 0) for node in status.get("nodes", []))
            return nodes + sum(job["counts"].get(name, 0) for job in status.get("jobs", []))

        self.cluster.until(count, PATIENCE_S, lambda: f"{name} is counted: {self.cluster.status()}")

    def _do_away(self) -> None:
        def lost() -> bool:
            return any(node["state"] == "dead" for node in self.cluster.status().get("nodes", []))

        self.cluster.until(lost, PATIENCE_S, "a node is lost")

    def _do_cli(self) -> None:
        text = self._run_cli("status", "--json", "--coordinator", self.cluster.address)
        assert json.loads(text)["jobs"], text

    def _run_cli(self, *words: str) -> str:
        """The real command, as a process of its own; returns what it says."""
        command = [sys.executable, "-m", "snapshotd", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _living_notes(self) -> list[Notes]:
        living = set(self.cluster.workers())
        return [notes for notes in self.cluster.notes() if notes.pid in living]

    def _world(self) -> int:
        return max((notes.world for notes in self._living_notes()), default=-1)

    # ------------------------------------------------------------ the verdict

    def judge(self, reference: Callable[[Options], list[Notes]]) -> None:
        scenario, cluster = self.scenario, self.cluster
        job = cluster.job()
        decided = job.get("restore", {}).get("decided") or {}
        words = f"{decided.get('reason', '')}\n{(cluster.directory / 'coordinator.log').read_text()}"
        codes = {name: agent.returncode for name, agent in cluster.agents.items()}
        if scenario.outcome == "refused":
            assert dict.fromkeys(codes, EXIT_LOST) == codes, f"exit codes {codes}"
            assert re.search(scenario.says, words), f"no word of {scenario.says!r} in {decided}"
            assert not [notes for notes in cluster.notes() if notes.end], "a refused job ended as if all were well"
            return
        assert dict.fromkeys(codes, 0) == codes, f"exit codes {codes}"
        notes = cluster.notes()
        undisturbed = reference(scenario.options)
        world = scenario.world or len(undisturbed)
        final = {one.rank: one for one in notes if one.end}
        assert set(range(world)) == set(final), "not every rank reached the end"
        assert {world} == {one.world for one in final.values()}
        self.judge_numbers(notes, undisturbed)
        self._judge_outcome(final, decided)
        assert re.search(scenario.says, words), f"no word of {scenario.says!r} in {decided}"
        # It came out right, but on the way a restore may have waited for nothing until it gave up.
        assert "could not restore" not in words, re.findall(".*could not restore.*", words)

    def judge_numbers(self, notes: list[Notes], undisturbed: list[Notes]) -> None:
        """Every loss and every byte of state that can be compared."""
        self._judge_losses(notes, undisturbed)
        self._judge_restores(notes, undisturbed)
        if all(_is_alike(one, undisturbed) for one in notes):
            for one in notes:
                if one.end:
                    expected = undisturbed[one.rank].end["local"]
                    _assert_equal(expected, one.end["local"], f"final state of rank {one.rank}")

    def _judge_losses(self, notes: list[Notes], undisturbed: list[Notes]) -> None:
        """Each step that anybody made, also one that was lost later, on the way of the undisturbed run."""
        changed = False
        for one in notes:
            changed = changed or not _is_alike(one, undisturbed)
            if changed:
                continue  # after a change of layout the sums differ; the restored state is judged instead
            expected = {step: undisturbed[one.rank].losses[step] for step in one.losses}
            _assert_equal(expected, one.losses, f"losses of rank {one.rank} from step {one.first} on")

    def _judge_restores(self, notes: list[Notes], undisturbed: list[Notes]) -> None:
        """What was restored, also onto another layout, gathered, is what the step before held."""
        truth = dict(undisturbed[0].traces)
        for one in notes:
            if one.rank != 0:
                continue
            if one.first and one.restored["full"] is not None:
                assert one.first - 1 in truth, f"restored step {one.first - 1}, which nobody traced"
                _assert_equal(truth[one.first - 1], one.restored["full"], f"the whole state restored at {one.first}")
            truth |= one.traces

    def _judge_outcome(self, final: dict[int, Notes], decided: dict[str, object]) -> None:
        scenario = self.scenario
        (first,) = {one.first for one in final.values()}
        if scenario.outcome == "undisturbed":
            assert first == 0
            launched = [notes for notes in self.cluster.notes() if notes.first is not None]
            assert len(final) == len(launched), "a worker was restarted"
            return
        assert (scenario.outcome, first - 1 if first else None) == (
            KINDS[decided["kind"]], decided["source"][1] if decided["source"] else None,
        ), decided  # fmt: skip
        if scenario.outcome == "memory":
            told = f"step {self.committed_before} was committed, {first - 1} was restored"
            assert first > self.committed_before, told
        if scenario.outcome == "durable":
            assert decided["lost_steps"] == self.held + 1 - first, decided
        if self.relaunched:
            assert self.cluster.committed > self.held, f"nothing was committed after step {self.held}"
            afresh = [one.pid for one in self.cluster.notes() if one.pid not in self.relaunched and not one.first]
            assert not afresh, f"workers {afresh} began at step 0"
        if scenario.exact:
            assert first == self.held + 1, f"held at {self.held}, went on from {first}"


def _is_alike(one: Notes, undisturbed: list[Notes]) -> bool:
    """Whether this worker did the same sums as those of the undisturbed run."""
    return (one.script, one.world) == (undisturbed[0].script, len(undisturbed))


def _assert_equal(expected: dict, found: dict, what: str) -> None:
    if expected != found:
        differing = sorted(str(key) for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise AssertionError(f"{what}: {len(differing)} of {len(expected)} differ: {', '.join(differing[:12])}")
