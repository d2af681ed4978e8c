"""Sizes, limits, and refusals that say all the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.arena import budget
from snapshotd.arena.budget import Headroom, Need, check
from snapshotd.erasure import StripeGeometry
from snapshotd.errors import BudgetError, UsageError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.sizes import format_bytes

GIB = 1 << 30


def test_need_counts_pages_generations_and_parity() -> None:
    need = Need(slot_bytes=(4097, 8192), generations=3, k=4, m=2, buffer_bytes=1)
    assert (need.slots_total, need.parity_total) == (16384, 28672)
    assert need.total == 3 * (16384 + 28672) + 4096
    words = "3 generations x (2 slots of 16 KiB in all + parity of 28 KiB (k = 4, m = 2)) + 1 B for restores = 136 KiB"
    assert need.words() == words
    need = Need(slot_bytes=(4096,), k=1, m=1, held_bytes=5000)
    assert need.total == 2 * (4096 + 4096) + 8192
    assert need.words().endswith(") + 4.9 KiB that readers hold = 24 KiB")
    for wrong in ({"slot_bytes": (-1,)}, {"slot_bytes": (1,), "held_bytes": -1}):
        with pytest.raises(UsageError):
            Need(**wrong)


@pytest.mark.parametrize("size", [1, 100_000, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 5 << 20, 100 << 20])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 1), (4, 2), (8, 3)])
def test_every_node_has_room_for_its_parity(size: int, n: int, m: int) -> None:
    """Of small slots some nodes hold more than others."""
    geometry = StripeGeometry((size,) * n, m)
    need = Need(slot_bytes=(size,), k=n - m, m=m)
    assert max(map(geometry.parity_bytes, range(n))) <= need.parity_total + m * geometry.granule


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({}, None),
        ({"budget": GIB}, "--budget to 2.5 GiB"),
        ({"filesystem": GIB}, "larger tmpfs"),
        ({"cgroup": GIB}, "container's memory limit"),
        ({"machine": GIB}, "on this machine"),
    ],
)
def test_check_says_which_limit_and_all_numbers(
    limit: dict[str, int], words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_limits = {"budget": 8 * GIB, "filesystem": 7 * GIB, "cgroup": 6 * GIB, "machine": 5 * GIB} | limit
    limit_of_arena = given_limits.pop("budget")
    monkeypatch.setattr(budget, "headroom", lambda root: Headroom(**given_limits))
    need = Need(slot_bytes=(GIB,), generations=2, k=4, m=1)
    if words is None:
        check(need, budget=limit_of_arena, root=tmp_path)
        return
    with pytest.raises(BudgetError) as caught:
        check(need, budget=limit_of_arena, root=tmp_path)
    parity = "parity of 256 MiB (k = 4, m = 1)"
    for part in (words, "1 slot of 1 GiB", parity, format_bytes(limit_of_arena), "free on the file"):
        assert part in str(caught.value)
    if "budget" not in limit:  # what the arena holds already needs no new memory
        check(need, budget=limit_of_arena, root=tmp_path, held_bytes=2 * GIB)


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cg"
    _write(proc, cgroup="0::/a/b\n")
    _write(mount / "a", memory__max="1000\n", memory__current="900\n", memory__stat="anon 1\ninactive_file 300\n")
    _write(mount / "a/b", memory__max="max\n", memory__current="5\n")
    assert budget.cgroup_headroom(proc=proc, mount=mount) == 400
    _write(mount / "a/b", memory__max="100\n", memory__current="500\n")
    assert budget.cgroup_headroom(proc=proc, mount=mount) == 0


def test_cgroup_v1_and_none(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cg"
    assert budget.cgroup_headroom(proc=proc, mount=mount) is None
    _write(proc, cgroup="4:cpu,memory:/not/in/this/container\n3:cpu:/\n0::/\n")
    assert budget.cgroup_headroom(proc=proc, mount=mount) is None
    _write(mount / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    assert budget.cgroup_headroom(proc=proc, mount=mount) is None
    _write(mount / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="junk")
    assert budget.cgroup_headroom(proc=proc, mount=mount) is None
    _write(mount / "memory", memory__usage_in_bytes="2000", memory__stat="total_inactive_file 500\n")
    assert budget.cgroup_headroom(proc=proc, mount=mount) == 3500


def test_default_budget_counts_what_an_arena_holds_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each restart of a daemon would halve its budget."""
    monkeypatch.setattr(budget, "headroom", lambda root: Headroom(filesystem=GIB, cgroup=None, machine=None))
    root = tmp_path / "not/yet/there"
    assert budget.default_budget(root) == GIB // 2
    (root / "slots").mkdir(parents=True)
    (root / "slots/x").write_bytes(b"x" * 8192)
    held = (root / "slots/x").stat().st_blocks * 512
    assert (GIB + held) // 2 == budget.default_budget(root)
    assert budget.headroom(root).least > 0
