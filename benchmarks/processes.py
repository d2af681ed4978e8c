"""
Child processes that end with us, whatever happens, by their pid; and one directory in tmpfs for all that a run leaves.

Each child dies with its parent (PR_SET_PDEATHSIG), orphans of killed children come back to the run (subreaper), and the
run ends all that descends from it. A directory whose run is gone is swept by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = [
    "BenchError", "Child", "adopt_orphans", "cpu_seconds", "die_with_parent", "end_descendants", "make_directory",
    "wait_for",
]  # fmt: skip

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PREFIX = "snapshotd-bench-"
_LIBC = ctypes.CDLL(None, use_errno=True)
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


class BenchError(Exception):
    """Something that a measurement needs did not come about; the message says what."""


def die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """`python ARGUMENTS...` in a session of its own, with a log."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, env: Mapping[str, str], python: str = sys.executable
    ) -> None:
        self.name, self.log = name, log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(env),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal, or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self._process.kill()
        self._process.wait()

    def end(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, then SIGKILL for one that does not listen; returns its exit code."""
        if self.code is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout_s)
            self.kill()
        return self._process.wait()

    def wait(self, timeout_s: float) -> None:
        """Until it ends by itself; BenchError when it does not in time, or ends with an error."""
        wait_for(lambda: self.code is not None, f"{self.name} to end", timeout_s)
        if self.code:
            raise BenchError(f"{self.name} ended with code {self.code}: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "(it said nothing)"


def wait_for(condition: Callable[[], T], what: str, timeout_s: float, *, of: Iterable[Child] = ()) -> T:
    """The first true value of `condition`; BenchError when it does not come in time, or one `of` these ends before."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        for child in of:
            if child.code is not None:
                raise BenchError(f"{child.name} ended with code {child.code}: {child.last_words()}")
        if time.monotonic() > deadline:
            raise BenchError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.002)
    return value


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, that these processes have used so far, by the kernel's ticks (10 ms)."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * _TICK_S


def end_descendants() -> None:
    """SIGKILL every process below this one, and wait until they are gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while processes := psutil.Process().children(recursive=True):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)


def make_directory() -> Path:
    """A new directory in tmpfs (or the temporary directory, where there is no tmpfs); sweeps those of dead runs."""
    shm = Path("/dev/shm")
    home = shm if shm.is_dir() else Path(tempfile.gettempdir())
    for path in home.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if path.stat().st_uid == os.getuid() and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=home))
