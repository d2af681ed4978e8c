"""Sources: no byte leaves one unverified, however it is asked for."""

from __future__ import annotations

import threading
from contextlib import closing
from itertools import accumulate

import pytest

from snapshotd import failpoints
from snapshotd.arena import State, slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.persist import export_snapshot
from snapshotd.daemon.sources import DurableSource, Source, Sources
from snapshotd.durable import open_snapshot
from snapshotd.errors import CorruptionError, PeerError, PeerUnreachable, UsageError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy
from snapshotd.transfer import Piece
from snapshotd.v1 import control_pb2 as control


@pytest.fixture
def scene(cluster):
    """A slot of several chunks on n0, and what n0 and n1 see of it."""
    here, there = cluster.add("n0", "n1")
    ref = cluster.seal_random(here, 500_000)
    there.sources.learn(cluster.peers)
    return here, there, ref


def pieces_of(ranges) -> list[Piece]:
    return [Piece(begin, memoryview(bytearray(end - begin))) for begin, end in ranges]


RANGES = {
    "one": [(0, 3 * CHUNK_BYTES)],
    "one, unaligned": [(5, 2 * CHUNK_BYTES + 9)],
    "many": [(0, CHUNK_BYTES), (CHUNK_BYTES, 3 * CHUNK_BYTES), (6 * CHUNK_BYTES, 2_004_296)],
    "many, some unaligned": [(0, CHUNK_BYTES), (CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 7), (1_900_000, 1_900_001)],
}


