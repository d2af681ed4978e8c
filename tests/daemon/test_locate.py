"""A worker that reads slots itself: right bytes in its tensors, or left to the daemon and told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np
import pytest
import torch
from snapshotd_client.direct import DirectReader
from snapshotd_client.errors import RestoreError
from snapshotd_client.fetch import Entry, Want
from snapshotd_client.placement import Piece

from snapshotd import failpoints
from snapshotd.arena import slot_key
from snapshotd.daemon.persist import export_snapshot
from snapshotd.daemon.restore import Restore
from snapshotd.layout import Box
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.daemon.conftest import whole
from tests.daemon.test_restore import TENSORS, Asked, boxes, plan_of, sealed_state, split, want, wants_of

Change = Callable[[worker.RestoreSources], object]


class DirectLink:
    """A link to a daemon that is this one restore; notes what else it is told."""

    session = 1

    def __init__(self, restore: Restore, rank: int = 0, change: Change = lambda sources: None) -> None:
        self.told: list[worker.Frame] = []
        self.num_asked = 0
        self._restore, self._rank, self._change = restore, rank, change

    def begin(self, frame: worker.Frame) -> worker.RestoreSources:
        self.num_asked += 1
        return self._restore.locate(self._rank, frame.restore_locate.boxes, set(frame.restore_locate.known))

    def finish(self, question: worker.RestoreSources, timeout_s: float) -> worker.Frame | None:
        assert timeout_s >= 0
        self._change(question)
        return worker.Frame(restore_sources=question)

    def post(self, frame: worker.Frame, session: int) -> bool:
        self.told.append(frame)
        return True

    @property
    def faults(self) -> list[str]:
        return [frame.restore_fault.node_id for frame in self.told]


def wanted(wants: Sequence[Asked]) -> list[Want]:
    """With a tensor for each, full of ones, that is to be filled."""
    made = []
    for item in wants:
        value = TENSORS[item.name]
        box = Box(tuple(item.offsets), tuple(item.lengths))
        dtype = str(value.dtype)
        target = torch.ones(box.lengths, dtype=getattr(torch, dtype))
        entry = Entry(item.name, dtype, value.shape, item.scope, "param")
        made.append(Want(entry, Piece(box, (0,) * box.ndim), target))
    return made


def vector(name: str, size: int) -> Want:
    """All of a tensor of float32, with zeros that are to be filled."""
    return Want(
        Entry(name, "float32", (size,), "global", "param"), Piece(Box.whole((size,)), (0,)), torch.zeros(size)
    )


def is_right(item: Want) -> bool:
    box = item.piece.box
    cut = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))
    return item.target.numpy().tobytes() == np.ascontiguousarray(TENSORS[item.entry.name][cut]).tobytes()


def names(wants: Sequence[Want]) -> set[str]:
    return {item.entry.name for item in wants}


def read(link: object, wants: Sequence[Want], threads: int = 2) -> tuple[DirectReader, list[Want]]:
    reader = DirectReader(link, time.monotonic() + 30.0, threads)  # type: ignore[arg-type]
    return reader, reader.run(wants)


@pytest.fixture
def scene(cluster) -> Iterator[tuple[Restore, object]]:
    """Three ranks on three nodes; a fourth node, that has nothing, restores with one."""
    plan = sealed_state(cluster, 3)
    (node,) = cluster.add("reader")
    node.sources.learn(cluster.peers)
    with Restore(plan, 1, node.arena, node.sources) as restore:
        yield restore, cluster


@pytest.mark.parametrize("source_dim", [0, 1])
@pytest.mark.parametrize("target_dim", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 1), (2, 3), (4, 2)])
def test_any_layout_comes_whole_and_exactly_once(
    cluster, before: int, after: int, source_dim: int, target_dim: int
) -> None:
    plan = sealed_state(cluster, before, ranks_per_node=2, dim_of=lambda name: source_dim)
    (node,) = cluster.add("reader")
    with Restore(plan, after, node.arena, node.sources) as restore:
        assert restore.is_direct
        for rank in range(after):
            wants = [item for item in wanted(wants_of(rank, after, target_dim)) if item.nbytes]
            reader, left = read(DirectLink(restore, rank), wants)
            assert [] == left
            assert all(map(is_right, wants))
            assert sum(item.nbytes for item in wants) == reader.peer_bytes
    assert node.arena.used_bytes == 0  # no byte of it passed through the daemon
    assert node.corruptions == []


def test_many_tensors_are_located_while_others_are_read(cluster) -> None:
    (there, node) = cluster.add("n0", "reader")
    values = {f"w{i}": np.random.default_rng(i).random(100 + i, np.float32) for i in range(2500)}
    ref = cluster.seal(there, [(whole(name, value), value) for name, value in values.items()])
    plan = plan_of(cluster, [ref], ["n0"])
    wants = [vector(name, len(value)) for name, value in values.items()]
    with Restore(plan, 1, node.arena, node.sources) as restore:
        link = DirectLink(restore)
        _, left = read(link, wants)
    assert [] == left
    assert all(item.target.numpy().tobytes() == values[item.entry.name].tobytes() for item in wants)
    assert 1 < link.num_asked


def test_scattered_boxes_of_this_node_are_left_to_the_daemon(cluster) -> None:
    plan = sealed_state(cluster, 3)
    node = cluster.nodes["n1"]
    with Restore(plan, 3, node.arena, node.sources) as restore:
        wants = [item for rank in range(3) for item in wanted(wants_of(rank, 3)) if item.nbytes]
        _, left = read(DirectLink(restore), wants)
        own = [item for item in wants if item.piece.box.offsets[:1] == split(TENSORS[item.entry.name], 1, 3)[0][:1]]
        own = [item for item in own if item.target.ndim]
        assert len(own) >= 4
        assert set(map(id, own)) == set(map(id, left))
        assert all(is_right(item) for item in wants if item not in own)


def test_strided_memory_is_filled_and_nothing_beside_it(scene) -> None:
    restore, _ = scene
    (plain,) = wanted([want("emb", (0, 0), (1031, 300))])
    base = torch.ones(1031, 600)
    _, left = read(DirectLink(restore), [Want(plain.entry, plain.piece, base[:, ::2])])
    assert [] == left
    assert TENSORS["emb"].tobytes() == base[:, ::2].contiguous().numpy().tobytes()
    assert bool((base[:, 1::2] == 1).all())


def test_memory_that_is_not_the_hosts_is_filled_by_way_of_some_that_is(scene, monkeypatch) -> None:
    """As on a device: nothing is received straight into it, and a large tensor comes in parts."""
    restore, cluster = scene
    monkeypatch.setattr("snapshotd_client.direct._is_plain", lambda item: False)
    monkeypatch.setattr("snapshotd_client.fetch.BATCH_BYTES", 100_000)
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    link = DirectLink(restore)
    reader, left = read(link, wants)
    assert [] == left
    assert all(map(is_right, wants))
    assert sum(item.nbytes for item in wants) == reader.peer_bytes
    cluster.nodes["n1"].kill()
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    _, left = read(link, wants)
    assert "emb" in names(left)
    assert not any(bool((part.target == 1).all()) for part in wants if part.entry.name == "scalar")
    assert all(bool((part.target == 1).all()) for part in wants if part.entry.name == "w")


@pytest.fixture
def own(cluster) -> Iterator[tuple[Restore, object, list[Want], list[bytes]]]:
    """A rank's whole state in a slot of its own node: long runs, with many small tensors among them."""
    (node,) = cluster.add("n0")
    dice = np.random.default_rng(3)
    values = {f"w{i}": dice.random(int(dice.choice([1, 77, 3000, 90_000, 700_001])), np.float32) for i in range(60)}
    ref = cluster.seal(node, [(whole(name, value), value) for name, value in values.items()])
    wants = [vector(name, len(value)) for name, value in values.items()]
    with Restore(plan_of(cluster, [ref], ["n0"]), 1, node.arena, node.sources) as restore:
        yield restore, node.arena.find(slot_key(ref)), wants, [value.tobytes() for value in values.values()]


