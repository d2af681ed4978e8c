"""
A process that has imported what is slow to import, and forks children that start at once.

Importing torch costs two seconds of CPU in each process, and a hundred scenarios have a thousand of them. So one
process per kind imports everything and then does nothing but fork. The children are real processes: own pid, own
session, own environment, killed by SIGKILL like any other.

`python -m tests.faults.zygote KIND SOCKET` with KIND one of KINDS. One connection is one child:

    request   4 bytes little-endian length, then NUL-ended strings: cwd, argc, argv..., "NAME=value"...;
              three file descriptors (stdin, stdout, stderr) travel with the first byte
    answers   "P<pid>\n" when the child is forked, then "E<code>\n" or "S<signal>\n" when it has ended
    "T"       from the asker: SIGTERM to the child's session group
    EOF       from the asker, before the child has ended: SIGKILL to the child's session group

Rule 1: the zygote has one thread and no gRPC channel; it refuses to fork otherwise.
Rule 2: nothing of the zygote's own environment reaches a child.
Rule 3: a launcher ends after its exit handlers, with its code; that torch is then taken apart, half a second of CPU, is
        left to the plain launchers of some scenarios.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

KINDS = {
    "snapshotd": ("snapshotd.cli.coordinator", "snapshotd.cli.daemon", "snapshotd.cli.status"),
    "torchrun": ("torch.distributed.run", "snapshotd.coordinator.rendezvous", "torch.distributed.elastic.agent.server"),
    "script": (
        "lab",  # first: its exit handler is to run last
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint.state_dict",
        "torch.nn.parallel",
        "torch.utils.data",
        "torch.optim.lr_scheduler",
        "numpy",
        "snapshotd_client",
        "snapshotd_client.direct",
    ),
}
"""What each kind imports before it forks."""

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

_launcher_code: list[int] = []

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MAX_REQUEST = 1 << 20


@atexit.register
def _leave() -> None:
    # Runs after everybody else's exit handlers: this module registers it before it imports anything else.
    if _launcher_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_launcher_code[-1])


@dataclass
class Job:
    """What one child is to be."""

    cwd: str
    argv: list[str]
    env: dict[str, str]
    stdio: list[int]


@dataclass
class _Asker:
    """One connection: its request as far as it came, and its child."""

    link: socket.socket
    data: bytes = b""
    stdio: list[int] = field(default_factory=list)
    pid: int = 0


class Zygote:
    """The loop; `serve` returns in a forked child only."""

    def __init__(self, kind: str, listener: socket.socket) -> None:
        self._kind = kind
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._askers: dict[int, _Asker] = {}
        self._children: dict[int, _Asker] = {}
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: self._end())
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

    def serve(self) -> Job:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    link, _ = self._listener.accept()
                    self._askers[link.fileno()] = _Asker(link)
                    self._selector.register(link, selectors.EVENT_READ)
                elif key.fileobj is self._wake_reader:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_reader.recv(4096)
                    self._reap()
                elif key.fd in self._askers:
                    job = self._heard(self._askers[key.fd])
                    if job is not None:
                        return job

    def _heard(self, asker: _Asker) -> Job | None:
        try:
            data, fds, _, _ = socket.recv_fds(asker.link, 65536, 8)
        except OSError:
            data, fds = b"", []
        asker.stdio += fds
        if asker.pid:
            if not data:
                _signal_group(asker.pid, signal.SIGKILL)
                self._drop(asker)
            elif b"T" in data:
                _signal_group(asker.pid, signal.SIGTERM)
            return None
        asker.data += data
        length = struct.unpack("<I", asker.data[:4])[0] if len(asker.data) >= 4 else _MAX_REQUEST
        if not data or (len(asker.data) >= 4 and length > _MAX_REQUEST):
            self._drop(asker)
            return None
        if len(asker.data) < 4 + length:
            return None
        return self._fork(asker, asker.data[4:])

    def _fork(self, asker: _Asker, payload: bytes) -> Job | None:
        words = os.fsdecode(payload).split("\0")[:-1]
        count = int(words[1])
        env = dict(word.split("=", 1) for word in words[2 + count :] if "=" in word)
        job = Job(words[0], words[2 : 2 + count], env, asker.stdio)
        if len(os.listdir("/proc/self/task")) != 1:
            raise SystemExit("the zygote has more than one thread: forking it is not safe")
        pid = os.fork()
        if pid == 0:
            self._become_child()
            return job
        asker.pid = pid
        self._children[pid] = asker
        for fd in asker.stdio:
            os.close(fd)
        asker.stdio = []
        if env.get("FAULTS_PIDS"):
            with open(env["FAULTS_PIDS"], "a") as pids:
                pids.write(f"{pid} {self._kind} {env.get('FAULTS_NODE', '')}\n")
        self._answer(asker, f"P{pid}\n")
        return None

    def _become_child(self) -> None:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for owned in (self._listener, self._wake_reader, self._wake_writer, *(a.link for a in self._askers.values())):
            owned.close()
        self._askers.clear()
        self._children.clear()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            asker = self._children.pop(pid, None)
            if asker is None:
                continue  # an orphan of a killed child
            died = f"S{os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"E{os.WEXITSTATUS(status)}"
            self._answer(asker, died + "\n")
            self._drop(asker)

    def _answer(self, asker: _Asker, text: str) -> None:
        with contextlib.suppress(OSError):
            asker.link.sendall(text.encode())

    def _drop(self, asker: _Asker) -> None:
        if self._askers.pop(asker.link.fileno(), None) is not None:
            self._selector.unregister(asker.link)
            asker.link.close()

    def _end(self) -> None:
        for pid in self._children:
            _signal_group(pid, signal.SIGKILL)
        os._exit(0)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def enter(job: Job) -> None:
    """In the child: take over the job's directory, environment and standard streams."""
    for target, fd in enumerate(job.stdio):
        os.dup2(fd, target)
    for fd in job.stdio:
        if fd > 2:
            os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0, closefd=False), _writer(1), _writer(2)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.env)
    _arm(job)


