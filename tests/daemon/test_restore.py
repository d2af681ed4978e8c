"""Restoring: any box of any source, from wherever it is, equals what a gather of the whole state gives."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from snapshotd import failpoints
from snapshotd.arena import State, slot_key
from snapshotd.daemon import restore as restore_module
from snapshotd.daemon.boxes import Boxes
from snapshotd.daemon.persist import export_snapshot
from snapshotd.daemon.restore import Restore
from snapshotd.errors import (
    BudgetError,
    CorruptionError,
    LayoutError,
    LocalProtocolError,
    PeerError,
    Unrecoverable,
    UsageError,
)
from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.reshard import apply_copy
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.daemon.conftest import whole

TENSORS = {
    "emb": np.random.default_rng(1).random((1031, 300), np.float32),
    "w": np.random.default_rng(2).random((64, 7, 5), np.float32),
    "b": np.arange(13, dtype=np.int64),
    "scalar": np.array(3.25, np.float64),
    "none": np.zeros((0, 4), np.float32),
    "half": np.random.default_rng(3).random((10, 2)).astype(np.float16),
    "flag": np.array([True, False, True]),
}


def split(value: np.ndarray, rank: int, world_size: int, dim: int = 0) -> tuple[tuple[int, ...], np.ndarray]:
    """As torch chunks a dimension; a 0-d tensor is with rank 0."""
    if value.ndim == 0:
        return (), value
    per_rank = -(-value.shape[dim] // world_size)
    begin = min(rank * per_rank, value.shape[dim])
    end = min(begin + per_rank, value.shape[dim])
    offsets = tuple(begin if d == dim else 0 for d in range(value.ndim))
    return offsets, value[tuple(slice(begin, end) if d == dim else slice(None) for d in range(value.ndim))]


def shards_of(rank: int, world_size: int, dim_of=lambda name: 0, private: bool = True):
    shards = []
    for name, value in TENSORS.items():
        if value.ndim == 0 and rank:
            continue
        dim = min(dim_of(name), max(value.ndim - 1, 0))
        offsets, part = split(value, rank, world_size, dim)
        box = TensorBox(
            name=name,
            dtype=str(value.dtype),
            global_shape=value.shape,
            box=Box(offsets, part.shape),
            scope="global",
            kind="param",
        )
        shards.append((box, part))
    if private:
        rng = np.full(16, rank, np.uint8)
        shards.append((private_box("rng", rng, "rng"), rng))
    return shards


def private_box(name: str, value: np.ndarray, kind: str) -> TensorBox:
    whole = Box.whole(value.shape)
    return TensorBox(name=name, dtype=str(value.dtype), global_shape=value.shape, box=whole, scope="rank", kind=kind)


def plan_of(cluster, slots, nodes) -> control.RestorePlan:
    return control.RestorePlan(
        job="job",
        epoch=2,
        kind=control.RESTORE_KIND_MEMORY,
        source_epoch=1,
        source_step=7,
        source_world_size=len(slots),
        nodes=nodes,
        slots=slots,
        peers=cluster.peers,
    )


def sealed_state(cluster, world_size: int, ranks_per_node: int = 1, **kwargs) -> control.RestorePlan:
    nodes = cluster.add(*(f"n{i}" for i in range(-(-world_size // ranks_per_node))))
    slots, names = [], []
    for rank in range(world_size):
        node = nodes[rank // ranks_per_node]
        slots.append(cluster.seal(node, shards_of(rank, world_size, **kwargs), rank=rank, world_size=world_size))
        names.append(node.node_id)
    return plan_of(cluster, slots, names)


class Asked(NamedTuple):
    """One box that is asked for."""

    name: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    scope: str = "global"


def want(name: str, offsets=(), lengths=(), scope: str = "global") -> Asked:
    return Asked(name, tuple(offsets), tuple(lengths), scope)


def boxes(wants: Iterable[Asked]) -> worker.RestoreBoxes:
    """The boxes as a worker asks for them."""
    wants = list(wants)
    cuts = list(dict.fromkeys(item[1:] for item in wants))
    return worker.RestoreBoxes(
        names=[item.name for item in wants],
        cut_of=[cuts.index(item[1:]) for item in wants],
        cuts=[worker.RestoreBoxes.Cut(scope=cut[2], offsets=cut[0], lengths=cut[1]) for cut in cuts],
    )


def bytes_at(batch, index: int, nbytes: int) -> bytes:
    with open(batch.paths[batch.files[index]], "rb") as file:
        file.seek(batch.offsets[index])
        return file.read(nbytes)


def region(value: np.ndarray, offsets, lengths) -> bytes:
    cut = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
    return np.ascontiguousarray(value[cut]).tobytes()


def check(batch, wants) -> None:
    for index, item in enumerate(wants):
        expected = region(TENSORS[item.name], item.offsets, item.lengths)
        assert bytes_at(batch, index, len(expected)) == expected, item.name


def wants_of(rank: int, world_size: int, dim: int = 0) -> list[Asked]:
    wants = []
    for name, value in TENSORS.items():
        offsets, part = split(value, rank, world_size, min(dim, max(value.ndim - 1, 0)))
        wants.append(want(name, offsets, part.shape))
    return wants


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (2, 3), (3, 2), (4, 1), (3, 5)])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_world_size_gets_the_same_numbers(cluster, old: int, new: int, dim: int) -> None:
    """A node is lost for good, or one is added: every tensor is resharded from memory, exactly."""
    plan = sealed_state(cluster, old, dim_of=lambda name: dim if name == "emb" else 0)
    node = cluster.nodes["n0"]
    with Restore(plan, new, node.arena, node.sources) as restore:
        for rank in range(new):
            wants = wants_of(rank, new, 1 - dim if new > 1 else 0)
            batch = restore.assemble(rank, boxes(wants))
            check(batch, wants)
            assert batch.local_bytes + batch.remote_bytes == sum(
                len(region(TENSORS[w.name], w.offsets, w.lengths)) for w in wants
            )
            restore.release(batch.batch_id)
    assert [obj.kind for obj in node.arena.sealed()] == ["slot"]
    assert not list((node.arena.root / "buffers").iterdir())


def test_random_boxes_from_a_mix_of_layouts(cluster) -> None:
    """Boxes begin and end anywhere, on sources that are split along different dimensions."""
    dice = random.Random(11)
    plan = sealed_state(cluster, 3, ranks_per_node=2, dim_of=lambda name: 1 if name in ("emb", "half") else 0)
    node = cluster.nodes["n1"]
    with Restore(plan, 2, node.arena, node.sources) as restore:
        for _ in range(40):
            wants = []
            for _ in range(dice.randrange(1, 8)):
                name = dice.choice(list(TENSORS))
                offsets, lengths = [], []
                for size in TENSORS[name].shape:
                    begin, end = sorted((dice.randint(0, size), dice.randint(0, size)))
                    offsets.append(begin)
                    lengths.append(end - begin)
                wants.append(want(name, offsets, lengths))
            batch = restore.assemble(0, boxes(wants))
            check(batch, wants)
            restore.release(batch.batch_id)


def test_what_is_here_is_mapped_and_not_copied(cluster) -> None:
    """The common case, the same world size: recovery takes no memory and no copy."""
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n1"]
    used = node.arena.used_bytes
    with Restore(plan, 2, node.arena, node.sources) as restore:
        wants = [item for item in wants_of(1, 2) if item.name != "scalar" and 0 not in item.lengths]
        batch = restore.assemble(1, boxes(wants))
        slot = node.arena.find(slot_key(plan.slots[1]))
        assert batch.paths == (str(slot.path),)
        assert batch.remote_bytes == batch.fetched_bytes == 0
        assert node.arena.used_bytes == used
        check(batch, wants)
        # Nobody may write to it while the worker reads, and anybody may afterwards.
        assert not node.arena.invalidate(slot)
        restore.release(batch.batch_id)
        restore.release(batch.batch_id)
    assert node.arena.invalidate(slot)


def test_leases_end_with_the_restore(cluster) -> None:
    """A worker that dies while it restores releases nothing itself."""
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]
    restore = Restore(plan, 2, node.arena, node.sources)
    restore.assemble(0, boxes(wants_of(0, 2)))
    restore.write_manifest(0)
    restore.close()
    assert node.arena.invalidate(node.arena.find(slot_key(plan.slots[0])))
    assert not list((node.arena.root / "buffers").iterdir())
    with pytest.raises(LocalProtocolError):
        restore.assemble(0, boxes(wants_of(0, 2)))
    assert not list((node.arena.root / "buffers").iterdir())


def test_a_batch_outlives_the_failure_of_another(cluster) -> None:
    """One rank of this node reads its slot in place while another finds that a peer's is rotten."""
    plan = sealed_state(cluster, 2)
    node, other = cluster.nodes["n0"], cluster.nodes["n1"]
    slot = node.arena.find(slot_key(plan.slots[0]))
    with Restore(plan, 2, node.arena, node.sources) as restore:
        mine = [want("w", (0, 0, 0), (3, 7, 5))]
        batch = restore.assemble(0, boxes(mine))
        other.arena.find(slot_key(plan.slots[1])).view[-1000] ^= 1
        with pytest.raises(CorruptionError):
            restore.assemble(1, boxes(wants_of(1, 2)))
        assert not node.arena.invalidate(slot)
        check(batch, mine)
        restore.release(batch.batch_id)
        assert node.arena.invalidate(slot)