def filled(wants: Sequence[Want]) -> list[bytes]:
    return [item.target.numpy().tobytes() for item in wants]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_slot_of_this_node_is_read_as_a_file(own, threads: int) -> None:
    restore, _, wants, expected = own
    link = DirectLink(restore)
    reader, left = read(link, wants, threads)
    assert [] == left
    assert expected == filled(wants)
    assert (sum(map(len, expected)), 0) == (reader.own_bytes, reader.peer_bytes)
    assert [] == link.told
    found = restore.locate(0, boxes([want("w0", (0,), wants[0].piece.box.lengths)] * 2), {"other"})
    assert not found.slots or found.slots[0].digests


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_rot_in_a_slot_of_this_node(own, place: float) -> None:
    restore, obj, wants, expected = own
    obj.view[int(restore._layouts[0].meta[0] * place)] ^= 1
    link = DirectLink(restore)
    _, left = read(link, wants, threads=1)
    assert ["n0"] == link.faults
    assert "does not match its digest" in link.told[0].restore_fault.detail
    assert left
    right = dict(zip(map(id, wants), expected, strict=True))
    assert all(right[id(item)] == item.target.numpy().tobytes() for item in wants if item not in left)


def test_a_slot_that_is_gone_or_not_ours_is_left_to_the_daemon(own) -> None:
    restore, obj, wants, _ = own
    os.rename(obj.path, f"{obj.path}.real")
    assert wants == read(DirectLink(restore), wants)[1]
    os.symlink(f"{obj.path}.real", obj.path)
    assert wants == read(DirectLink(restore), wants)[1]
    os.replace(f"{obj.path}.real", obj.path)

    def change(found: worker.RestoreSources) -> None:
        found.slots[0].digests = found.slots[0].digests[:-8] + bytes(8)

    link = DirectLink(restore, change=change)
    assert wants == read(link, wants)[1]
    assert ["n0"] == link.faults
    os.truncate(obj.path, 100_000)
    link = DirectLink(restore)
    assert wants == read(link, wants)[1]
    behind = {shard.tensor.name for shard in restore._layouts[0].shards if shard.begin > 128 * 1024}
    touched = {item.entry.name for item in wants if item.target.any()}
    assert behind
    assert not touched & behind