def _writer(fd: int) -> TextIO:
    return os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _arm(job: Job) -> None:
    """
    Arm the failpoints of this launch.

    FAULTS_ARM="1:client.mid_copy=kill@4|2:client.mid_restore=kill@1" arms each launch of a node's local rank on its
    own, so that a fault does not strike again after the restart that it caused.
    """
    plan = job.env.get("FAULTS_ARM")
    if plan:
        counter = Path(job.env["FAULTS_DIR"]) / f"launches.{job.env['FAULTS_NODE']}.{job.env.get('LOCAL_RANK', '')}"
        with open(counter, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            launch = len(file.read()) + 1
            file.write("x")
        wanted = [part.partition(":")[2] for part in plan.split("|") if part.partition(":")[0] == str(launch)]
        os.environ["SNAPSHOTD_FAILPOINTS"] = ";".join(wanted)
    failpoints = sys.modules.get("snapshotd.failpoints")
    if failpoints is not None:
        failpoints.configure(os.environ.get("SNAPSHOTD_FAILPOINTS"))


def run(kind: str, job: Job) -> None:
    """Be what the job says; ends the process in the usual way of Python."""
    enter(job)
    if kind == "snapshotd":
        from snapshotd.cli import main

        sys.argv = ["snapshotd", *job.argv]
        sys.exit(main(job.argv))
    if kind == "torchrun":
        from torch.distributed.run import main

        sys.argv = ["torchrun", *job.argv]
        _launcher_code.append(1)  # what an exception makes of it
        try:
            main(job.argv)
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                _launcher_code.append(end.code or 0)
            raise
        _launcher_code.append(0)
        sys.exit(0)
    sys.argv = list(job.argv)
    if job.env.get("FAULTS_STUB"):
        stub = types.ModuleType("snapshotd_client")
        stub.__dict__.update(runpy.run_path(job.env["FAULTS_STUB"]))
        sys.modules["snapshotd_client"] = stub
    # As the interpreter does it: the script's globals are those of __main__ and live until the end of the process.
    main_module = types.ModuleType("__main__")
    main_module.__file__ = job.argv[0]
    sys.modules["__main__"] = main_module
    exec(compile(Path(job.argv[0]).read_bytes(), job.argv[0], "exec"), main_module.__dict__)


def main() -> None:
    kind, path, parent = sys.argv[1:]
    os.environ.pop("SNAPSHOTD_FAILPOINTS", None)
    sys.path.insert(0, str(SCRIPTS))
    for name in KINDS[kind]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child touches every object of torch when it collects garbage and when it ends
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # also when the tests themselves are killed, nothing stays behind
    if os.getppid() != int(parent):
        return  # they were killed during the imports above, before anybody would have told us
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)  # whoever sees the name can connect
    run(kind, Zygote(kind, listener).serve())


if __name__ == "__main__":
    main()
