"""Parts of chunks: exactly what is wanted travels, and none of it unverified."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from snapshotd import failpoints
from snapshotd.errors import CorruptionError
from snapshotd.layout import CHUNK_BYTES, chunk_digests
from snapshotd.reshard import Copy
from snapshotd.transfer import BulkClient, BulkServer, wire
from snapshotd.v1.bulk_pb2 import Block, BulkRequest, BulkResponse, ByteRange, ObjectKey, SlotKey

MIB = 1 << 20


def slot() -> ObjectKey:
    return ObjectKey(job="j", epoch=1, step=1, slot=SlotKey(rank=0))


def ask(**more: Any) -> BulkRequest:
    return BulkRequest(protocol=wire.PROTOCOL, object=slot(), **more)


def _copy(begin: int, run: int, *dims: tuple[int, int], to: int = 0) -> Copy:
    """Of a strided block; its runs go to ``to``, one behind the other."""
    there: list[tuple[int, int, int]] = []
    size = run
    for count, stride in reversed(dims):
        there.insert(0, (count, stride, size))
        size *= count
    return Copy(source=0, target=0, src_begin=begin, dst_begin=to, run_bytes=run, dims=tuple(there))


def _read(client: BulkClient, server: BulkServer, thing: Any, copies: Sequence[Copy]) -> bytes:
    out = bytearray(sum(copy.nbytes for copy in copies))
    known = {"digests": thing.digests, "file_bytes": thing.file_bytes}
    client.read_verified(server.address_text, slot(), [], copies, [memoryview(out)], **known)
    return bytes(out)


def _runs(thing, copies: Sequence[Copy]) -> bytes:
    return b"".join(thing.view[src : src + run] for copy in copies for src, _, run in copy.runs())


def test_parts_are_exactly_the_bytes_that_are_wanted(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """A resharded tensor is rows, or columns, of the old one; nothing between them travels."""
    thing = shelf.put(slot(), make_thing(5 * MIB + 3))
    dice = random.Random(2)
    for _ in range(60):
        copies: list[Copy] = []
        for _ in range(dice.randrange(1, 30)):
            run = dice.choice([1, 8, 1000, 70_000])
            dims: list[tuple[int, int]] = []
            extent = run
            for _ in range(dice.randrange(3)):
                count, stride = dice.randrange(1, 5), extent + dice.choice([0, 5, 4096, 600_000])
                if (count - 1) * stride + extent > 4 * MIB:
                    break
                extent += (count - 1) * stride
                dims.insert(0, (count, stride))
            place = sum(copy.nbytes for copy in copies)
            copy = _copy(dice.randrange(thing.file_bytes - extent + 1), run, *dims, to=place)
            if copy.nbytes <= MIB:
                copies.append(copy)
        assert _runs(thing, copies) == _read(client, server, thing, copies)
    assert server.counters()["connections"] == 1


def test_whole_chunks_and_parts_in_one_request(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Each goes to its own place, and a run that ends inside a chunk costs no second round trip."""
    thing = shelf.put(slot(), make_thing(5 * MIB + 3))
    whole = bytearray(2 * MIB)
    copies = [_copy(100, 70_000, to=9), _copy(4 * MIB, 5, (100, 50), to=0), _copy(3 * MIB - 5, 300_000, to=100_000)]
    target = bytearray(500_000)
    expected = bytearray(500_000)
    for copy in copies:
        for src, dst, run in copy.runs():
            expected[dst : dst + run] = thing.view[src : src + run]
    client.read_verified(
        server.address_text,
        slot(),
        [(MIB, whole)],
        copies,
        [memoryview(target)],
        digests=thing.digests,
        file_bytes=thing.file_bytes,
    )
    assert thing.view[MIB : 3 * MIB] == whole
    assert expected == target
    assert 1 == server.counters()["requests"]