def test_durable_and_encrypted_sources_are_left_to_the_daemon(scene, tmp_path) -> None:
    restore, cluster = scene
    node = cluster.nodes["reader"]
    order = restore._order
    ref = export_snapshot(order, tmp_path / "out", node.sources)
    durable = control.RestorePlan()
    durable.CopyFrom(order)
    durable.kind, durable.durable_path = control.RESTORE_KIND_DURABLE, ref.path
    with Restore(durable, 1, node.arena, node.sources) as other:
        assert not other.is_direct
        assert list(range(7)) == list(other.locate(0, boxes(wants_of(0, 1))).others)
    node.client.is_plain = False
    assert not restore.is_direct
    found = restore.locate(0, boxes(wants_of(0, 1)))
    assert (list(range(7)), 0) == (list(found.others), len(found.slots))


def test_rot_on_a_peer_is_told_and_left_to_the_daemon(scene) -> None:
    """In a whole chunk the worker finds it, in part of one its owner: wrong bytes are in no case taken for right."""
    restore, cluster = scene
    there = cluster.nodes["n1"]
    obj = there.arena.find(slot_key(restore._order.slots[1]))
    for at in (obj.view.nbytes - 3000, 300_000):
        wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
        obj.view[at] ^= 16
        link = DirectLink(restore)
        _, left = read(link, wants)
        obj.view[at] ^= 16
        assert ["n1"] == link.faults
        assert "does not match its digest" in link.told[0].restore_fault.detail
        assert {"emb", "w", "b", "half", "flag"} == names(left)
        assert all(is_right(item) for item in wants if item not in left)


def test_a_bit_that_flips_on_the_wire(scene) -> None:
    restore, _ = scene
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    link = DirectLink(restore)
    failpoints.configure("transfer.corrupt_send=corrupt@2")
    _, left = read(link, wants, threads=1)
    failpoints.configure(None)
    assert ["n0"] == link.faults
    assert wants == left  # n0 has a part of each
    assert [] == read(link, wants)[1]
    assert all(map(is_right, wants))


def test_a_dead_peer_costs_one_try_and_nobody_else_anything(scene, caplog) -> None:
    restore, cluster = scene
    cluster.nodes["n2"].kill()
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    mine = [item for item in wanted(wants_of(0, 3)) if item.nbytes]  # rank 0's part of each: n2 has none of it
    link = DirectLink(restore)
    _, left = read(link, [*wants, *mine])
    assert [item for item in wants if item.target.ndim] == left
    assert all(map(is_right, mine))
    assert [] == link.faults
    assert 1 == sum("n2" in record.message for record in caplog.records)


