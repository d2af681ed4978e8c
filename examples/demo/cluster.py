"""
The cluster of the demo, all on loopback: one coordinator, and nodes of a daemon, a launcher and its worker each.

A "node" is its own arena directory, its own socket, its own daemon and its own torchrun; nothing of it is shared with
another node but the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from examples.demo.processes import Child, DemoFailed, descendants, kill, wait_for

__all__ = ["JOB", "Cluster", "Node", "clean_environment", "reference_run", "training_script"]

JOB = "gpt"
_START_S = 60.0
_BUDGET = "512MiB"
_RESTARTS = "100"


class Node:
    """One node; `fail` takes it away with all that it holds."""

    def __init__(self, name: str, *, home: Path, logs: Path, address: str, launcher: Sequence[str]) -> None:
        self.name = name
        self.arena = home / "arena"
        self.lost = False
        self._socket = home / "daemon.sock"
        home.mkdir(mode=0o700)
        environment = {**clean_environment(), "SNAPSHOTD_SOCKET": str(self._socket), "TMPDIR": str(home)}
        daemon = ["-m", "snapshotd", "daemon", "--coordinator", address, "--node-id", name, "--listen", "127.0.0.1:0"]
        daemon += ["--arena", str(self.arena), "--socket", str(self._socket), "--budget", _BUDGET]
        self.daemon = Child(f"{name}-daemon", daemon, environment=environment, logs=logs)
        self.launcher = Child(f"{name}-launcher", launcher, environment=environment, logs=logs)

    def start_daemon(self) -> None:
        self.daemon.start()

    def daemon_listens(self) -> bool:
        return self._socket.exists()

    def workers(self) -> list[psutil.Process]:
        return descendants(self.launcher.pid) if self.launcher.alive else []

    def fail(self) -> None:
        """SIGKILL daemon, launcher and workers, and take the node's memory away."""
        workers = self.workers()
        self.lost = True
        self.launcher.kill()
        self.daemon.kill()
        kill(workers)
        shutil.rmtree(self.arena, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()


class Cluster:
    """Coordinator and nodes under `root`; `stop` ends them in good order."""

    def __init__(self, root: Path, *, nnodes: str, parity: int, training: Sequence[str]) -> None:
        self.logs = root / "logs"
        self.logs.mkdir(mode=0o700)
        self.nodes: dict[str, Node] = {}
        self.address = ""
        self._root, self._nnodes, self._training = root, nnodes, list(training)
        self._address_file = root / "coordinator.address"
        self._coordinator = [
            *("-m", "snapshotd", "coordinator", "--state", str(root / "state")),
            *("--parity", str(parity), "--node-lease", "2", "--agent-lease", "2", "--last-call", "2"),
            *("--address-file", str(self._address_file)),
        ]
        self.coordinator = self._new_coordinator("127.0.0.1:0")

    def _new_coordinator(self, listen: str) -> Child:
        arguments = [*self._coordinator, "--listen", listen]
        return Child("coordinator", arguments, environment=clean_environment(), logs=self.logs)

    def start_coordinator(self) -> None:
        """The first time on any free port, then again on the same one."""
        if self.address:
            self.coordinator = self._new_coordinator(self.address)
        self._address_file.unlink(missing_ok=True)
        self.coordinator.start()
        self._await(self._address_file.exists, "the coordinator to listen", self.coordinator)
        self.address = self._address_file.read_text(encoding="ascii").strip()

    def add_node(self, name: str) -> Node:
        """Start a node's daemon; its launcher comes with `launch`."""
        launcher = [
            *("-m", "torch.distributed.run", "--nnodes", self._nnodes, "--nproc-per-node", "1"),
            *("--max-restarts", _RESTARTS, "--rdzv-backend", "snapshotd", "--rdzv-endpoint", self.address),
            *("--rdzv-id", JOB, "--rdzv-conf", f"node_id={name},timeout=120", *self._training),
        ]
        node = Node(name, home=self._root / name, logs=self.logs, address=self.address, launcher=launcher)
        node.start_daemon()
        self.nodes[name] = node
        return node

    def launch(self, nodes: Sequence[Node]) -> None:
        """Start the launchers of these nodes, once their daemons listen."""
        for node in nodes:
            self._await(node.daemon_listens, f"the daemon of {node.name} to listen", node.daemon)
        for node in nodes:
            node.launcher.start()

    def running(self) -> list[Node]:
        return [node for node in self.nodes.values() if not node.lost]

    def check(self, *, but: Child | None = None) -> None:
        """DemoFailed if a process that should run has ended."""
        for node in self.running():
            for child in (node.daemon, node.launcher):
                if child is not but and child.started and child.code not in (None, 0):
                    raise DemoFailed(f"{child.name} ended with code {child.code}: {last_words(child.log)}")
        if self.coordinator is not but and not self.coordinator.alive:
            code, log = self.coordinator.code, self.coordinator.log
            raise DemoFailed(f"the coordinator ended with code {code}: {last_words(log)}")

    def stop(self) -> None:
        for node in self.running():
            node.launcher.terminate()
        for node in self.running():
            node.daemon.terminate()
        self.coordinator.terminate()

    def _await(self, condition: Callable[[], bool], what: str, child: Child) -> None:
        def ended() -> None:
            if not child.alive:
                raise DemoFailed(f"{child.name} ended with code {child.code}: {last_words(child.log)}")

        wait_for(condition, what, timeout_s=_START_S, each=ended)


def reference_run(root: Path, training: Sequence[str], *, workers: int) -> Child:
    """The same job under plain torchrun: no daemon, no faults. Not started yet."""
    environment = {
        **clean_environment(),
        "TMPDIR": str(root),
        "SNAPSHOTD_SOCKET": str(root / "no-daemon.sock"),
        "SNAPSHOTD_CONNECT_TIMEOUT_S": "0.1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), *training]
    return Child("undisturbed", launcher, environment=environment, logs=root / "logs")


def training_script() -> str:
    return str(Path(__file__).resolve().parent.parent / "train_gpt.py")


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Ours without what would configure snapshotd or torchrun behind the demo's back."""
    foreign = ("SNAPSHOTD_", "TORCHELASTIC_", "PET_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in environ.items() if not key.startswith(foreign) and key not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return next((line.strip() for line in reversed(lines) if line.strip(" =-")), "(it said nothing)")
