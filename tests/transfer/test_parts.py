"""Parts of chunks: exactly what is wanted travels, and none of it unverified."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

import pytest

from snapshotd import failpoints
from snapshotd.errors import CorruptionError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy
from snapshotd.transfer import BulkClient, BulkServer, wire
from snapshotd.v1.bulk_pb2 import Block, BulkRequest, BulkResponse, ObjectKey, SlotKey

MIB = 1 << 20


def slot() -> ObjectKey:
    return ObjectKey(job="j", epoch=1, step=1, slot=SlotKey(rank=0))


def _copy(begin: int, run: int, *dims: tuple[int, int]) -> Copy:
    there = tuple((count, stride, 0) for count, stride in dims)
    return Copy(source=0, target=0, src_begin=begin, dst_begin=0, run_bytes=run, dims=there)


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
            copy = _copy(dice.randrange(thing.file_bytes - extent + 1), run, *dims)
            if copy.nbytes <= MIB:
                copies.append(copy)
        expected = _runs(thing, copies)
        out = bytearray(len(expected))
        root = client.read_parts(server.address_text, slot(), copies, memoryview(out))
        assert (root or thing.root, bytes(out)) == (thing.root, expected)
    assert server.counters()["connections"] == 1


def test_parts_of_a_rotten_chunk_are_refused(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Rot beside what is wanted counts too: nobody can tell where in the chunk it is."""
    thing = shelf.put(slot(), make_thing(4 * CHUNK_BYTES))
    thing.view[2 * CHUNK_BYTES + 5] ^= 1
    out = memoryview(bytearray(10))
    for begin, rotten in ((0, False), (2 * CHUNK_BYTES - 10, False), (2 * CHUNK_BYTES - 9, True), (700_000, True)):
        copies = [_copy(begin, 10)]
        if not rotten:
            client.read_parts(server.address_text, slot(), copies, out)
            assert bytes(out) == _runs(thing, copies)
            continue
        with pytest.raises(CorruptionError, match="chunk 2 of slot of rank 0"):
            client.read_parts(server.address_text, slot(), copies, out)
    assert server.counters()["connections"] == 1


def test_parts_that_are_hurt_on_the_way(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(3 * MIB))
    failpoints.configure("transfer.corrupt_send=corrupt@2")
    copies = [_copy(100, MIB), _copy(MIB + 700, MIB)]
    out = memoryview(bytearray(2 * MIB))
    with pytest.raises(CorruptionError, match="parts of slot of rank 0 of job 'j'"):
        client.read_parts(server.address_text, slot(), copies, out)
    client.read_parts(server.address_text, slot(), copies, out)
    assert bytes(out) == _runs(thing, copies)


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
        wire.send_frame(sock, BulkRequest(protocol=1, object=slot(), blocks=[block]))
        assert wire.receive_frame(sock, BulkResponse, within_s=10).code == "INVALID_ARGUMENT"
    out = memoryview(bytearray(100))
    client.read_parts(server.address_text, slot(), [_copy(0, 100)], out)
    assert out == thing.view


def test_more_blocks_than_allowed(shelf, make_thing, server: BulkServer) -> None:
    shelf.put(slot(), make_thing(100))
    with socket.create_connection(server.address) as sock:
        wire.send_frame(sock, BulkRequest(protocol=1, object=slot(), blocks=[Block(run_bytes=1)] * 4097))
        assert wire.receive_frame(sock, BulkResponse, within_s=10).code == "INVALID_ARGUMENT"
