"""
Processes of a scenario: forked by zygotes, which have imported everything already, and looked at by their pid.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float, what: Callable[[], str] | str) -> T:
    """The first true value of `condition`; AssertionError says what did not happen in time. The only wait there is."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.01)


class Process:
    """One process that the harness started, by a zygote or by exec."""

    def __init__(self, pid: int, poll: Callable[[], int | None], log: Path) -> None:
        self.pid = pid
        self.log = log
        self._poll = poll
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """None while it runs, else its exit code, or minus the signal."""
        if self.returncode is None:
            self.returncode = self._poll()
        return self.returncode

    def signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float, what: str) -> int:
        until(lambda: self.poll() is not None, seconds, f"{what} (pid {self.pid}) ends")
        assert self.returncode is not None
        return self.returncode


class Zygotes:
    """The zygotes of a test session, and the shim that torchrun starts as its worker."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sdz-", dir="/dev/shm"))
        env = {**clean_environment(), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self._processes = {}
        for kind in ("script", "torchrun", "snapshotd"):
            with open(self.directory / f"{kind}.log", "w") as log:
                self._processes[kind] = subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.zygote", kind, str(self.socket(kind)), str(os.getpid())],
                    env=env,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        self.shim = self._make_shim()
        for kind, process in self._processes.items():
            until(
                lambda kind=kind, process=process: self.socket(kind).exists() or process.poll() is not None,
                60,
                f"zygote {kind} is ready",
            )
            assert process.poll() is None, (self.directory / f"{kind}.log").read_text()

    def socket(self, kind: str) -> Path:
        return self.directory / f"{kind}.sock"

    def fork(self, kind: str, argv: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT) -> Process:
        """A child of a zygote; its process starts at once."""
        words = [str(cwd), str(len(argv)), *argv, *(f"{name}={value}" for name, value in env.items())]
        payload = b"".join(os.fsencode(word) + b"\0" for word in words)
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self.socket(kind)))
        request = struct.pack("<I", len(payload)) + payload
        with open(log, "a") as out, open(os.devnull) as null:
            fds = array.array("i", [null.fileno(), out.fileno(), out.fileno()])
            sent = link.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            link.sendall(request[sent:])
        link.settimeout(30)
        answer = b""
        while not answer.endswith(b"\n"):
            data = link.recv(1)
            assert data, f"the zygote {kind} refused: {(self.directory / f'{kind}.log').read_text()}"
            answer += data
        link.setblocking(False)
        heard = b""

        def poll() -> int | None:
            nonlocal heard
            try:
                data = link.recv(64)
            except BlockingIOError:
                return None
            heard += data
            if not heard.endswith(b"\n"):
                assert data, f"the zygote {kind} is gone"
                return None
            link.close()
            number = int(heard[1:])
            return number if heard[:1] == b"E" else -number

        return Process(int(answer[1:]), poll, log)

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(10)
        shutil.rmtree(self.directory)

    def _make_shim(self) -> Path:
        target = self.directory / "worker"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler and subprocess.run([compiler, "-O1", "-o", target, HERE / "shim.c"], check=False).returncode == 0:
            return target
        target.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{HERE / "shim.py"}" "$@"\n')
        target.chmod(0o700)
        return target


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that steers torchrun or snapshotd."""
    unwanted = ("SNAPSHOTD_", "TORCHELASTIC_", "FAULTS_", "PYTEST_")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    # Values of the wanted names only: pytest sets and takes away its own beside our threads.
    return {name: os.environ[name] for name in os.environ if not name.startswith(unwanted) and name not in ranks}


def alive(pid: int) -> bool:
    return stat(pid)[0] not in ("Z", "X", "")


def stat(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", -1
    return fields[0], int(fields[3])


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
    return "?"


def answers(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