def test_a_full_arena_keeps_nobody_from_what_is_whole_in_it(cluster, tmp_path, monkeypatch) -> None:
    """Somebody else has filled the tmpfs: the state is all there, and 20 KiB for saying so are not."""
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Restore(plan, 2, node.arena, node.sources) as restore:
        monkeypatch.setattr(node.arena, "budget_bytes", node.arena.used_bytes)
        batch_id, path = restore.write_manifest(0)
        assert (restore.manifest(0), 0o100600) == (Path(path).read_bytes(), os.stat(path).st_mode)
        check(restore.assemble(0, boxes([want("w", (0, 0, 0), (3, 7, 5))])), [want("w", (0, 0, 0), (3, 7, 5))])
        restore.release(batch_id)
        assert [] == os.listdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(BudgetError, match="neither the arena nor .*nowhere has room"):
            restore.write_manifest(0)


def test_manifest_says_what_the_source_has(cluster) -> None:
    """The worker builds its wishes from this file."""
    nodes = cluster.add("n0", "n1")
    slots = [
        cluster.seal(
            node,
            shards_of(rank, 2),
            rank=rank,
            world_size=2,
            meta={"lr": 0.5 + rank, "text": "ü"},
            ties={"head": "emb"} if rank else None,
        )
        for rank, node in enumerate(nodes)
    ]
    plan = plan_of(cluster, slots, ["n0", "n1"])
    with Restore(plan, 3, nodes[0].arena, nodes[0].sources) as restore:
        for rank in range(3):
            batch_id, path = restore.write_manifest(rank)
            with open(path, "rb") as file:
                manifest = json.loads(file.read())
            assert manifest["version"] == 1
            assert manifest["source"] == {"epoch": 1, "step": 7, "world_size": 2, "rank": rank % 2}
            assert json.loads(manifest["meta"]) == {"rank": rank % 2, "lr": 0.5 + rank % 2, "text": "ü"}
            assert manifest["ties"] == {"head": "emb"}
            found = {tensor["name"]: tensor for tensor in manifest["tensors"]}
            assert found.keys() == {*TENSORS, "rng"}
            assert len(found) == len(manifest["tensors"])
            for name, value in TENSORS.items():
                assert found[name] == {
                    "name": name,
                    "dtype": str(value.dtype),
                    "shape": list(value.shape),
                    "scope": "global",
                    "kind": "param",
                }
            assert found["rng"]["scope"] == "rank"
            restore.release(batch_id)


