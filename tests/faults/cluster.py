"""
One scenario's cluster: a coordinator, daemons, torchrun launchers and workers, all real processes on loopback.

A "node" here is what a machine would run: a daemon with its arena, a launcher, the launcher's workers. Everything of a
scenario lies in one directory in tmpfs, and `close` proves that nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from snapshotd.rpc import open_channel
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc
from tests.faults.notes import SCRIPTS, Notes, read_notes
from tests.faults.processes import (
    ROOT,
    Process,
    Zygotes,
    alive,
    answers,
    clean_environment,
    command_of,
    free_port,
    stat,
    until,
)

JOB = "job"

PATIENCE_S = 100.0
"""For what must come: a deadline that only a bug misses, also where other work takes most of the machine."""

T = TypeVar("T")


@dataclass
class Options:
    """How a scenario's cluster is set up; the rest is the same for all."""

    nodes: int = 3
    spares: int = 0
    least: int | None = None
    most: int | None = None
    workers: int = 1
    parity: int = 1
    script: str = "fsdp2.py"
    arguments: tuple[str, ...] = ()
    steps: int = 14
    holds: tuple[int, ...] = ()
    trace: bool = False
    persist_every: int = 0
    generations: int = 0
    scrub: bool = False
    daemon_flags: tuple[str, ...] = ()
    coordinator_flags: tuple[str, ...] = ()
    arm: Mapping[str, str] = field(default_factory=dict)
    real: bool = False
    backend: str = "snapshotd"

    @property
    def script_argv(self) -> list[str]:
        return [str(SCRIPTS / self.script), "--steps", str(self.steps), *self.arguments]


