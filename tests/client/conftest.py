"""
What the client's tests share: a fake daemon, Snapshotters on it that are closed again, and small training jobs.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

_ROOT = Path(__file__).resolve().parents[2]
for _path in (str(Path(__file__).parent), str(_ROOT), str(_ROOT / "client")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from fake_daemon import FakeDaemon  # noqa: E402
from snapshotd_client import Snapshotter  # noqa: E402
from snapshotd_client.settings import Settings  # noqa: E402

from snapshotd import failpoints  # noqa: E402


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon() as running:
        yield running


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    failpoints.configure(None)


@pytest.fixture
def snapshotter(daemon: FakeDaemon) -> Iterator[Callable[..., Snapshotter]]:
    """Make a Snapshotter on the fake daemon, connected, and close it at the end, or for one that takes its place."""
    made: list[Snapshotter] = []

    def make(model: object, optimizer: object = None, *args: object, **kwargs: object) -> Snapshotter:
        settings = {"socket": daemon.path, "job": "test", "restore_timeout_s": 20.0, **kwargs.pop("settings", {})}
        chosen = Settings(**settings)
        for one in made:
            if (one.settings.job, one.settings.rank) == (chosen.job, chosen.rank):
                one.close()
        snap = Snapshotter(model, optimizer, *args, settings=chosen, **kwargs)
        made.append(snap)
        assert snap._link.wait_session(10)
        return snap

    make.sealed = lambda step, world=1: daemon.wait_for(lambda: len(daemon.sealed.get(step, {})) == world)
    yield make
    for snap in made:
        snap.close()


@pytest.fixture
def seed() -> Callable[[int], None]:
    def run(value: int) -> None:
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value)

    return run


@pytest.fixture
def fence_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Snapshotter, threading.Thread], threading.Event]:
    """Make an event that is set when a thread waits for the copy."""

    def watch(snap: Snapshotter, thread: threading.Thread) -> threading.Event:
        waits, changed = threading.Event(), snap._pipeline._changed
        really_wait = changed.wait

        def wait(timeout: float | None = None) -> bool:
            if threading.current_thread() is thread:
                waits.set()
            return really_wait(timeout)

        monkeypatch.setattr(changed, "wait", wait)
        return waits

    return watch