def test_private_state_comes_from_the_source_rank(cluster) -> None:
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]
    with Restore(plan, 5, node.arena, node.sources) as restore:
        for rank in range(5):
            batch = restore.assemble(rank, boxes([want("rng", (0,), (16,), "rank")]))
            assert bytes_at(batch, 0, 16) == bytes([rank % 2] * 16)


@pytest.mark.parametrize("kind", ["param", "optim", "buffer"])
def test_private_parameters_that_differ_are_refused_elsewhere(cluster, kind: str) -> None:
    """Plain tensors that each rank has for itself: with another world size nobody knows which one is right."""
    nodes = cluster.add("n0", "n1", "n2")
    values = {"same": [np.arange(9.0)] * 3, "own": [np.arange(9.0) + rank for rank in range(3)]}
    values["some"] = [np.arange(9.0), np.arange(9.0), None]
    slots = []
    for rank, node in enumerate(nodes):
        shards = [(private_box(n, v[rank], kind), v[rank]) for n, v in values.items() if v[rank] is not None]
        slots.append(cluster.seal(node, shards, rank=rank, world_size=3))
    plan = plan_of(cluster, slots, ["n0", "n1", "n2"])
    wanted = {name: [want(name, (0,), (9,), "rank")] for name in values}
    with Restore(plan, 3, nodes[0].arena, nodes[0].sources) as restore:
        for rank in range(3):
            assert bytes_at(restore.assemble(rank, boxes(wanted["own"])), 0, 72) == values["own"][rank].tobytes()
    with Restore(plan, 2, nodes[0].arena, nodes[0].sources) as restore:
        assert bytes_at(restore.assemble(1, boxes(wanted["same"])), 0, 72) == np.arange(9.0).tobytes()
        if kind == "buffer":
            assert bytes_at(restore.assemble(1, boxes(wanted["own"])), 0, 72) == (np.arange(9.0) + 1).tobytes()
            return
        for _ in range(2):
            with pytest.raises(Unrecoverable, match=r"'own' is private .* rank 1 .* another value"):
                restore.assemble(1, boxes(wanted["own"]))
            with pytest.raises(Unrecoverable, match=r"'some' is private .* rank 2 .* does not have it"):
                restore.assemble(0, boxes(wanted["some"]))