def test_parts_of_another_object_under_the_same_name(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """The owner verifies parts against its own digests: the object must be the one that the reader means."""
    thing = make_thing(4 * CHUNK_BYTES)
    other = shelf.put(slot(), make_thing(4 * CHUNK_BYTES))
    other.view[7] ^= 1
    other.digests = chunk_digests(other.view, other.file_bytes)
    with pytest.raises(CorruptionError, match="another root digest"):
        _read(client, server, thing, [_copy(0, 10)])


def test_parts_of_a_rotten_chunk_are_refused(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Rot beside what is wanted counts too: nobody can tell where in the chunk it is."""
    thing = shelf.put(slot(), make_thing(4 * CHUNK_BYTES))
    thing.view[2 * CHUNK_BYTES + 5] ^= 1
    second = 2 * CHUNK_BYTES
    for begin, rotten in ((0, False), (second - 10, False), (second - 9, True), (second + 99_999, True)):
        copies = [_copy(begin, 10)]
        if not rotten:
            assert _runs(thing, copies) == _read(client, server, thing, copies)
            continue
        with pytest.raises(CorruptionError, match="chunk 2 of slot of rank 0"):
            _read(client, server, thing, copies)
    assert server.counters()["connections"] == 1


def test_parts_that_are_hurt_on_the_way(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(3 * MIB))
    failpoints.configure("transfer.corrupt_send=corrupt@2")
    copies = [_copy(100, MIB), _copy(MIB + 700, MIB, to=MIB)]
    with pytest.raises(CorruptionError, match="parts of slot of rank 0 of job 'j'"):
        _read(client, server, thing, copies)
    assert _runs(thing, copies) == _read(client, server, thing, copies)


@pytest.mark.parametrize(
    "block",
    [
        Block(begin=0, run_bytes=0),
        Block(begin=0, run_bytes=101),
        Block(begin=2**63, run_bytes=1),
        Block(begin=0, run_bytes=2**63),
        Block(begin=0, run_bytes=1, repeats=[Block.Repeat(count=0, stride=1)]),
        Block(begin=0, run_bytes=1, repeats=[Block.Repeat(count=2**40, stride=0)]),
        Block(begin=0, run_bytes=1, repeats=[Block.Repeat(count=3, stride=50)]),
        Block(begin=0, run_bytes=1, repeats=[Block.Repeat(count=2**63, stride=2**63)]),
        Block(begin=0, run_bytes=1, repeats=[Block.Repeat(count=1, stride=1)] * 17),
    ],
)
def test_blocks_that_cannot_be(block: Block, shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """A peer that lies about what it wants gets a no, and the server goes on."""
    thing = shelf.put(slot(), make_thing(100))
    with socket.create_connection(server.address) as sock:
        wire.Outbound(sock).frame(ask(blocks=[block]))
        assert wire.Inbound(sock).frame(BulkResponse, within_s=10).code == "INVALID_ARGUMENT"
    assert thing.view == _read(client, server, thing, [_copy(0, 100)])


def test_more_blocks_than_allowed(shelf, make_thing, server: BulkServer) -> None:
    shelf.put(slot(), make_thing(100))
    with socket.create_connection(server.address) as sock:
        wire.Outbound(sock).frame(ask(blocks=[Block(run_bytes=1)] * 4097))
        assert wire.Inbound(sock).frame(BulkResponse, within_s=10).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("begin", "end"), [(100, 5000), (CHUNK_BYTES - 9, CHUNK_BYTES + 9), (5, MIB - 5), (3 * MIB - 7, 3 * MIB + 3)]
)
def test_ends_of_runs_are_compared_as_well(
    begin: int, end: int, shelf, make_thing, server: BulkServer, client: BulkClient
) -> None:
    """What is in no whole chunk has only its owner's digests for the way; a run may be nothing else."""
    thing = shelf.put(slot(), make_thing(3 * MIB + 3))
    known = {"digests": thing.digests, "file_bytes": thing.file_bytes}
    for place in (0, (end - begin) // 2, end - begin - 1):
        out = bytearray(end - begin)
        client.read_verified(server.address_text, slot(), [(begin, out)], **known)
        assert thing.view[begin:end] == out
        receive, left = wire.Inbound.receive, [place]

        def hurt(self: wire.Inbound, into: memoryview, receive=receive, left=left) -> None:
            receive(self, into)
            if 0 <= left[0] < into.nbytes:
                into[left[0]] ^= 8
            left[0] -= into.nbytes

        with pytest.MonkeyPatch.context() as patch, pytest.raises(CorruptionError, match="not match"):
            patch.setattr(wire.Inbound, "receive", hurt)
            client.read_verified(server.address_text, slot(), [(begin, out)], **known)


def test_buffers_of_any_sizes_are_filled_as_one_run(
    shelf, make_thing, server: BulkServer, client: BulkClient
) -> None:
    """A layer's weight, its bias of some bytes, the next weight: one range, whatever it is cut into."""
    thing = shelf.put(slot(), make_thing(6 * MIB + 11))
    dice = random.Random(4)
    for _ in range(30):
        at = begin = dice.randrange(MIB)
        pieces: list[tuple[int, bytearray]] = []
        while at < thing.file_bytes and len(pieces) < 200:
            size = min(dice.choice([0, 1, 64, 3000, 31_000, 33_000, CHUNK_BYTES, MIB + 5]), thing.file_bytes - at)
            pieces.append((at, bytearray(size)))
            at += size
        known = {"digests": thing.digests, "file_bytes": thing.file_bytes}
        client.read_verified(server.address_text, slot(), pieces, **known)
        assert thing.view[begin:at] == b"".join(out for _, out in pieces)


def test_a_server_may_be_asked_for_exact_ranges_that_cannot_be(shelf, make_thing, server: BulkServer) -> None:
    thing = shelf.put(slot(), make_thing(100))
    with socket.create_connection(server.address) as sock:
        inbound, outbound = wire.Inbound(sock), wire.Outbound(sock)
        for begin, end in ((50, 101), (7, 5), (2**63, 2**63)):
            outbound.frame(ask(exact=True, ranges=[ByteRange(begin=begin, end=end)]))
            assert inbound.frame(BulkResponse, within_s=10).code == "INVALID_ARGUMENT"
        outbound.frame(ask(exact=True, ranges=[ByteRange(begin=3, end=3)]))
        assert inbound.frame(BulkResponse, within_s=10).payload_bytes == 0
        assert inbound.frame(BulkResponse, within_s=10).ok
        outbound.frame(ask(exact=True, ranges=[ByteRange(begin=3, end=9)]))
        assert inbound.frame(BulkResponse, within_s=10).payload_bytes == 6
        data = bytearray(6)
        inbound.expect(6)
        inbound.receive(memoryview(data))
        assert thing.view[3:9] == data
        assert inbound.frame(BulkResponse, within_s=10).digests == chunk_digests(data, 6)
