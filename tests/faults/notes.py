"""
What workers note (tests/scripts/lab.py), and the notes of a run that nobody disturbed:
what all others are compared with.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.processes import ROOT, Process, Zygotes, clean_environment, free_port

SCRIPTS = ROOT / "tests" / "scripts"
_REFERENCE_RETRIES = 2


@dataclass
class Notes:
    """What one worker process noted (tests/scripts/lab.py)."""

    rank: int
    world: int
    node: str
    pid: int
    script: str
    first: int | None = None
    restored: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, str] = field(default_factory=dict)
    traces: dict[int, dict[str, str]] = field(default_factory=dict)
    holding: int | None = None
    end: dict[str, Any] | None = None

    @property
    def last(self) -> int:
        return max(self.losses, default=-1)


def read_notes(directory: Path) -> list[Notes]:
    """The notes of all worker processes, oldest first."""
    found = []
    for path in sorted(directory.glob("notes.*")):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        if not lines:
            continue
        notes = Notes(**{name: lines[0][name] for name in ("rank", "world", "node", "pid", "script")})
        for line in lines[1:]:
            if line["kind"] == "restored":
                notes.first, notes.restored = line["first"], line
            elif line["kind"] == "step":
                notes.losses[line["step"]] = line["loss"]
                notes.holding = None
                if line["full"] is not None:
                    notes.traces[line["step"]] = line["full"]
            elif line["kind"] == "hold":
                notes.holding = line["step"]
            else:
                notes.end = line
        found.append(notes)
    return found


def reference(zygotes: Zygotes, script_argv: list[str], world: int) -> list[Notes]:
    """
    The notes of a run that nobody disturbed, by rank, with the whole state traced at each step.

    Plain processes with a rank each: no launcher, and in place of snapshotd_client a stub that does nothing. Where one
    of them is ended by a signal (SIGSEGV, once), that says nothing of us, and all begin anew; twice at most.
    """
    for _ in range(_REFERENCE_RETRIES):
        with contextlib.suppress(_Crashed):
            return _reference(zygotes, script_argv, world)
    return _reference(zygotes, script_argv, world)


class _Crashed(AssertionError):
    """A process of the reference run was ended by a signal."""


def _reference(zygotes: Zygotes, script_argv: list[str], world: int) -> list[Notes]:
    directory = Path(tempfile.mkdtemp(prefix="sdr-", dir="/dev/shm"))
    processes: list[Process] = []
    try:
        port = str(free_port())
        for rank in range(world):
            env = {
                **clean_environment(),
                "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GLOO_SOCKET_IFNAME": "lo",
                "FAULTS_DIR": str(directory), "FAULTS_TRACE": "1", "FAULTS_STUB": str(SCRIPTS / "stub.py"),
                "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            processes.append(zygotes.fork("script", script_argv, env, directory / f"{rank}.log"))
        for rank, process in enumerate(processes):
            code = process.wait(60, f"rank {rank} of the reference run")
            if code != 0:
                said = (directory / f"{rank}.log").read_text()[-4000:]
                raise (_Crashed if code < 0 else AssertionError)(f"the reference run failed ({code}):\n{said}")
        return sorted(read_notes(directory), key=lambda notes: notes.rank)
    finally:
        for process in processes:
            process.signal(signal.SIGKILL)
            process.wait(10, "what is left of the reference run")
        shutil.rmtree(directory)
