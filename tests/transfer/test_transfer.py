"""Bytes arrive as they were sealed, or an error says who failed; and nobody waits for ever."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotd import failpoints
from snapshotd.arena import Arena, slot_key
from snapshotd.errors import (
    AccessDenied,
    CorruptionError,
    PeerError,
    PeerUnreachable,
    RemoteProtocolError,
    UsageError,
)
from snapshotd.layout.digest import CHUNK_BYTES, chunk_digests, root_digest
from snapshotd.reshard import Copy
from snapshotd.security import PeerGuard
from snapshotd.transfer import BulkClient, BulkServer, CorruptChunk, ObjectMissing, TransferCancelled, wire
from snapshotd.transfer.pool import Pool
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ByteRange, ObjectKey, ParityKey, SlotKey
from snapshotd.v1.control_pb2 import SlotRef

MIB = 1 << 20
COPY = Copy(source=0, target=0, src_begin=0, dst_begin=0, run_bytes=10)
LARGE = COPY._replace(run_bytes=MIB + 1)
Serve = Callable[..., BulkServer]


def parts(client: BulkClient, copies: list[Copy], nbytes: int, address: str = "127.0.0.1:1", **more: Any) -> None:
    """Read parts of something of 100 bytes, unless ``more`` says otherwise."""
    of = {"digests": bytes(8), "file_bytes": 100, **more}
    client.read_verified(address, slot(), [], copies, [memoryview(bytearray(nbytes))], **of)


def slot(rank: int = 0, step: int = 1) -> ObjectKey:
    return ObjectKey(job="j", epoch=1, step=step, slot=SlotKey(rank=rank))


def ask(**more: Any) -> BulkRequest:
    return BulkRequest(protocol=wire.PROTOCOL, object=slot(), **more)


def _read_all(client: BulkClient, address: str, key: ObjectKey) -> bytearray:
    info = client.digests(address, key)
    out = bytearray(info.file_bytes)
    client.read_verified(address, key, [(0, out)], digests=info.digests, file_bytes=info.file_bytes)
    return out


# ---------------------------------------------------------------------------------------------- what should work


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * MIB + 17])
def test_whole_objects(nbytes: int, shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(nbytes))
    info = client.digests(server.address_text, slot())
    assert (thing.file_bytes, thing.root, thing.digests) == (info.file_bytes, info.root, info.digests)
    assert thing.view == _read_all(client, server.address_text, slot())
    assert server.counters()["connections"] == 1


def test_every_kind_of_range(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Boxes of a resharded tensor begin and end anywhere."""
    thing = shelf.put(slot(), make_thing(7 * CHUNK_BYTES + 100))
    size, dice = thing.file_bytes, random.Random(5)
    edges = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 7 * CHUNK_BYTES, size - 1, size]
    cases = [(begin, end) for begin in edges for end in edges if begin <= end]
    cases += [tuple(sorted((dice.randrange(size + 1), dice.randrange(size + 1)))) for _ in range(40)]  # type: ignore[misc]
    for begin, end in cases:
        out = bytearray(end - begin)
        client.read_verified(
            server.address_text, slot(), [(begin, out)], digests=thing.digests, file_bytes=thing.file_bytes
        )
        assert out == thing.view[begin:end], (begin, end)


def test_many_pieces_large_and_small(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(3 * MIB))
    dice = random.Random(1)
    spans: list[tuple[int, int]] = [(0, 0), (0, 3 * MIB), (5, 5)]
    for _ in range(300):
        begin = dice.randrange(3 * MIB)
        spans.append((begin, min(3 * MIB, begin + dice.choice([0, 1, 17, 1000, 20_000, 70_000]))))
    pieces = [(begin, bytearray(end - begin)) for begin, end in spans]
    client.read_verified(server.address_text, slot(), pieces, digests=thing.digests, file_bytes=3 * MIB)
    assert all(out == thing.view[begin : begin + len(out)] for begin, out in pieces)
    assert server.counters()["requests"] == 1