class Cluster:
    """The processes of one scenario."""

    def __init__(self, zygotes: Zygotes, options: Options) -> None:
        self.zygotes = zygotes
        self.options = options
        self.directory = Path(tempfile.mkdtemp(prefix="sdf-", dir="/dev/shm"))
        self.pids_file = self.directory / "pids"
        self.pids_file.touch()
        self.address = ""
        self.coordinator: Process | None = None
        self.daemons: dict[str, Process] = {}
        self.agents: dict[str, Process] = {}
        self.job_name = JOB
        self.start_path = ""
        self.committed = -1  # the newest committed step that anybody has seen
        self.armed_once: set[str] = set()
        self._started: list[Process] = []
        self._expected_deaths: set[int] = set()
        self._channel: grpc.Channel | None = None

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        names = [f"n{i}" for i in range(self.options.nodes + self.options.spares)]
        if self.options.backend == "snapshotd":
            self.start_coordinator()
            for name in names:
                self.start_daemon(name)
            for name in names:
                self.wait_daemon(name)
        else:
            self.address = f"127.0.0.1:{free_port()}"
        for name in names[: self.options.nodes]:
            self.start_agent(name)
        if self.options.spares:
            # The first members are told from the spares by who comes first.
            self.until(lambda: len(self.job().get("members", [])) > 0, PATIENCE_S, "the first epoch is agreed on")
            for name in names[self.options.nodes :]:
                self.start_agent(name)

    def start_coordinator(self) -> None:
        file = self.directory / "address"
        file.unlink(missing_ok=True)
        argv = [
            "coordinator", "--listen", self.address or "127.0.0.1:0", "--state", str(self.directory / "state"),
            "--parity", str(self.options.parity), "--node-lease", "1", "--agent-lease", "1", "--last-call", "0.3",
            "--startup-grace", "3", "--restore-wait", "15", "--address-file", str(file),
            *self.options.coordinator_flags,
        ]  # fmt: skip
        self.coordinator = self._launch("snapshotd", argv, self._env("", self._arm("coordinator")), "coordinator")
        until(lambda: file.exists() or self.coordinator.poll() is not None, PATIENCE_S, "the coordinator serves")
        assert self.coordinator.poll() is None, "the coordinator ended at its start"
        self.address = file.read_text().strip()

    def start_daemon(self, name: str) -> None:
        home = self.directory / name
        home.mkdir(mode=0o700, exist_ok=True)
        argv = [
            "daemon", "--coordinator", self.address, "--node-id", name, "--listen", "127.0.0.1:0",
            "--socket", str(home / "s"), "--arena", str(home / "arena"), "--budget", "64MiB",
            "--scrub-rate", "64MiB" if self.options.scrub else "0",
            *(["--generations", str(self.options.generations)] if self.options.generations else []),
            *(["--persist", str(self.directory / "durable"), "--persist-every", str(self.options.persist_every)]
              if self.options.persist_every else []),
            *self.options.daemon_flags,
        ]  # fmt: skip
        env = self._env(name, self._arm(f"daemon {name}"))
        self.daemons[name] = self._launch("snapshotd", argv, env, f"daemon-{name}")

    def wait_daemon(self, name: str) -> None:
        process, path = self.daemons[name], self.directory / name / "s"
        until(lambda: answers(path) or process.poll() is not None, PATIENCE_S, f"the daemon {name} serves")
        assert process.poll() is None, f"the daemon {name} ended at its start"

    def start_agent(self, name: str) -> None:
        options = self.options
        least = options.least if options.least is not None else options.nodes
        most = options.most if options.most is not None else options.nodes
        argv = [
            "--nnodes", f"{least}:{most}", "--nproc-per-node", str(options.workers), "--max-restarts", "100",
            "--monitor-interval", "0.05", "--rdzv-backend", options.backend, "--rdzv-endpoint", self.address,
            "--rdzv-id", self.job_name,
        ]  # fmt: skip
        env = self._env(name, "")
        env["FAULTS_ARM"] = self._arm(f"worker {name}")
        env["SNAPSHOTD_START"] = self.start_path
        if options.backend == "c10d":
            argv += ["--rdzv-conf", f"is_host={int(name == 'n0')},join_timeout=30,last_call_timeout=1"]
        argv += options.script_argv if options.real else ["--no-python", str(self.zygotes.shim), *options.script_argv]
        self.agents[name] = self._launch("torchrun", argv, env, f"agent-{name}")

    def _launch(self, kind: str, argv: list[str], env: dict[str, str], name: str) -> Process:
        log = self.directory / f"{name}.log"
        if self.options.real:
            module = {"snapshotd": "snapshotd", "torchrun": "torch.distributed.run"}[kind]
            with open(log, "a") as out:
                child = subprocess.Popen(
                    [sys.executable, "-m", module, *argv],
                    env=env,
                    cwd=ROOT,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            process = Process(child.pid, child.poll, log)
        else:
            process = self.zygotes.fork(kind, argv, env, log)
        self._started.append(process)
        return process

    def _env(self, node: str, failpoints: str) -> dict[str, str]:
        env = {
            **clean_environment(),
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHELASTIC_LOG_LEVEL": "WARNING",
            "FAULTS_DIR": str(self.directory),
            "FAULTS_NODE": node,
            "FAULTS_PIDS": str(self.pids_file),
            "FAULTS_ZYGOTE": str(self.zygotes.socket("script")),
            "FAULTS_HOLD": ",".join(map(str, self.options.holds)),
            "FAULTS_TRACE": "1" if self.options.trace else "",
            "SNAPSHOTD_FAILPOINTS": failpoints,
            "SNAPSHOTD_CONNECT_TIMEOUT_S": "10",
        }
        if node:
            env["SNAPSHOTD_SOCKET"] = str(self.directory / node / "s")
        if self.options.backend == "c10d":
            env["FAULTS_STUB"] = str(SCRIPTS / "stub.py")
        return env

    def _arm(self, who: str) -> str:
        """The failpoints of a process; those of daemons and coordinator are armed at their first start only."""
        if who in self.armed_once:
            return ""
        self.armed_once.add(who)
        return self.options.arm.get(who, "").replace("{dir}", str(self.directory))

    # ------------------------------------------------------------ looking

    def until(self, condition: Callable[[], T], seconds: float, what: Callable[[], str] | str) -> T:
        """`until`, but fail at once when a process died that nobody killed."""

        def checked() -> T:
            self.check_alive()
            return condition()

        return until(checked, seconds, what)

    def check_alive(self) -> None:
        everyone = {"coordinator": self.coordinator, **{f"daemon {n}": p for n, p in self.daemons.items()}}
        for name, process in everyone.items():
            if process is not None and process.pid not in self._expected_deaths:
                assert process.poll() is None, f"the {name} ended by itself ({process.returncode})"

    def status(self) -> dict[str, Any]:
        """What the coordinator says; {} while there is none."""
        if self._channel is None:
            self._channel = open_channel(self.address, tls=None, insecure=False)
        try:
            stub = control_grpc.CoordinatorServiceStub(self._channel)
            status = json.loads(stub.GetStatus(control.GetStatusRequest(), timeout=2).json)
        except grpc.RpcError:
            return {}
        for job in status["jobs"]:
            if job["committed"] is not None:
                self.committed = max(self.committed, job["committed"]["step"])
        return status

    def job(self) -> dict[str, Any]:
        return next((job for job in self.status().get("jobs", []) if job["job"] == self.job_name), {})

    def notes(self) -> list[Notes]:
        return read_notes(self.directory)

    def workers(self, node: str | None = None) -> list[int]:
        """Pids of the living worker processes (of a node): the real ones, not their shims."""
        return [pid for pid, kind, name in self._forked() if kind == "script" and node in (None, name) and alive(pid)]

    def has_died(self, node: str, launch: int) -> bool:
        """Whether the worker of the node's n-th launch (1 is the first) has ended."""
        launched = [pid for pid, kind, name in self._forked() if kind == "script" and name == node]
        return len(launched) >= launch and not alive(launched[launch - 1])

    def _forked(self) -> Iterator[tuple[int, str, str]]:
        """Every child of a zygote and, without zygotes, every worker that noted something."""
        for line in self.pids_file.read_text().splitlines():
            pid, kind, node = (line.split(" ") + [""])[:3]
            yield int(pid), kind, node
        if self.options.real:
            for notes in self.notes():
                yield notes.pid, "script", notes.node

    # ------------------------------------------------------------ disasters

    def kill(self, process: Process) -> None:
        self._expected_deaths.add(process.pid)
        process.signal(signal.SIGKILL)

    def expect_death(self, process: Process, what: str, seconds: float = 20) -> None:
        """A failpoint kills this process by itself."""
        self._expected_deaths.add(process.pid)
        code = process.wait(seconds, what)
        assert code == -signal.SIGKILL, f"{what} ended with {code}, not by its failpoint"

    def worker(self, node: str) -> int:
        """The pid of the node's first living worker."""
        pids = self.workers(node)
        assert pids, f"no worker lives on {node}"
        return pids[0]

    def kill_workers(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(alive, pids)), 5, "killed workers are dead")

    def kill_node(self, *nodes: str) -> None:
        """Power off: daemon, launcher and workers at once, and what was in their memory is gone."""
        doomed = []
        for node in nodes:
            for process in (self.daemons.get(node), self.agents.get(node)):
                if process is not None:
                    self._expected_deaths.add(process.pid)
                    doomed.append(process.pid)
            doomed += [*self._shims(node), *self.workers(node)]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in nodes:
            self.daemons[node].wait(5, f"killed daemon {node}")
            if node in self.agents:
                self.agents[node].wait(5, f"killed launcher {node}")
            # The launcher may have started another worker in its last moment.
            until(lambda node=node: self._sweep(node), 5, f"nothing lives on {node}")
            shutil.rmtree(self.directory / node)
            self.daemons.pop(node)
            self.agents.pop(node, None)

    def _sweep(self, node: str) -> bool:
        living = [*self._shims(node), *self.workers(node)]
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not living

    def _shims(self, node: str) -> list[int]:
        mark = f"FAULTS_NODE={node}\0".encode()
        return [pid for pid, environ in self._mine() if mark in environ and pid not in {p.pid for p in self._started}]

    def _mine(self) -> Iterator[tuple[int, bytes]]:
        """Processes that were started (by exec) with this scenario's directory in their environment."""
        mark = f"FAULTS_DIR={self.directory}\0".encode()
        for entry in os.listdir("/proc"):
            if entry.isdecimal() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    environ = Path(f"/proc/{entry}/environ").read_bytes()
                    if mark in environ and alive(int(entry)):
                        yield int(entry), environ

    # ------------------------------------------------------------ ending

    def close(self, *, orderly: bool) -> list[str]:
        """
        End everything; returns what went wrong with that: processes or files that stayed.

        orderly: launchers have ended, daemons and coordinator are to end by SIGTERM with exit code 0.
        """
        trouble = []
        if self._channel is not None:
            self._channel.close()
        if orderly:
            services = [*self.daemons.items(), *([("coordinator", self.coordinator)] if self.coordinator else [])]
            living = [(name, process) for name, process in services if process.poll() is None]
            for _, process in living:
                process.signal(signal.SIGTERM)
            for name, process in living:
                try:
                    code = process.wait(10, name)
                    if code != 0:
                        trouble.append(f"{name} ended with {code} on SIGTERM")
                except AssertionError as error:
                    trouble.append(str(error))
            with contextlib.suppress(AssertionError):
                until(lambda: not self._left(), 8, "")  # forked DataLoader workers see their parent's death after 5 s
            trouble += [f"left behind: {command_of(pid)} (pid {pid})" for pid in self._left()]
            trouble += [f"left behind: {path}" for path in self._stray_files()]
            sockets = [str(path) for path in self.directory.rglob("*") if path.is_socket()]
            dead = {str(self.directory / name / "s") for name, p in self.daemons.items() if p.returncode == 0}
            trouble += [f"a socket stays behind: {path}" for path in sockets if path in dead]
        for pid in {process.pid for process in self._started if process.poll() is None} | set(self._left()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self._left(), 10, "everything is killed")
        for process in self._started:
            process.wait(5, "a process of the scenario")
        return trouble

    def remove(self) -> None:
        if not os.environ.get("FAULTS_KEEP"):
            shutil.rmtree(self.directory, ignore_errors=True)

    def _left(self) -> list[int]:
        """Living processes of this scenario: started, forked by a zygote, or children of these."""
        sessions = {process.pid for process in self._started} | {pid for pid, _, _ in self._forked()}
        left = {pid for pid, _ in self._mine()}
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                state, session = stat(int(entry))
                if session in sessions and state not in ("Z", "X", ""):
                    left.add(int(entry))
        return sorted(left)

    def _stray_files(self) -> list[str]:
        """Shared memory outside of the scenario's directory that carries the pid of one of its processes."""
        pids = {str(process.pid) for process in self._started} | {str(pid) for pid, _, _ in self._forked()}
        # As torch and Python name theirs; a number in anybody else's name is as likely a port of another program.
        ours = (re.match(r"(?:torch|psm|pymp|sem\.mp|snapshotd)\D*([0-9]+)", name) for name in os.listdir("/dev/shm"))
        return [found.string for found in ours if found is not None and found[1] in pids]

    def logs(self, lines: int = 40) -> str:
        """The tails of all logs, for a failure's report."""
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"---------- {path.name}\n" + "\n".join(line[:400] for line in tail))
        return "\n".join(parts)


def flip_bit(path: Path, seed: int) -> None:
    """Flip one bit somewhere in the second half of a file, in place, as a memory fault would."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        at = random.Random(seed).randrange(size // 2, size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
