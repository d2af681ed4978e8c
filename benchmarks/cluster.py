"""A coordinator and daemons on loopback, as their users start them: real processes, each with its own arena."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .processes import Child, wait_for

__all__ = ["Cluster", "Node", "clean_environment"]

_START_S = 60.0


class Node:
    """One daemon: its socket for workers, its arena, its process."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.socket = home / "s"
        self.arena = home / "arena"
        self.process: Child

    @property
    def pid(self) -> int:
        return self.process.pid


class Cluster:
    """
    One coordinator and daemons n0, n1, ...; a context manager that serves when entered.

    m: parity. generations: slots per rank (0: the daemon's default). daemon, coordinator: more flags for them.
    program: the module that daemons are started from.
    """

    def __init__(
        self,
        home: Path,
        nodes: int,
        *,
        m: int = 1,
        budget: str = "0",
        generations: int = 0,
        daemon: Sequence[str] = (),
        coordinator: Sequence[str] = (),
        program: str = "snapshotd",
    ) -> None:
        home.mkdir(parents=True)
        self.home = home
        self.address = ""
        self.nodes = [Node(f"n{i}", home / f"n{i}") for i in range(nodes)]
        self._m = m
        self._daemon_flags = ["--budget", budget, "--generations", str(generations), "--scrub-rate", "0", *daemon]
        self._coordinator_flags = list(coordinator)
        self._program = program
        self._stack = ExitStack()
        self.coordinator: Child

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.home, ignore_errors=True)
            self.coordinator = self._start_coordinator()
            stack.callback(self.coordinator.end)
            for node in self.nodes:
                self.start_daemon(node)
                stack.callback(lambda node=node: node.process.end())
            for node in self.nodes:
                wait_for(lambda node=node: _answers(node.socket), f"daemon {node.name}", _START_S, of=[node.process])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        """Those of the coordinator and all daemons, for `Run.rounds(pids=...)`."""
        return [self.coordinator.pid, *(node.pid for node in self.nodes)]

    def settings(self, node: int = 0, *, job: str = "bench", rank: int = 0, world_size: int = 1, **more: Any) -> Any:
        """Settings for a `Snapshotter` in this process that belongs to that node (imports the client)."""
        from snapshotd_client.settings import Settings

        found = {"formation": "bench", "copy_threads": 1, **more}
        return Settings(socket=str(self.nodes[node].socket), job=job, rank=rank, world_size=world_size, **found)

    def environment(self, node: int = 0, **more: str) -> dict[str, str]:
        """For a worker or launcher process of that node."""
        return {**clean_environment(), "SNAPSHOTD_SOCKET": str(self.nodes[node].socket), **more}

    def start_daemon(self, node: Node) -> None:
        """Start it, or start it again."""
        node.socket.parent.mkdir(mode=0o700, exist_ok=True)
        arguments = [
            *("-m", self._program, "daemon", "--coordinator", self.address, "--node-id", node.name),
            *("--listen", "127.0.0.1:0", "--socket", str(node.socket), "--arena", str(node.arena)),
            *self._daemon_flags,
        ]
        node.process = Child(node.name, arguments, self.home / f"{node.name}.log", env=clean_environment())

    def status(self) -> dict[str, Any]:
        """The coordinator's status, as `snapshotd status --json` prints it."""
        command = [sys.executable, "-m", "snapshotd", "status", "--json", "--coordinator", self.address]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    def job(self, name: str = "bench") -> dict[str, Any]:
        """That job's part of the status; empty when nobody knows it."""
        return next((job for job in self.status()["jobs"] if job["job"] == name), {})

    def _start_coordinator(self) -> Child:
        file = self.home / "address"
        arguments = [
            *("-m", "snapshotd", "coordinator", "--listen", "127.0.0.1:0", "--state", str(self.home / "state")),
            *("--parity", str(self._m), "--address-file", str(file), *self._coordinator_flags),
        ]
        child = Child("coordinator", arguments, self.home / "coordinator.log", env=clean_environment())
        try:
            self.address = wait_for(lambda: _read(file), "the coordinator", _START_S, of=[child])
        except BaseException:
            child.end()
            raise
        return child


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Ours without what would configure snapshotd or torchrun behind the benchmark's back."""
    foreign = ("SNAPSHOTD_", "TORCHELASTIC_", "PET_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in environ.items() if not key.startswith(foreign) and key not in names}


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as link, contextlib.suppress(OSError):
        link.connect(str(path))
        return True
    return False


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip() if path.exists() else ""