def test_the_most_pieces(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(10))
    pieces = [(3, bytearray(1))] * wire.RANGES_MAX
    client.read_verified(server.address_text, slot(), pieces, digests=thing.digests, file_bytes=10)
    with pytest.raises(UsageError, match="65537"):
        client.read_verified(
            server.address_text, slot(), [*pieces, pieces[0]], digests=thing.digests, file_bytes=10
        )


def test_a_stream_of_nothing_does_not_spoil_its_connection(
    shelf, make_thing, server: BulkServer, client: BulkClient
) -> None:
    """Its answer has a head, which nobody awaited: it must not be taken for that of the next one."""
    thing, other = shelf.put(slot(), make_thing(MIB)), shelf.put(slot(rank=1), make_thing(100))
    for _ in range(20):
        with client.stream(server.address_text, slot(), [(5, 5)], digests=thing.digests, file_bytes=thing.file_bytes):
            pass
        assert client.digests(server.address_text, slot(rank=1)).file_bytes == other.file_bytes


def test_a_stream_is_read_in_any_portions(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """A decoder takes its windows from wherever the units begin, which is in the middle of chunks for small states."""
    thing = shelf.put(slot(), make_thing(2 * MIB + 77))
    dice = random.Random(3)
    for _ in range(60):
        spans = []
        for _ in range(dice.randrange(1, 4)):
            begin = dice.choice([0, 64, CHUNK_BYTES, CHUNK_BYTES + 64, dice.randrange(thing.file_bytes)])
            spans.append((begin, min(thing.file_bytes, begin + dice.choice([0, 1, 100_000, 300_000, MIB, 2 * MIB]))))
        expected = b"".join(thing.view[begin:end] for begin, end in spans)
        found = bytearray(len(expected))
        with client.stream(
            server.address_text, slot(), spans, digests=thing.digests, file_bytes=thing.file_bytes
        ) as incoming:
            at = 0
            while at < len(found):
                assert not incoming.is_whole
                count = min(len(found) - at, dice.choice([1, 64, 5000, CHUNK_BYTES, MIB]))
                with memoryview(found)[at : at + count] as out:
                    incoming.fill(out)
                at += count
            assert incoming.is_whole == bool(found)  # the head of an answer without bytes was not awaited
            with pytest.raises(UsageError, match="1 bytes more"):
                incoming.fill(memoryview(bytearray(1)))
            assert incoming.is_whole
        assert found == expected
    assert server.counters()["connections"] == 1


def test_a_stream_that_is_left_half_read(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Its connection still has bytes of it on the way: they must not be taken for the next answer."""
    thing = shelf.put(slot(), make_thing(2 * MIB))
    for _ in range(3):
        with client.stream(
            server.address_text, slot(), [(0, 2 * MIB)], digests=thing.digests, file_bytes=2 * MIB
        ) as incoming:
            incoming.fill(memoryview(bytearray(1000)))
        assert _read_all(client, server.address_text, slot()) == thing.view


def test_out_of_an_arena_into_a_mapping(client: BulkClient) -> None:
    """The way it is used: tmpfs to socket to tmpfs, and the slot cannot be freed meanwhile."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    root = base / f"snapshotd-test-{os.getpid()}"
    arena = Arena(root, budget_bytes=64 * MIB)
    try:
        obj = arena.create_slot(b"", 3 * MIB)
        obj.view[:] = random.Random(0).randbytes(3 * MIB)
        digests = chunk_digests(obj.view, 3 * MIB)
        ref = SlotRef(job="j", epoch=1, step=1, file_bytes=3 * MIB, root_digest=root_digest(digests))
        arena.seal(obj, ref, digests)
        seen: list[bool] = []
        with BulkServer(("127.0.0.1", 0), arena.acquire) as server, mmap.mmap(-1, 3 * MIB) as out:
            info = client.digests(server.address_text, slot_key(ref))
            assert info.root == ref.root_digest
            client.read_verified(
                server.address_text,
                slot_key(ref),
                [(0, out)],
                digests=digests,
                file_bytes=3 * MIB,
                pace=lambda nbytes: seen.append(True),
            )
            assert out[:] == bytes(obj.view)
            assert len(seen) == 3
        assert arena.invalidate(obj)
    finally:
        arena.close()
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        root.rmdir()


def test_parallel_reads_use_several_connections(shelf, make_thing, server: BulkServer) -> None:
    things = [shelf.put(slot(rank), make_thing(300_000 + rank)) for rank in range(16)]
    with BulkClient(connections_per_peer=3) as client, ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda rank: _read_all(client, server.address_text, slot(rank)), range(16)))
    assert [bytes(thing.view) for thing in things] == results
    assert 1 <= server.counters()["connections"] <= 3


