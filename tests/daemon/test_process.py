"""The daemon as a process: what it refuses at the start, and that it ends cleanly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snapshotd.daemon.node import _route_begins_at
from snapshotd.errors import UsageError
from tests.faults.processes import until


def daemon(directory: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snapshotd", "daemon", "--node-id", "n0", "--arena", str(directory / "arena"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SNAPSHOTD_SOCKET": str(directory / "run" / "d.sock")},
    )


def status(directory: Path) -> Any:
    """What `snapshotd status` shows to somebody who gives no address."""
    environment = {key: value for key, value in os.environ.items() if key != "SNAPSHOTD_COORDINATOR"}
    environment["SNAPSHOTD_SOCKET"] = str(directory / "run" / "d.sock")
    command = [sys.executable, "-m", "snapshotd", "status", "--json"]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--budget", "900TiB"], 5, "900 TiB is needed"),
        (["--budget", "64MiB", "--listen", "0.0.0.0:0"], 2, "not loopback"),
        (["--budget", "64MiB", "--coordinator", "10.1.2.3:7070"], 2, "not loopback"),
        (["--budget", "64MiB", "--generations", "1"], 2, "use 2 or more"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(shared_memory: Path, flags: list[str], code: int, words: str) -> None:
    """A daemon that starts and fails at the first step leaves a run unprotected that everybody thinks is safe."""
    process = daemon(shared_memory, *flags)
    _, errors = process.communicate(timeout=60)
    assert (code, True, False) == (process.returncode, words in errors, "Traceback" in errors), errors


def test_one_node_alone_needs_no_coordinator_and_ends_cleanly(shared_memory: Path) -> None:
    process = daemon(shared_memory, "--budget", "64MiB")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("snapshotd daemon n0 on ")
    second = daemon(shared_memory, "--budget", "64MiB")
    _, errors = second.communicate(timeout=60)
    assert 2 == second.returncode
    assert "Traceback" not in errors
    assert ["n0"] == [node["node_id"] for node in status(shared_memory)["nodes"]]
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (0, False) == (process.returncode, "Traceback" in errors), errors
    assert not (shared_memory / "run" / "d.sock").exists()
    assert 0o700 == (shared_memory / "arena").stat().st_mode & 0o777


def test_peers_are_told_an_address_that_leads_here_and_not_the_hosts_name(shared_memory: Path) -> None:
    """A node that advertises 0.0.0.0, or a name that resolves to the slow network, is lost or slow for its peers."""
    process = daemon(shared_memory, "--budget", "64MiB", "--listen", "0.0.0.0:0", "--insecure")
    assert process.stdout is not None
    process.stdout.readline()
    host, _, port = status(shared_memory)["nodes"][0]["bulk"].rpartition(":")
    process.terminate()
    process.communicate(timeout=60)
    assert ("127.0.0.1", True) == (host, int(port) > 0)


def test_the_interface_is_the_one_of_the_route_to_the_coordinator() -> None:
    assert "127.0.0.1" == _route_begins_at("127.0.0.9:7070")
    with pytest.raises(UsageError, match="--advertise"):
        _route_begins_at("no-such-host.invalid:7070")


TRAINING = """
import sys, warnings, logging
import torch
from snapshotd_client import Snapshotter
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
width = int(sys.argv[1])
model = torch.nn.Linear(width, width)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
snap = Snapshotter(model=model, optimizer=optimizer)
first = snap.restore()
for step in range(first, 5):
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    snap.capture(step)
    snap.wait(30)
print("refused", snap.stats["skipped_refused"], "of", snap.stats["captured"])
"""


def test_a_layout_that_does_not_fit_is_refused_with_the_numbers_and_training_goes_on(shared_memory: Path) -> None:
    """A node that finds out in mid-run that two generations do not fit has promised what it cannot keep."""
    process = daemon(shared_memory, "--budget", "400KiB")
    assert process.stdout is not None
    process.stdout.readline()
    environment = {
        **os.environ,
        "SNAPSHOTD_SOCKET": str(shared_memory / "run" / "d.sock"),
        "PYTHONWARNINGS": "default",
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-c", TRAINING, "200"], capture_output=True, text=True, timeout=100, env=environment
        )
        assert (0, True) == (ended.returncode, "refused 5 of 5" in ended.stdout), ended.stdout + ended.stderr
        said = ended.stdout + ended.stderr
        assert "2 generations x (1 slot of" in said
        assert "more than the budget of 400 KiB" in said
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize("width", [20, 400])
def test_slots_below_and_above_a_chunk_are_committed(shared_memory: Path, width: int) -> None:
    """Small ones are sealed where the frame is read, larger ones in a thread: each must come to its commit."""
    process = daemon(shared_memory, "--budget", "64MiB")
    assert process.stdout is not None
    process.stdout.readline()
    environment = {**os.environ, "SNAPSHOTD_SOCKET": str(shared_memory / "run" / "d.sock")}
    try:
        command = [sys.executable, "-c", TRAINING, str(width)]
        subprocess.run(command, check=True, capture_output=True, timeout=100, env=environment)
        (job,) = status(shared_memory)["jobs"]
        assert 4 == job["committed"]["step"]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (0, False) == (process.returncode, "Traceback" in errors), errors


UNNAMED = """
import logging, sys
import torch
from snapshotd_client import Snapshotter
logging.basicConfig(level=logging.WARNING)
width = int(sys.argv[1])
model = torch.nn.Linear(width, width)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
snap = Snapshotter(model=model, optimizer=optimizer)
for step, _ in enumerate(sys.stdin, snap.restore()):
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    snap.capture(step)
    snap.wait(30)
    print(snap.stats["sealed"], flush=True)
"""


def test_two_trainings_without_a_name_do_not_take_each_others_place_for_ever(shared_memory: Path) -> None:
    """Somebody tries a second script on the node: the one that runs for days was unprotected from then on."""
    process = daemon(shared_memory, "--budget", "64MiB")
    assert process.stdout is not None
    process.stdout.readline()
    environment = {**os.environ, "SNAPSHOTD_SOCKET": str(shared_memory / "run" / "d.sock")}
    command = [sys.executable, "-c", UNNAMED]
    pipe = subprocess.PIPE
    first = subprocess.Popen([*command, "20"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def sealed() -> int:
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write("another step\n")
        first.stdin.flush()
        return int(first.stdout.readline())

    try:
        assert 1 == sealed()
        second = subprocess.run([*command, "30"], input="", capture_output=True, timeout=60, text=True, env=environment)
        assert (1, True) == (second.returncode, "Another training needs another name" in second.stderr), second.stderr
        until(lambda: sealed() > 3, 30, "the first is protected again")
        _, errors = first.communicate(timeout=60)
        told = ["is rank 0 of job default on this node now", "the daemon is back"]
        assert (0, told) == (first.returncode, [words for words in told if words in errors]), errors
    finally:
        first.kill()
        first.communicate(timeout=60)
        process.terminate()
        process.communicate(timeout=60)