@pytest.mark.parametrize("where", ["local", "peer"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_each_way_of_reading_is_right_and_verified(scene, where: str, ranges) -> None:
    """A range that nobody checks is the one where the memory is bad."""
    here, there, ref = scene
    node = here if where == "local" else there
    data = here.slot_bytes(ref)
    view = here.arena.find(slot_key(ref)).view
    with closing(node.sources.slot(ref, "n0")) as source:
        assert source.is_local == (where == "local")
        pieces = pieces_of(ranges)
        source.read(pieces)
        for piece in pieces:
            assert bytes(piece.into) == data[piece.begin : piece.end]
            assert bytes(source.fetch(piece.begin, piece.end, piece.into)) == data[piece.begin : piece.end]
    for begin, end in ranges:
        for at in (begin, (begin + end) // 2, end - 1):
            view[at] ^= 128
            with closing(node.sources.slot(ref, "n0")) as source:
                with pytest.raises(CorruptionError, match="does not match its digest"):
                    source.read(pieces_of(ranges))
                with pytest.raises(CorruptionError, match="does not match its digest"):
                    source.fetch(begin, end, memoryview(bytearray(end - begin)))
            view[at] ^= 128
    assert {found.local for found in node.corruptions} == {where == "local"}
    assert len(node.corruptions) == 6 * len(ranges)


def copies_of(ranges) -> list[Copy]:
    places = accumulate((end - begin for begin, end in ranges), initial=0)
    return [
        Copy(source=0, target=0, src_begin=begin, dst_begin=place, run_bytes=end - begin)
        for (begin, end), place in zip(ranges, places, strict=False)
    ]


def taken(source: Source, begin: int, end: int) -> bytes:
    found, room = b"", memoryview(bytearray(100_000))
    with source.stream(begin, end) as stream:
        while len(found) < end - begin:
            found += bytes(stream.take(min(100_000, end - begin - len(found)), room))
    return found


@pytest.mark.parametrize("where", ["local", "peer"])
def test_parts_and_streams_are_right_and_verified(scene, where: str) -> None:
    here, there, ref = scene
    node = here if where == "local" else there
    data = here.slot_bytes(ref)
    view = here.arena.find(slot_key(ref)).view
    ranges = [(5, 90), (CHUNK_BYTES - 3, 2 * CHUNK_BYTES), (1_900_000, 1_900_001)]
    expected = b"".join(data[begin:end] for begin, end in ranges)
    with closing(node.sources.slot(ref, "n0")) as source:
        out = bytearray(len(expected))
        source.read([], copies_of(ranges), [memoryview(out)])
        assert out == expected
        for begin, end in ranges:
            assert taken(source, begin, end) == data[begin:end]
        with pytest.raises(UsageError):
            taken(source, ref.file_bytes - 1, ref.file_bytes + 1)
    assert node.corruptions == []
    for begin, end in ranges:
        view[end // CHUNK_BYTES * CHUNK_BYTES if end % CHUNK_BYTES else begin] ^= 4
        with closing(node.sources.slot(ref, "n0")) as source:
            with pytest.raises(CorruptionError, match="does not match its digest"):
                source.read([], copies_of(ranges), [memoryview(out)])
            with pytest.raises(CorruptionError, match="does not match its digest"):
                taken(source, begin, end)
        view[end // CHUNK_BYTES * CHUNK_BYTES if end % CHUNK_BYTES else begin] ^= 4
    assert len(node.corruptions) == 2 * len(ranges)


def test_errors_of_those_who_take_a_stream_are_not_its_own(scene) -> None:
    """A decoder that meets rot in another source must not have this one rebuilt."""
    _, there, ref = scene
    source = there.sources.slot(ref, "n0")
    with pytest.raises(CorruptionError, match="elsewhere"), source.stream(0, ref.file_bytes):
        raise CorruptionError("elsewhere")
    assert there.corruptions == []


def test_rot_elsewhere_in_the_object_disturbs_nobody(scene) -> None:
    here, there, ref = scene
    data = here.slot_bytes(ref)
    here.arena.find(slot_key(ref)).view[5 * CHUNK_BYTES] ^= 1
    for node in (here, there):
        with closing(node.sources.slot(ref, "n0")) as source:
            pieces = pieces_of([(0, CHUNK_BYTES), (2 * CHUNK_BYTES + 1, 5 * CHUNK_BYTES)])
            source.read(pieces)
            assert [bytes(piece.into) for piece in pieces] == [data[piece.begin : piece.end] for piece in pieces]
        assert node.corruptions == []


@pytest.mark.parametrize("count", [1, 4])
def test_a_bit_that_flips_on_the_wire_is_found(scene, count: int) -> None:
    _, there, ref = scene
    ranges = [(i * CHUNK_BYTES, (i + 1) * CHUNK_BYTES) for i in range(count)]
    with closing(there.sources.slot(ref, "n0")) as source:
        source.digests()
        failpoints.configure("transfer.corrupt_send=corrupt@1")
        with pytest.raises(CorruptionError):
            source.read(pieces_of(ranges))
        source.read(pieces_of(ranges))  # the object itself is whole
    assert [found.node_id for found in there.corruptions] == ["n0"]


def test_a_lease_holds_the_object_and_ends(scene) -> None:
    """A slot that is freed while it is read must not be given to a worker."""
    here, _, ref = scene
    obj = here.arena.find(slot_key(ref))
    data = here.slot_bytes(ref)
    source = here.sources.slot(ref, "n0")
    assert not here.arena.delete(obj)
    assert bytes(source.fetch(0, ref.file_bytes, memoryview(b""))) == data
    source.close()
    source.close()
    assert obj.state is State.GONE


def test_what_is_here_is_taken_from_here(scene, cluster) -> None:
    """A rebuilt slot is on another node than the plan says: its own node need not be asked."""
    here, _, ref = scene
    with closing(here.sources.slot(ref, "n1")) as source:
        assert source.is_local
    other = control.SlotRef()
    other.CopyFrom(ref)
    other.root_digest = "0" * 32
    here.sources.learn(cluster.peers)
    with closing(here.sources.slot(other, "n1")) as source:
        assert not source.is_local  # ours is another one
    with pytest.raises(CorruptionError, match="expected 0000"):
        here.sources.slot(other, "n0")
    other.file_bytes += 1
    with pytest.raises(CorruptionError, match="bytes, expected"):
        here.sources.slot(other, "n0")


def test_objects_and_nodes_that_are_not_there(scene) -> None:
    here, there, ref = scene
    other = control.SlotRef()
    other.CopyFrom(ref)
    other.step = 99
    with pytest.raises(CorruptionError, match="is not on n0 any more"):
        here.sources.slot(other, "n0")
    with pytest.raises(PeerUnreachable, match="n7, which has no known address"):
        here.sources.slot(other, "n7")
    with pytest.raises(PeerError):
        there.sources.slot(other, "n0").digests()
    tool = Sources("", None, there.client)
    with pytest.raises(PeerUnreachable, match="no node"):
        tool.slot(ref, "")
    with pytest.raises(UsageError, match="not inside"):
        there.sources.slot(ref, "n0").read(pieces_of([(0, ref.file_bytes + 1)]))
    with pytest.raises(UsageError, match="not inside"):
        here.sources.slot(ref, "n0").read(pieces_of([(0, ref.file_bytes + 1)]))


def test_a_node_that_came_back_elsewhere_is_found_there(scene) -> None:
    here, there, ref = scene
    there.sources.learn([control.PeerAddress(node_id="n0", bulk="127.0.0.1:1")])
    with pytest.raises(PeerUnreachable):
        there.sources.slot(ref, "n0").digests()
    there.sources.learn([here.address])
    assert there.sources.slot(ref, "n0").digests()


def test_a_cancelled_read_says_so(scene) -> None:
    _, there, ref = scene
    cancel = threading.Event()
    source = there.sources.slot(ref, "n0", cancel)
    source.digests()
    cancel.set()
    with pytest.raises(Cancelled):
        source.read(pieces_of([(0, ref.file_bytes)]))
    assert there.corruptions == []


def test_small_neighbours_in_a_durable_file_share_their_chunks(scene, tmp_path) -> None:
    """A thousand biases of one file must not read a thousand chunks."""
    here, _, ref = scene
    data = here.slot_bytes(ref)
    plan = control.RestorePlan(
        job=ref.job, kind=control.RESTORE_KIND_MEMORY, source_epoch=ref.epoch, source_step=ref.step, slots=[ref]
    )
    plan.source_world_size, plan.nodes[:] = 1, ["n0"]
    exported = export_snapshot(plan, tmp_path / "out", here.sources)
    with closing(open_snapshot(exported.path)) as snapshot:
        source = DurableSource(snapshot.rank_file(0), here.corruptions.append)
        begins = [*range(CHUNK_BYTES + 5, 4 * CHUNK_BYTES, 700)]
        pieces = pieces_of([(begin, begin + 700) for begin in begins])
        part = Copy(source=0, target=0, src_begin=7 * CHUNK_BYTES + 1, dst_begin=2, run_bytes=9)
        out = bytearray(11)
        fetched = source.read(pieces, [part], [memoryview(out)])
        assert all(data[piece.begin : piece.end] == piece.into for piece in pieces)
        assert data[part.src_begin : part.src_begin + 9] == out[2:]
        assert 5 * CHUNK_BYTES >= fetched
        run = pieces_of([(3, 6 * CHUNK_BYTES + 3)])
        assert 7 * CHUNK_BYTES == source.read(run)
        assert data[3 : 6 * CHUNK_BYTES + 3] == run[0].into
