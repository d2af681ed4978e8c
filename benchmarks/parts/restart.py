"""
Restart: SIGKILL of one of two torchrun workers, until the next step is complete, with snapshotd and with DCP.

Two ranks with FSDP2 on one node. With DCP each step is saved into tmpfs and torchrun forms its groups itself; with
snapshotd each step is captured and its coordinator forms them. Jobs in turns, each killed into once.
What torchrun needs to start workers again, attempts that fail included, is the phase "rendezvous".
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from .. import Row, Run, Series
from ..cluster import clean_environment
from ..processes import BenchError, Child, wait_for

GOAL = 21
SECONDS = 64

BYTES = 300_000_000
JOBS, KILLS = 2, 1
START_S = 25.0
STEPS_BEFORE = 3
"""Steps that must be complete before a worker is killed."""

WHAT = "SIGKILL of a worker to the next step"
PHASES = ("detect", "rendezvous", "imports", "join and build", "restore", "first step")

Notes = dict[int, list[dict[str, Any]]]


def rows(run: Run) -> Iterator[Row]:
    if run.short:
        yield Row.shown(WHAT, _seconds(_restarts(run, "ours", 0, 1), "whole"), unit="s")
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "dcp": []}
    for count in range(JOBS):
        for kind in found if count % 2 == 0 else reversed(found):
            try:
                found[kind] += _restarts(run, kind, count, KILLS)
            except BenchError as error:
                if kind == "ours":
                    raise
                yield Row.note(f"torchrun with DCP, job {count}", f"did not come back: {error}")
    if not found["dcp"]:
        yield Row.shown(WHAT, _seconds(found["ours"], "whole"), unit="s")
        return
    yield _row(WHAT, "whole", found)
    for phase in PHASES:
        yield _row(f"of it: {phase}", phase, found)


def _row(what: str, phase: str, found: dict[str, list[dict[str, float]]]) -> Row:
    ours, dcp = _seconds(found["ours"], phase), _seconds(found["dcp"], phase)
    return Row.cost(what, ours, dcp, at_most=1.0 if phase == "whole" else None, against="torchrun with DCP in tmpfs")


def _seconds(restarts: list[dict[str, float]], phase: str) -> Series:
    return Series(tuple(restart[phase] for restart in restarts))


def _restarts(run: Run, kind: str, count: int, kills: int) -> list[dict[str, float]]:
    job = _Job(run, kind, count)
    found: list[dict[str, float]] = []
    try:
        for _ in range(kills):
            found.append(job.restart())
    except BenchError:
        if kind == "ours" or not found:
            raise
    finally:
        job.end()
    return found


class _Job:
    """One torchrun and its two workers."""

    def __init__(self, run: Run, kind: str, count: int) -> None:
        home = run.directory / f"{kind}-{count}"
        self._kind = kind
        self._notes = home / "notes"
        self._notes.mkdir(parents=True)
        arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "100"]
        environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["TMPDIR"] = str(home)  # where torchrun leaves the directory of its logs
        self._cluster = None
        mode = "ours"
        if kind == "ours":
            self._cluster = run.cluster(1, m=0)
            environment |= self._cluster.environment()
            arguments += ["--rdzv-backend", "snapshotd", "--rdzv-endpoint", self._cluster.address, "--rdzv-id", "bench"]
        else:
            mode = str(home / "checkpoints")
            Path(mode).mkdir()
            # The store that torchrun shares between attempts still has gloo's addresses of the attempt before: most
            # restarts fail once or hang by that. With a store for each attempt all come back.
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            arguments += ["--standalone"]
        module = f"{__package__.rpartition('.')[0]}.peers.restarted"
        arguments += ["-m", module, mode, str(self._notes), str(run.size(BYTES))]
        self._launcher: Child = run.start(f"{kind}-{count}", arguments, env=environment)
        self._known: set[int] = set()

    def restart(self) -> dict[str, float]:
        """Kill one worker in mid-training; returns the seconds by phase and as a whole."""
        workers = self._wait(self._trained, "two workers to train")
        self._known = set(self._read())
        victim, survivor = sorted(workers)
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        process = psutil.Process(survivor)
        self._wait(lambda: not _runs(process), "the other worker to be ended")
        ended = time.time()
        fresh = self._wait(self._stepped, "a step after the restart")
        first = {what: max(_when(notes, what) for notes in fresh.values()) for what in _WORDS}
        return {
            "whole": first["step"] - killed,
            "detect": ended - killed,
            "rendezvous": first["python"] - ended,
            "imports": first["imported"] - first["python"],
            "join and build": first["built"] - first["imported"],
            "restore": first["restored"] - first["built"],
            "first step": first["step"] - first["restored"],
        }

    def end(self) -> None:
        self._launcher.end()
        if self._cluster is not None:
            self._cluster.__exit__()

    def _wait(self, condition: Any, what: str) -> Any:
        return wait_for(condition, f"{what} ({self._kind})", START_S, of=[self._launcher])

    def _read(self) -> Notes:
        found = {}
        for path in self._notes.iterdir():
            text = path.read_text(encoding="utf-8")
            found[int(path.name)] = [json.loads(line) for line in text.split("\n")[:-1]]
        return found

    def _trained(self) -> Notes | None:
        """The workers of now, when both have made some steps."""
        fresh = {pid: notes for pid, notes in self._read().items() if psutil.pid_exists(pid)}
        steps = [sum(note["what"] == "step" for note in notes) for notes in fresh.values()]
        return fresh if len(steps) == 2 and min(steps) >= STEPS_BEFORE else None

    def _stepped(self) -> Notes | None:
        """The two new workers that have made a step; those of attempts that failed at their start do not count."""
        fresh = {pid: notes for pid, notes in self._read().items() if pid not in self._known}
        done = {pid: notes for pid, notes in fresh.items() if any(note["what"] == "step" for note in notes)}
        if len(done) < 2:
            return None
        if not all(note["step"] for notes in done.values() for note in notes if note["what"] == "restored"):
            raise BenchError("a worker began from the start: nothing was restored")
        return done


_WORDS = ("python", "imported", "built", "restored", "step")


def _when(notes: list[dict[str, Any]], what: str) -> float:
    """When a worker first noted that."""
    when: float = next(note["time"] for note in notes if note["what"] == what)
    return when


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