def test_a_peer_that_dies_in_the_middle_of_a_tensor(cluster) -> None:
    there, node = cluster.add("n0", "reader")
    value = np.random.default_rng(1).random(1_500_000, np.float32)
    plan = plan_of(cluster, [cluster.seal(there, [(whole("w", value), value)])], ["n0"])
    with Restore(plan, 1, node.arena, node.sources) as restore:
        item = vector("w", len(value))
        link = DirectLink(restore)
        failpoints.configure("transfer.mid_send=raise@2")
        reader, left = read(link, [item])
        assert ([item], [], 0) == (left, link.faults, reader.peer_bytes)
        assert item.target[:100_000].numpy().tobytes() == value[:100_000].tobytes()  # it did come so far
        batch = restore.assemble(0, boxes([want("w", (0,), value.shape)]))
        with open(batch.paths[0], "rb") as file:
            file.seek(batch.offsets[0])
            assert value.tobytes() == file.read(value.nbytes)


def _other_want(found: worker.RestoreSources) -> None:
    found.slots[0].wants[0] = 99


def _beyond(found: worker.RestoreSources) -> None:
    found.slots[-1].dst_begins[0] += 1


def _hole(found: worker.RestoreSources) -> None:
    for column in ("wants", "src_begins", "dst_begins", "run_bytes"):
        found.slots[1].ClearField(column)


def _twice(found: worker.RestoreSources) -> None:
    found.others.append(0)


def _unknown(found: worker.RestoreSources) -> None:
    found.others.append(50)


def _ragged(found: worker.RestoreSources) -> None:
    found.slots[0].run_bytes.pop()


def _block_of_nothing(found: worker.RestoreSources) -> None:
    found.slots[0].blocks.add(copy=1000)


@pytest.mark.parametrize("change", [_other_want, _beyond, _hole, _twice, _unknown, _ragged, _block_of_nothing])
def test_an_answer_that_does_not_fit_is_an_error_before_a_byte_is_read(scene, change: Change) -> None:
    """A confused daemon's bytes must not end up in the model."""
    restore, _ = scene
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    with pytest.raises(RestoreError, match="the daemon's answer"):
        read(DirectLink(restore, change=change), wants)
    assert all(bool((item.target == 1).all()) for item in wants)


def test_another_slot_than_the_daemon_means_is_refused(scene) -> None:
    """The root digest is the daemon's word; the chunk digests are the peer's."""
    restore, _ = scene

    def change(found: worker.RestoreSources) -> None:
        found.slots[0].root_digest = "f" * 32

    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    link = DirectLink(restore, change=change)
    _, left = read(link, wants)
    assert ["n0"] == link.faults
    assert names(wants) == names(left)


def test_a_daemon_that_is_gone_or_has_an_error(scene) -> None:
    restore, _ = scene

    class Gone(DirectLink):
        def finish(self, question: worker.RestoreSources, timeout_s: float) -> worker.Frame | None:
            return None

    def change(found: worker.RestoreSources) -> None:
        found.error = "rank 2's slot is rotten"

    for link in (Gone(restore), DirectLink(restore, change=change)):
        wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
        assert wants == read(link, wants)[1]
        assert all(bool((item.target == 1).all()) for item in wants)


def test_the_deadline_ends_it(scene) -> None:
    restore, _ = scene
    wants = [item for item in wanted(wants_of(0, 1)) if item.nbytes]
    reader = DirectReader(DirectLink(restore), time.monotonic() - 1.0, 1)  # type: ignore[arg-type]
    assert names(wants) == names(reader.run(wants))


def test_what_is_wrong_is_said_as_for_other_requests(scene) -> None:
    restore, _ = scene
    assert prod(TENSORS["emb"].shape) * 4 == sum(
        sum(slot.run_bytes) for slot in restore.locate(0, boxes([want("emb", (0, 0), (1031, 300))])).slots
    )
    for wrong, match in (
        (want("nobody", (0,), (1,)), "no tensor 'nobody'"),
        (want("b", (10,), (5,)), "b"),
        (want("b", (0,), (1,), scope="galaxy"), "the scope of a box must be"),
    ):
        with pytest.raises(Exception, match=match):
            restore.locate(0, boxes([wrong]))
