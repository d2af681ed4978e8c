"""
Child processes: each in a session of its own, with a log, and ended by its pid.

Orphans of killed launchers come back to us (PR_SET_CHILD_SUBREAPER), so that nothing outlives the demo.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["Child", "DemoFailed", "adopt_orphans", "descendants", "end_all", "kill", "wait_for"]

_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36


class DemoFailed(Exception):
    """The demo cannot show what it promises; the message says why."""


class Child:
    """One process, which may be started again under the same name; its log grows."""

    def __init__(self, name: str, arguments: Sequence[str], *, environment: Mapping[str, str], logs: Path) -> None:
        self.name = name
        self.arguments = [sys.executable, *arguments]
        self.log = logs / f"{name}.log"
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs (or was never started)."""
        return None if self._process is None else self._process.poll()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        if self._process.returncode != -signal.SIGKILL:
            raise DemoFailed(f"{self.name} was to be killed, but had ended before with code {self._process.returncode}")

    def terminate(self, timeout_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL for those that do not listen."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def adopt_orphans() -> None:
    """Let processes whose parent dies become our children (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All processes below this one (default: us)."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL them all and wait until they are gone (psutil checks that a pid was not given to somebody else)."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(processes, timeout=10)
    if left:
        raise DemoFailed(f"these processes do not die: {', '.join(str(process.pid) for process in left)}")


def end_all() -> None:
    """End every descendant of ours."""
    while processes := [process for process in descendants() if process.status() != psutil.STATUS_ZOMBIE]:
        kill(processes)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def wait_for(
    condition: Callable[[], bool], what: str, *, timeout_s: float, each: Callable[[], None] = lambda: None
) -> None:
    """
    Return when `condition` holds; DemoFailed that says `what` was waited for when it does not in time.

    each: called between looks; it may raise to give up earlier.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        each()
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {timeout_s:.0f} s in vain for {what}")
        pause.wait(_POLL_S)