# ---------------------------------------------------------------------------------------------- wrong bytes


def test_a_bit_that_flips_on_the_wire_is_found(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(3 * MIB))
    failpoints.configure("transfer.corrupt_send=corrupt@2")
    wrong = (MIB + MIB // 2) // CHUNK_BYTES  # the middle of the second piece
    message = rf"chunk {wrong} of slot of rank 0 of job 'j', epoch 1, step 1 from 127"
    with pytest.raises(CorruptChunk, match=message) as caught:
        out = bytearray(3 * MIB)
        client.read_verified(server.address_text, slot(), [(0, out)], digests=thing.digests, file_bytes=3 * MIB)
    assert (caught.value.chunk, caught.value.peer) == (wrong, server.address_text)
    assert _read_all(client, server.address_text, slot()) == thing.view  # over a new connection


def test_rot_at_the_peer_is_found_in_partly_wanted_chunks_too(
    shelf, make_thing, server: BulkServer, client: BulkClient
) -> None:
    """Whole chunks by the reader, all others by their owner, who says so behind them."""
    thing = shelf.put(slot(), make_thing(3 * CHUNK_BYTES))
    thing.view[2 * CHUNK_BYTES - 1] ^= 1
    for begin, end, bad in [
        (CHUNK_BYTES + 5, CHUNK_BYTES + 6, CorruptionError),
        (0, CHUNK_BYTES, None),
        (0, CHUNK_BYTES + 1, CorruptionError),
        (5, 2 * CHUNK_BYTES - 1, CorruptionError),
        (CHUNK_BYTES, 2 * CHUNK_BYTES, CorruptChunk),
        (5, 3 * CHUNK_BYTES, CorruptChunk),
        (2 * CHUNK_BYTES, 3 * CHUNK_BYTES - 7, None),
    ]:
        out = bytearray(end - begin)
        with pytest.raises(bad, match="chunk 1 of slot of rank 0") if bad else nullcontext():
            client.read_verified(
                server.address_text, slot(), [(begin, out)], digests=thing.digests, file_bytes=thing.file_bytes
            )
        assert bad or out == thing.view[begin:end]


def test_digests_that_do_not_make_up_their_root(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    shelf.put(slot(), make_thing(MIB))
    failpoints.configure("transfer.corrupt_send=corrupt")
    with pytest.raises(CorruptionError, match="root digest"):
        client.digests(server.address_text, slot())


def test_another_size_than_the_sealed_one(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    shelf.put(slot(), make_thing(2 * CHUNK_BYTES))
    with pytest.raises(CorruptionError, match="were sealed"):
        client.read_verified(server.address_text, slot(), [(0, bytearray(1))], digests=bytes(8), file_bytes=CHUNK_BYTES)


# ---------------------------------------------------------------------------------------------- refusals


def test_refusals_leave_the_connection_in_use(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    shelf.put(slot(), make_thing(100))
    shelf.put(slot(1), make_thing(100)).digests = None
    address = server.address_text
    with pytest.raises(ObjectMissing, match="slot of rank 9"):
        client.digests(address, slot(9))
    with pytest.raises(ObjectMissing, match="not sealed"):
        client.digests(address, slot(1))
    with pytest.raises(ObjectMissing, match="parity 3 of group 1, lane 2"):
        client.digests(address, ObjectKey(job="j", parity=ParityKey(group=1, lane=2, position=3)))
    with pytest.raises(UsageError, match=r"\[50, 101\)"):
        parts(client, [COPY, COPY._replace(src_begin=50, run_bytes=51)], 61, address)
    assert len(_read_all(client, address, slot())) == 100
    assert server.counters()["connections"] == 1


def test_arguments_are_checked(client: BulkClient) -> None:
    def verified(begin: int, out: object, digests: bytes = bytes(8), file_bytes: int = 10) -> None:
        client.read_verified("h:1", slot(), [(begin, out)], digests=digests, file_bytes=file_bytes)  # type: ignore[list-item]

    calls: list[Callable[[], object]] = [
        lambda: parts(client, [COPY], 1),
        lambda: parts(client, [LARGE], MIB + 1),
        lambda: parts(client, [COPY] * 4097, 4097 * 10),
        lambda: client.digests("nonsense", slot()),
        lambda: client.digests("::1:80", slot()),
        lambda: client.digests("h:70000", slot()),
        lambda: verified(0, bytearray(11)),
        lambda: verified(-1, bytearray(4)),
        lambda: verified(0, b"ro"),
        lambda: verified(0, bytearray(5), digests=bytes(16)),
        lambda: BulkClient(timeout_s=0),
        lambda: BulkServer(("127.0.0.1", 0), None, max_connections=0),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    verified(5, bytearray())
    assert [wire.parse_address(text) for text in ("[::1]:80", "h:1")] == [("::1", 80), ("h", 1)]
    assert wire.format_address("::1", 80) == "[::1]:80"


def test_a_user_who_is_not_served(shelf, make_thing, serve: Serve, client: BulkClient) -> None:
    shelf.put(slot(), make_thing(100))

    class Nobody(PeerGuard):
        def check(self, sock: socket.socket, *, encrypted: bool = False) -> None:
            raise AccessDenied("user 1000 is not served here")

    server = serve(guard=Nobody())
    with pytest.raises(AccessDenied, match="user 1000 is not served"):
        client.digests(server.address_text, slot())
    assert (server.counters()["refused"], server.counters()["requests"]) == (1, 0)


def test_a_lookup_that_fails(client: BulkClient) -> None:
    def lookup(key: ObjectKey) -> None:
        if key.slot.rank:
            raise UsageError("no such job")
        raise KeyError("secret")

    with BulkServer(("127.0.0.1", 0), lookup) as server:
        with pytest.raises(RemoteProtocolError, match=r"lookup of slot of rank 0 .* failed \(INTERNAL\)") as caught:
            client.digests(server.address_text, slot())
        assert "secret" not in str(caught.value)
        with pytest.raises(UsageError, match="no such job"):
            client.digests(server.address_text, slot(1))


def test_a_port_that_is_taken(server: BulkServer, shelf) -> None:
    for address in (server.address, ("127.0.0.1", 70_000), ("no.such.host.invalid", 0)):
        with pytest.raises(UsageError, match="cannot listen at"):
            BulkServer(address, shelf.lookup)


# ---------------------------------------------------------------------------------------------- peers that fail


@contextmanager
def _fake(*answers: bytes, hold: bool = False) -> Iterator[str]:
    """A peer that answers request i with answers[i], whatever it is, and hangs up (or holds the line)."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with suppress(OSError):
                for answer in answers:
                    sock, _ = listener.accept()
                    with sock:
                        if answer:
                            with suppress(wire.ConnectionClosed):
                                wire.Inbound(sock).frame(BulkRequest, within_s=10)
                            sock.sendall(answer)
                        if hold:
                            done.wait(30)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield wire.format_address(*listener.getsockname())
        finally:
            done.set()
            wire.hang_up(listener)
            thread.join(30)


def _frame(**fields: object) -> bytes:
    data = BulkResponse(**fields).SerializeToString()  # type: ignore[arg-type]
    return struct.pack("<I", len(data)) + data


def test_a_server_of_before_exact_ranges_is_told_apart(client: BulkClient) -> None:
    """It would send the bytes, and nothing behind them: the reader must not wait for that."""
    answer = _frame(ok=True, file_bytes=100, payload_bytes=50) + bytes(50)
    with (
        _fake(answer, hold=True) as address,
        pytest.raises(RemoteProtocolError, match="update its daemon"),
    ):
        client.read_verified(address, slot(), [(0, bytearray(50))], digests=bytes(8), file_bytes=100)


def test_nobody_listens(client: BulkClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = wire.format_address(*listener.getsockname())
    with pytest.raises(PeerUnreachable, match=f"cannot connect to {address}"):
        client.digests(address, slot())


def test_a_silent_peer_costs_one_timeout_for_all_who_wait() -> None:
    """A host that froze must not hold a recovery up once for each shard that is wanted from it."""
    with _fake(b"", hold=True) as address, BulkClient(timeout_s=0.3, connections_per_peer=1) as client:

        def ask(rank: int) -> str:
            with pytest.raises(PeerUnreachable) as caught:
                client.digests(address, slot(rank))
            return str(caught.value)

        with ThreadPoolExecutor(8) as pool:
            assert {f"{address} was silent for 0.3 s"} == set(pool.map(ask, range(8)))


@pytest.mark.parametrize("ends", [True, False])
def test_a_slow_peer_is_waited_for_a_silent_one_is_not(ends: bool, make_thing) -> None:
    """Bytes that trickle in over longer than the timeout are no reason to give a peer up; silence is."""
    thing = make_thing(1500)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, BulkClient(timeout_s=1.0) as client:
        address = wire.format_address(*listener.getsockname())

        def trickle() -> None:
            sock, _ = listener.accept()
            with sock:
                wire.Inbound(sock).frame(BulkRequest, within_s=10)
                sock.sendall(_frame(ok=True, file_bytes=1500, payload_bytes=1500))
                for at in range(0, 1500 if ends else 700, 100):
                    sock.sendall(thing.view[at : at + 100])
                    done.wait(0.1)
                done.wait(30)

        thread = threading.Thread(target=trickle)
        thread.start()
        out = bytearray(1500)
        began = time.monotonic()
        try:
            with nullcontext() if ends else pytest.raises(PeerUnreachable, match="silent for 1 s"):
                client.read_verified(address, slot(), [(0, out)], digests=thing.digests, file_bytes=1500)
            assert ends == (out == thing.view)
            assert time.monotonic() - began > 1.0
        finally:
            done.set()
            thread.join(10)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"\1", PeerUnreachable),
        (struct.pack("<I", 10) + b"abc", PeerUnreachable),
        (_frame(ok=True, file_bytes=100, payload_bytes=100) + bytes(99), PeerUnreachable),
        (_frame(ok=True, file_bytes=100, payload_bytes=99) + bytes(99), RemoteProtocolError),
        (_frame(ok=True, file_bytes=100, payload_bytes=2**63) + bytes(99), RemoteProtocolError),
        (struct.pack("<I", 2**32 - 1), RemoteProtocolError),
        (struct.pack("<I", 3) + b"\xff\xff\xff", RemoteProtocolError),
        (_frame(ok=False, code="NEW", message="what"), RemoteProtocolError),
        (_frame(ok=False), RemoteProtocolError),
        (_frame(ok=False, code="UNAVAILABLE"), PeerUnreachable),
    ],
)
def test_answers_that_are_none(answer: bytes, error: type[Exception], client: BulkClient) -> None:
    with _fake(answer) as address, pytest.raises(error):
        client.read_verified(address, slot(), [(0, bytearray(100))], digests=bytes(8), file_bytes=100)


@pytest.mark.parametrize("file_bytes", [2**64 - 1, 2**62, 7 * CHUNK_BYTES])
def test_digests_of_a_size_that_cannot_be(file_bytes: int, client: BulkClient) -> None:
    """No peer may make us allocate what it announces."""
    chunks = -(-file_bytes // CHUNK_BYTES)
    for payload in (chunks * 8, 16):
        with _fake(_frame(ok=True, file_bytes=file_bytes, payload_bytes=payload)) as address, pytest.raises(PeerError):
            client.digests(address, slot())


def test_a_stale_kept_connection_is_replaced_once(shelf, make_thing, client: BulkClient) -> None:
    """A restarted daemon at the same address must not look dead."""
    shelf.put(slot(), make_thing(100))
    with BulkServer(("127.0.0.1", 0), shelf.lookup) as first:
        _read_all(client, first.address_text, slot())
        address = first.address
    with BulkServer(address, shelf.lookup) as second:
        assert len(_read_all(client, second.address_text, slot())) == 100


def test_a_kept_connection_that_dies_with_the_request(client: BulkClient) -> None:
    """The peer closes after it got the request: asked again, over a new connection."""
    empty = _frame(ok=True, root_digest=root_digest(b""))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = wire.format_address(*listener.getsockname())

        def run() -> None:
            for num_answers in (1, 1):
                sock, _ = listener.accept()
                with sock:
                    inbound = wire.Inbound(sock)
                    for _ in range(num_answers):
                        inbound.frame(BulkRequest, within_s=10)
                        sock.sendall(empty)
                    with suppress(wire.ConnectionClosed):
                        inbound.frame(BulkRequest, within_s=10)

        thread = threading.Thread(target=run)
        thread.start()
        assert client.digests(address, slot()).file_bytes == 0
        assert client.digests(address, slot()).file_bytes == 0
        client.close()
        thread.join(10)


def test_a_peer_that_is_killed_in_the_middle(shelf, make_thing, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(8 * MIB))
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        failpoints.configure("transfer.mid_send=kill@3")
        server = BulkServer(("127.0.0.1", 0), shelf.lookup)
        theirs.send(server.address_text)
        threading.Event().wait()

    child = context.Process(target=run)
    child.start()
    address = ours.recv()
    out = bytearray(8 * MIB)
    with pytest.raises(PeerUnreachable):
        client.read_verified(address, slot(), [(0, out)], digests=thing.digests, file_bytes=8 * MIB)
    child.join(10)
    assert child.exitcode == -signal.SIGKILL
    ours.close()
    theirs.close()


# ---------------------------------------------------------------------------------------------- cancelling, closing


def test_cancelling_and_pacing(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = shelf.put(slot(), make_thing(8 * MIB))
    cancel = threading.Event()
    seen: list[int] = []

    def pace(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 3:
            cancel.set()

    out = bytearray(8 * MIB)
    with pytest.raises(TransferCancelled):
        client.read_verified(
            server.address_text,
            slot(),
            [(0, out)],
            digests=thing.digests,
            file_bytes=8 * MIB,
            cancel=cancel,
            pace=pace,
        )
    assert seen == [MIB] * 3
    with pytest.raises(TransferCancelled):
        client.digests(server.address_text, slot(), cancel=cancel)

    def stop(nbytes: int) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):  # the caller's own errors are not taken for the peer's
        parts(client, [COPY], 10, server.address_text, digests=thing.digests, file_bytes=8 * MIB, pace=stop)
    assert _read_all(client, server.address_text, slot()) == thing.view


def test_cancelling_while_waiting_for_a_connection() -> None:
    cancel = threading.Event()
    with (
        _fake(b"", hold=True) as address,
        BulkClient(timeout_s=1, connections_per_peer=1) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(client.digests, address, slot())
        second = pool.submit(client.digests, address, slot(), cancel=cancel)
        cancel.set()
        with pytest.raises((TransferCancelled, PeerUnreachable)):
            second.result(10)
        with pytest.raises(PeerUnreachable):
            first.result(10)


def test_who_waits_for_a_connection_is_not_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads much in many requests would else keep the one connection, and a small read waits for all of them."""
    connections, order, waits = Pool(tls=None, timeout_s=1, limit=1), list[str](), threading.Event()
    wait = connections._changed.wait
    monkeypatch.setattr(connections._changed, "wait", lambda timeout: waits.set() or wait(timeout))

    def borrow(name: str) -> None:
        with connections.borrow("127.0.0.1:1", None):
            order.append(name)

    first = connections.borrow("127.0.0.1:1", None)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(borrow, "second")
        assert waits.wait(10)
        first.end()
        borrow("third")
        second.result(10)
    assert ["second", "third"] == order


def test_closing_the_server_frees_what_it_serves(shelf, make_thing) -> None:
    """A peer that stopped reading must not keep a slot leased, or a daemon from ending."""
    thing = shelf.put(slot(), make_thing(64 * MIB))
    server = BulkServer(("127.0.0.1", 0), shelf.lookup)
    with socket.create_connection(server.address) as sock, socket.create_connection(server.address):
        request = ask(ranges=[ByteRange(begin=0, end=64 * MIB)])
        wire.Outbound(sock).frame(request)
        wire.Inbound(sock).frame(BulkResponse, within_s=10)
        assert thing.num_readers == 1
        server.close()
        server.close()
        assert thing.num_readers == 0


def test_a_peer_that_stops_reading_is_dropped(shelf, make_thing, serve: Serve) -> None:
    thing = shelf.put(slot(), make_thing(64 * MIB))
    server = serve(timeout_s=0.2, idle_timeout_s=0.2)
    with socket.create_connection(server.address) as sock, socket.create_connection(server.address) as idle:
        wire.Outbound(sock).frame(ask(ranges=[ByteRange(begin=0, end=64 * MIB)]))
        idle.settimeout(10)
        assert idle.recv(1) == b""
        threads = [thread for thread in threading.enumerate() if thread.name == "bulk-serve"]
        for thread in threads:
            thread.join(10)
        assert thing.num_readers == 0


def test_more_connections_than_allowed(shelf, make_thing, serve: Serve) -> None:
    """Kept connections of many peers must not lock a recovering one out."""
    shelf.put(slot(), make_thing(100))
    server = serve(max_connections=2)
    clients = [BulkClient() for _ in range(5)]
    for _ in range(2):
        for client in clients:
            assert len(_read_all(client, server.address_text, slot())) == 100
    for client in clients:
        client.close()
    with pytest.raises(UsageError, match="closed"):
        clients[0].digests(server.address_text, slot())


# ---------------------------------------------------------------------------------------------- hostile bytes

_ranges = st.lists(
    st.builds(
        ByteRange,
        begin=st.integers(0, 2**64 - 1) | st.integers(0, 120),
        end=st.integers(0, 2**64 - 1) | st.integers(0, 120),
    ),
    max_size=5,
)
_requests = st.builds(
    BulkRequest,
    protocol=st.integers(0, 3),
    object=st.builds(
        ObjectKey,
        job=st.sampled_from(["j", "x", ""]),
        epoch=st.just(1),
        step=st.just(1),
        slot=st.builds(SlotKey, rank=st.integers(0, 2)),
    ),
    digests=st.booleans(),
    ranges=_ranges,
).map(lambda request: struct.pack("<I", request.ByteSize()) + request.SerializeToString())
_lies = st.builds(
    lambda length, data: struct.pack("<I", length) + data, st.integers(0, 2**32 - 1), st.binary(max_size=50)
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(_requests | _lies | st.binary(max_size=60), max_size=4))
def test_hostile_frames(frames: list[bytes], shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Either served or refused; the server lives on, and what it says is always whole frames."""
    thing = shelf.put(slot(), make_thing(100))
    with socket.create_connection(server.address) as sock:
        sock.settimeout(10)
        with suppress(BrokenPipeError, ConnectionResetError):
            for frame in frames:
                sock.sendall(frame)
            sock.shutdown(socket.SHUT_WR)
        inbound = wire.Inbound(sock)
        with suppress(wire.ConnectionClosed, ConnectionResetError):
            while True:
                response = inbound.frame(BulkResponse, within_s=10)
                assert response.ok or response.code
                inbound.expect(response.payload_bytes)
                inbound.receive(memoryview(bytearray(response.payload_bytes)))
    assert _read_all(client, server.address_text, slot()) == thing.view


def test_a_frame_that_announces_more_than_it_brings(server: BulkServer) -> None:
    """Sixty-four connections that each announce 16 MiB must not cost a gigabyte."""
    with socket.create_connection(server.address) as sock:
        sock.sendall(struct.pack("<I", wire.FRAME_BYTES_MAX) + bytes(1000))
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(10)
        assert sock.recv(1) == b""
    with socket.create_connection(server.address) as sock:
        sock.settimeout(10)
        sock.sendall(struct.pack("<I", wire.FRAME_BYTES_MAX + 1))
        response = wire.Inbound(sock).frame(BulkResponse, within_s=10)
        assert (response.ok, response.code) == (False, "REMOTE_PROTOCOL")
