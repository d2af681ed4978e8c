"""Persisting: each node writes its part, one makes it a snapshot, and a crash leaves only whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from snapshotd.arena import slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.persist import export_snapshot, persist_slots, seal_persisted
from snapshotd.durable import open_snapshot, scan_durable
from snapshotd.durable.writer import snapshot_path
from snapshotd.errors import CorruptionError, UsageError
from snapshotd.v1 import control_pb2 as control


def sealed_step(cluster, step: int, epoch: int = 1, world_size: int = 3):
    """Two nodes, the first with two ranks."""
    if not cluster.nodes:
        cluster.add("n0", "n1")
    nodes = [cluster.nodes["n0"], cluster.nodes["n0"], cluster.nodes["n1"]][:world_size]
    return [
        cluster.seal_random(node, 100_000 + rank, rank=rank, world_size=world_size, step=step, epoch=epoch)
        for rank, node in enumerate(nodes)
    ]


def persist(cluster, root: Path, step: int, epoch: int = 1, world_size: int = 3) -> list[control.PersistDone]:
    order = control.Persist(job="job", epoch=epoch, step=step, world_size=world_size)
    return [persist_slots(order, node.arena, node.sources, root) for node in cluster.nodes.values()]


def seal(root: Path, slots, step: int, epoch: int = 1, keep: int = 2) -> control.PersistSealed:
    order = control.PersistSeal(job="job", epoch=epoch, step=step, world_size=len(slots), slots=slots)
    return seal_persisted(order, root, keep=keep)


def steps(root: Path) -> list[int]:
    return [ref.step for ref in scan_durable(root, "job")]


def test_a_step_is_durable_when_it_is_sealed_and_not_before(cluster, tmp_path: Path) -> None:
    slots = sealed_step(cluster, 7)
    assert [(done.ok, done.reason, done.step) for done in persist(cluster, tmp_path, 7)] == [(True, "", 7)] * 2
    assert steps(tmp_path) == []
    sealed = seal(tmp_path, slots, 7)
    assert (sealed.ok, sealed.reason, list(sealed.removed)) == (True, "", [])
    assert scan_durable(tmp_path) == [sealed.durable]
    with open_snapshot(sealed.durable.path) as snapshot:
        assert snapshot.verify() == sum(ref.file_bytes for ref in slots)
        for ref in slots:
            node = cluster.nodes["n0" if ref.rank < 2 else "n1"]
            assert snapshot.rank_file(ref.rank).read(0, ref.file_bytes) == node.slot_bytes(ref)
            assert snapshot.rank_file(ref.rank).slot == ref
    # Orders may come twice.
    assert all(done.ok for done in persist(cluster, tmp_path, 7))
    assert seal(tmp_path, slots, 7).ok
    assert steps(tmp_path) == [7]


def test_the_newest_are_kept(cluster, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        slots = sealed_step(cluster, step)
        persist(cluster, tmp_path, step)
        sealed = seal(tmp_path, slots, step)
        assert sealed.ok
    assert [ref.step for ref in sealed.removed] == [1]
    assert steps(tmp_path) == [2, 3]


def test_a_missing_part_is_no_snapshot(cluster, tmp_path: Path) -> None:
    """A node wrote to its own disk: the directory that was given is not shared."""
    slots = sealed_step(cluster, 7)
    order = control.Persist(job="job", epoch=1, step=7, world_size=3)
    node = cluster.nodes["n0"]
    assert persist_slots(order, node.arena, node.sources, tmp_path).ok
    sealed = seal(tmp_path, slots, 7)
    assert not sealed.ok
    assert "rank-000002.json cannot be read" in sealed.reason
    assert steps(tmp_path) == []
    persist(cluster, tmp_path, 7)
    path = snapshot_path(tmp_path, "job", 1, 7)
    os.truncate(path / "rank-000001.safetensors", 10)
    assert "has 10 bytes, expected" in seal(tmp_path, slots, 7).reason
    os.unlink(path / "rank-000001.safetensors")
    assert "Is the persist directory the same on all nodes?" in seal(tmp_path, slots, 7).reason
    persist(cluster, tmp_path, 7)
    slots[1].root_digest = "0" * 32
    assert "root_digest is" in seal(tmp_path, slots, 7).reason
    assert "needs a slot of each" in seal(tmp_path, slots[:1] * 2, 7).reason
    assert steps(tmp_path) == []


def test_what_cannot_be_persisted_is_told(cluster, tmp_path: Path) -> None:
    slots = sealed_step(cluster, 7)
    assert "no slot of step 8" in persist(cluster, tmp_path, 8)[0].reason
    assert "world of 3, not of 2" in persist(cluster, tmp_path, 7, world_size=2)[0].reason
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not persist(cluster, blocked, 7)[0].ok
    node = cluster.nodes["n1"]
    node.arena.find(slot_key(slots[2])).view[300_000] ^= 1
    done = persist(cluster, tmp_path, 7)[1]
    assert not done.ok
    assert "does not match its digest" in done.reason
    assert [(found.local, found.slot) for found in node.corruptions] == [(True, slots[2])]
    cancel = threading.Event()
    cancel.set()
    order = control.Persist(job="job", epoch=1, step=7, world_size=3)
    with pytest.raises(Cancelled):
        persist_slots(order, node.arena, node.sources, tmp_path, cancel)
    names = os.listdir(snapshot_path(tmp_path, "job", 1, 7))
    assert not [name for name in names if name.endswith(".tmp") or "000002" in name]


CRASHING = """
import sys
from pathlib import Path
from snapshotd.arena import Arena
from snapshotd.daemon.persist import persist_slots, seal_persisted
from snapshotd.daemon.sources import Sources
from snapshotd.transfer import BulkClient
from snapshotd.v1 import control_pb2 as control
arena = Arena(Path({arena!r}), budget_bytes=1 << 30)
slots = [obj.ref for obj in arena.scan()]
sources = Sources("n0", arena, BulkClient())
order = control.Persist(job="job", epoch=1, step=2, world_size=2)
assert persist_slots(order, arena, sources, {root!r}).ok
seal = control.PersistSeal(job="job", epoch=1, step=2, world_size=2, slots=[s for s in slots if s.step == 2])
assert seal_persisted(seal, {root!r}, keep=1).ok
"""


@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("site", ["persist.before_rename", "persist.after_rename", "persist.before_marker"])
def test_a_daemon_that_dies_anywhere_leaves_whole_snapshots(cluster, tmp_path: Path, site: str, hit: int) -> None:
    first = sealed_step(cluster, 1, world_size=2)
    persist(cluster, tmp_path, 1, world_size=2)
    assert seal(tmp_path, first, 1).ok
    sealed_step(cluster, 2, world_size=2)
    node = cluster.nodes["n0"]
    node.server.close()
    node.arena.close()
    environment = {**os.environ, "SNAPSHOTD_FAILPOINTS": f"{site}=exit(9)@{hit}"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = CRASHING.format(arena=str(node.arena.root), root=str(tmp_path))
    crashed = (site, hit) != ("persist.before_marker", 2)
    for attempt in range(2):
        done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
        assert done.returncode == (9 if crashed and not attempt else 0)
        assert steps(tmp_path) == ([1] if crashed and not attempt else [2])
        for ref in scan_durable(tmp_path):
            with open_snapshot(ref.path) as snapshot:
                snapshot.verify()
        environment.pop("SNAPSHOTD_FAILPOINTS", None)
    names = os.listdir(snapshot_path(tmp_path, "job", 1, 2))
    assert len(names) == 5
    assert os.listdir(snapshot_path(tmp_path, "job", 1, 2).parent) == [snapshot_path(tmp_path, "job", 1, 2).name]


def plan_of(cluster, slots) -> control.RestorePlan:
    return control.RestorePlan(
        job="job",
        kind=control.RESTORE_KIND_MEMORY,
        source_epoch=1,
        source_step=7,
        source_world_size=3,
        nodes=["n0", "n0", "n1"],
        slots=slots,
        peers=cluster.peers,
    )


def test_a_tool_exports_live_slots_and_durable_ones(cluster, tmp_path: Path) -> None:
    """`snapshotd restore --job J DIR`, from memory, and again from what that wrote."""
    slots = sealed_step(cluster, 7)
    (tool,) = cluster.add("tool")
    ref = export_snapshot(plan_of(cluster, slots), tmp_path / "a" / "b", tool.sources)
    assert (ref.step, ref.world_size, ref.path) == (7, 3, str(tmp_path / "a" / "b"))
    durable = control.RestorePlan(
        job="job",
        kind=control.RESTORE_KIND_DURABLE,
        source_epoch=1,
        source_step=7,
        source_world_size=3,
        durable_path=ref.path,
    )
    export_snapshot(durable, tmp_path / "c", tool.sources)
    for path in (tmp_path / "a" / "b", tmp_path / "c"):
        with open_snapshot(path) as snapshot:
            assert snapshot.verify() == sum(slot.file_bytes for slot in slots)
    with pytest.raises(UsageError, match="is not empty"):
        export_snapshot(durable, tmp_path / "c", tool.sources)


def test_an_export_of_rotten_slots_has_no_marker(cluster, tmp_path: Path) -> None:
    slots = sealed_step(cluster, 7)
    cluster.nodes["n1"].arena.find(slot_key(slots[2])).view[300_000] ^= 1
    with pytest.raises(CorruptionError):
        export_snapshot(plan_of(cluster, slots), tmp_path / "out", cluster.nodes["n0"].sources)
    assert sorted(os.listdir(tmp_path / "out"))[-1] == "rank-000001.safetensors"