def test_wishes_that_cannot_be_met(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal names the tensor, and nothing is held."""
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]
    with Restore(plan, 2, node.arena, node.sources) as restore:
        for wish, error, words in (
            (want("nope", (0,), (1,)), LayoutError, "no tensor 'nope'"),
            (want("b", (0,), (14,)), LayoutError, "'b'"),
            (want("b", (0, 0), (1, 1)), LayoutError, "'b'"),
            (want("b", (0,), (1,), "rank"), LayoutError, "no tensor 'b' of scope 'rank'"),
            (want("b", (0,), (1,), "all"), UsageError, "scope"),
        ):
            with pytest.raises(error, match=words):
                restore.assemble(0, boxes([want("w", (0, 0, 0), (64, 7, 5)), wish]))
        with pytest.raises(UsageError, match="no rank 2"):
            restore.assemble(2, boxes([]))
        monkeypatch.setattr(restore_module, "MAX_BATCH_BYTES", 1000)
        with pytest.raises(UsageError, match="the limit is 1000"):
            restore.assemble(0, boxes([want("emb", (0, 0), (1031, 300))]))
        assert restore.assemble(0, boxes([want("none", (0, 0), (0, 4))])).offsets == (0,)
        assert restore.assemble(0, boxes([])).paths == ()
    assert not list((node.arena.root / "buffers").iterdir())


def test_a_gap_in_the_sources_is_refused(cluster) -> None:
    """Half of a state is no state."""
    (node,) = cluster.add("n0")
    slots = [cluster.seal(node, shards_of(0, 2), rank=0, world_size=1)]
    plan = plan_of(cluster, slots, ["n0"])
    with Restore(plan, 1, node.arena, node.sources) as restore, pytest.raises(Unrecoverable, match="emb"):
        restore.assemble(0, boxes(wants_of(0, 1)))


@pytest.mark.parametrize("where", ["local", "in place", "peer"])
def test_rot_is_reported_and_refused(cluster, where: str) -> None:
    """The shell asks for a rebuild; the worker waits, and never sees a wrong byte."""
    plan = sealed_state(cluster, 2)
    node, other = cluster.nodes["n0"], cluster.nodes["n1"]
    owner = other if where == "peer" else node
    obj = owner.arena.find(slot_key(plan.slots[1 if where == "peer" else 0]))
    with Restore(plan, 2, node.arena, node.sources) as restore:
        obj.view[obj.file_bytes - 300_000] ^= 1
        rows = TENSORS["emb"].shape[0]
        half = -(-rows // 2)
        wish = {
            "local": want("emb", (0, 0), (rows, 300)),
            "in place": want("emb", (0, 0), (half, 300)),
            "peer": want("emb", (half, 0), (rows - half, 300)),
        }[where]
        for _ in range(2):
            with pytest.raises(CorruptionError, match="does not match its digest"):
                restore.assemble(0, boxes([wish]))
        found = node.corruptions[0]
        assert found.local == (where != "peer")
        if found.local:
            assert (found.slot_id, found.slot) == (obj.slot_id, plan.slots[0])
        # It is freed, decoded, and there again: the same restore goes on with it.
        wanted = bytearray(obj.view)
        wanted[obj.file_bytes - 300_000] ^= 1
        ref, digests = obj.ref, obj.digests
        owner.arena.delete(obj)
        with pytest.raises((CorruptionError, PeerError)):
            restore.assemble(0, boxes([wish]))
        assert obj.state is State.GONE  # the failed restore holds nothing of it
        fresh = owner.arena.create_slot(bytes(wanted[:100]), len(wanted))
        fresh.view[:] = wanted
        owner.arena.seal(fresh, ref, digests)
        check(restore.assemble(0, boxes([wish])), [wish])
    assert not list((node.arena.root / "buffers").iterdir())


def test_plans_that_do_not_fit_are_refused_at_once(cluster) -> None:
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]

    def broken(**changes) -> control.RestorePlan:
        changed = control.RestorePlan()
        changed.CopyFrom(plan)
        for key, value in changes.items():
            setattr(changed, key, value)
        return changed

    for bad in (broken(source_step=8), broken(source_world_size=3), broken(kind=control.RESTORE_KIND_FRESH)):
        with pytest.raises(UsageError):
            Restore(bad, 2, node.arena, node.sources)
    wrong = broken()
    wrong.slots[1].root_digest = "f" * 32
    with pytest.raises(CorruptionError, match="expected ffff"):
        Restore(wrong, 2, node.arena, node.sources)
    wrong = broken()
    wrong.slots[0].root_digest = "f" * 32
    with pytest.raises(CorruptionError, match="expected ffff"):
        Restore(wrong, 2, node.arena, node.sources)
    node.arena.delete(node.arena.find(slot_key(plan.slots[0])))
    with pytest.raises(CorruptionError, match="is not on n0 any more"):
        Restore(plan, 2, node.arena, node.sources)


def test_failpoint_in_the_middle_holds_nothing(cluster) -> None:
    plan = sealed_state(cluster, 2)
    node = cluster.nodes["n0"]
    with Restore(plan, 1, node.arena, node.sources) as restore:
        failpoints.configure("daemon.mid_assemble=raise@1")
        with pytest.raises(failpoints.FailpointError):
            restore.assemble(0, boxes(wants_of(0, 1)))
        assert not list((node.arena.root / "buffers").iterdir())
        check(restore.assemble(0, boxes(wants_of(0, 1))), wants_of(0, 1))


def test_from_a_durable_snapshot_after_all_memory_is_gone(cluster, tmp_path) -> None:
    """More than m nodes died. The durable tier gives the same answers, to any world size."""
    plan = sealed_state(cluster, 3)
    ref = export_snapshot(plan, tmp_path / "out", cluster.nodes["n0"].sources)
    with Restore(plan, 2, cluster.nodes["n0"].arena, cluster.nodes["n0"].sources) as restore:
        manifests = [restore.manifest(rank) for rank in range(2)]
    for node in list(cluster.nodes.values()):
        node.kill()
    (fresh,) = cluster.add("fresh")
    durable = control.RestorePlan(
        job="job",
        epoch=5,
        kind=control.RESTORE_KIND_DURABLE,
        source_epoch=1,
        source_step=7,
        source_world_size=3,
        durable_path=ref.path,
    )
    with Restore(durable, 2, fresh.arena, fresh.sources) as restore:
        for rank in range(2):
            wants = wants_of(rank, 2, 1)
            batch = restore.assemble(rank, boxes(wants))
            check(batch, wants)
            assert batch.local_bytes == 0
            assert restore.manifest(rank) == manifests[rank]
    path = tmp_path / "out" / "rank-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) - 1000] ^= 1
    path.write_bytes(data)
    with Restore(durable, 1, fresh.arena, fresh.sources) as restore:
        with pytest.raises(CorruptionError, match=r"rank-000001.safetensors was changed in bytes"):
            restore.assemble(0, boxes(wants_of(0, 1)))
        assert [found.local for found in fresh.corruptions] == [False]
    durable.source_step = 8
    with pytest.raises(CorruptionError, match="expected"):
        Restore(durable, 2, fresh.arena, fresh.sources)


def test_buffers_are_used_again_and_the_bytes_are_the_new_ones(cluster) -> None:
    """Memory that is touched for the first time costs more than the network; old bytes in it must not be seen."""
    here, there = cluster.add("n0", "n1")
    values = [np.random.default_rng(seed).random(1_500_000, np.float32) for seed in range(2)]
    shards = [(whole(f"w{i}", value), value) for i, value in enumerate(values)]
    plan = plan_of(cluster, [cluster.seal(there, shards)], ["n1"])
    with Restore(plan, 1, here.arena, here.sources) as restore:
        paths = set()
        for _ in range(3):
            for i, value in enumerate(values):
                batch = restore.assemble(0, boxes([want(f"w{i}", (0,), value.shape)]))
                assert bytes_at(batch, 0, value.nbytes) == value.tobytes()
                paths.update(batch.paths)
                restore.release(batch.batch_id)
        assert len(paths) == 1
        held = [restore.assemble(0, boxes([want(f"w{i}", (0,), value.shape)])) for i, value in enumerate(values)]
        for batch, value in zip(held, values, strict=True):  # none is taken away from under a worker
            assert bytes_at(batch, 0, value.nbytes) == value.tobytes()
    assert not list((here.arena.root / "buffers").iterdir())


def test_columns_that_do_not_make_up_boxes_are_refused() -> None:
    there = Boxes([Layout.build([whole("w", np.zeros((4, 2), np.float32))], meta_capacity=0)], 1)
    right = boxes([want("w", (1, 0), (2, 2))])
    assert 1 == len(there.targets(right, 0))
    for field, value in (("cut_of", 1), ("cut_of", 0), ("names", "w")):
        wrong = worker.RestoreBoxes.FromString(right.SerializeToString())
        if field == "cut_of" and value:
            wrong.cut_of[0] = value
        else:
            getattr(wrong, field).append(value)
        with pytest.raises(UsageError, match="do not make up boxes"):
            there.targets(wrong, 0)


@pytest.mark.parametrize("seed", range(8))
def test_ranks_that_hold_different_tensors_differently(seed: int) -> None:
    """Stages of a pipeline, parts that only some have, replicas, several boxes in one rank: as one heap of boxes."""
    dice = random.Random(seed)
    values = {f"t{i}": np.frombuffer(dice.randbytes(4 * 24), np.uint32).reshape(dice.choice([(24,), (6, 4), (2, 3, 4)]))
              for i in range(20)}  # fmt: skip
    num_ranks = dice.randint(1, 6)
    held: list[list[tuple[TensorBox, np.ndarray]]] = [[] for _ in range(num_ranks)]
    for name, value in values.items():
        edges = [0, *sorted(dice.sample(range(1, len(value)), dice.randint(0, len(value) - 1))), len(value)]
        ranks = dice.choice([list(range(num_ranks)), dice.sample(range(num_ranks), dice.randint(1, num_ranks))])
        for begin, end in zip(edges, edges[1:], strict=False):
            for rank in dice.sample(ranks, dice.choice([1, len(ranks)])):
                box = Box((begin, *(0 for _ in value.shape[1:])), (end - begin, *value.shape[1:]))
                held[rank].append((replace(whole(name, value), box=box), value[begin:end]))
    own = [np.full(3, rank, np.uint32) for rank in range(num_ranks)]
    for rank, mine in enumerate(held):
        mine.append((private_box("own", own[rank], "extra"), own[rank]))
    layouts = [Layout.build([box for box, _ in mine], meta_capacity=0) for mine in held]
    files = [bytearray(layout.file_bytes) for layout in layouts]
    for layout, file, mine in zip(layouts, files, held, strict=True):
        parts = {(box.name, box.box): part.tobytes() for box, part in mine}
        for shard in layout.shards:
            file[shard.begin : shard.end] = parts[shard.tensor.name, shard.tensor.box]
    there = Boxes(layouts, num_ranks + 1)
    sources = [SimpleNamespace(is_local=dice.random() < 0.5) for _ in range(num_ranks)]
    for rank in range(num_ranks + 1):
        wants = [want("own", (0,), (3,), "rank")]
        for name, value in values.items():
            begin = dice.randrange(len(value))
            length = dice.randint(0, len(value) - begin)
            wants.append(want(name, (begin, *(0 for _ in value.shape[1:])), (length, *value.shape[1:])))
        targets = there.targets(boxes(wants), rank)
        by_target = there.copies(targets, rank, sources, None)
        for number, item in enumerate(wants):
            value = own[rank % num_ranks] if item.scope == "rank" else values[item.name]
            out = bytearray(targets[number].nbytes)
            for copy in by_target.get(number, []):
                apply_copy(copy, files[copy.source], out)
            assert region(value, item.offsets, item.lengths) == bytes(out)


def test_a_replica_that_has_come_to_this_node_is_preferred_from_then_on() -> None:
    value = np.zeros((4, 2), np.float32)
    layouts = [Layout.build([whole("w", value)], meta_capacity=0) for _ in range(2)]
    there = Boxes(layouts, 1)
    targets = there.targets(boxes([want("w", (1, 0), (2, 2))]), 0)
    for local in ((False, False), (False, True), (True, True), (False, True)):
        sources = [SimpleNamespace(is_local=one) for one in local]
        ((copy,),) = there.copies(targets, 0, sources, None).values()
        assert (local.index(True) if True in local else 0) == copy.source
