"""What `wait` returns for outlives the worker, hashed or not: a real daemon, workers that are killed at that moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.processes import until

STEPS = 6

TRAINING = """
import os, signal, sys
import torch, xxhash
from snapshotd_client import Snapshotter

def digest():
    tensors = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    return xxhash.xxh3_128_hexdigest(b"".join(t.detach().numpy().tobytes() for t in tensors))

torch.manual_seed(0)
model = torch.nn.Linear(700, 700)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
snap = Snapshotter(model=model, optimizer=optimizer)
first = snap.restore()
if first:
    print(first, digest())
    sys.exit()
for step in range(int(sys.argv[1])):
    model(torch.ones(1, 700)).sum().backward()
    optimizer.step()
    last = digest()
    snap.capture(step)
    kept = snap.wait(60)
print(kept, last, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def daemon(directory: Path, failpoints: str) -> Iterator[dict[str, str]]:
    """A node alone; yields the environment of its workers."""
    environment = {**os.environ, "SNAPSHOTD_SOCKET": str(directory / "run" / "d.sock")}
    command = [sys.executable, "-m", "snapshotd", "daemon", "--node-id", "n0", "--budget", "64MiB"]
    process = subprocess.Popen(
        [*command, "--arena", str(directory / "arena")],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "SNAPSHOTD_FAILPOINTS": failpoints},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("snapshotd daemon n0 on ")
        yield environment
    finally:
        (directory / "hash").touch()
        process.terminate()
        process.communicate(timeout=60)


def worker(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAINING, str(STEPS)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def job(environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "snapshotd", "status", "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    return json.loads(done.stdout)["jobs"][0]


def test_a_worker_that_is_killed_when_wait_returns_loses_nothing_though_nothing_is_hashed(shared_memory: Path) -> None:
    with daemon(shared_memory, f"daemon.before_hash=wait({shared_memory}/hash)@{STEPS}") as environment:
        killed = worker(environment)
        kept, last = killed.communicate(timeout=60)[0].split()
        assert (-signal.SIGKILL, "True") == (killed.returncode, kept)
        restarted = worker(environment)
        until(lambda: "is being hashed" in job(environment)["restore"]["waiting"], 30.0, "the decision waits")
        (shared_memory / "hash").touch()
        assert [str(STEPS), last] == restarted.communicate(timeout=60)[0].split()
