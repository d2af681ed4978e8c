"""Arenas for tests: on a real tmpfs where there is one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd.arena import Arena

MIB = 1 << 20


@pytest.fixture
def root() -> Iterator[Path]:
    shm = Path("/dev/shm")
    base = shm if os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="snapshotd-test-", dir=base) as folder:
        yield Path(folder) / "arena"


@pytest.fixture
def open_arena(root: Path) -> Iterator[Callable[..., Arena]]:
    """Opens the arena; opening it again is a restart of its daemon."""
    last: list[Arena] = []

    def restart(budget_bytes: int = 64 * MIB) -> Arena:
        while last:
            last.pop().close()
        last.append(Arena(root, budget_bytes=budget_bytes))
        return last[0]

    yield restart
    while last:
        last.pop().close()


@pytest.fixture
def arena(open_arena: Callable[..., Arena]) -> Arena:
    return open_arena()
