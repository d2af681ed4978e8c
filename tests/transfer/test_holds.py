"""Whoever reads for minutes keeps what it reads; but not when it is dead, and not at the cost of all others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd.arena import Arena, SlotFile, slot_key
from snapshotd.errors import PeerUnreachable, RemoteProtocolError, UsageError
from snapshotd.layout.digest import chunk_digests, root_digest
from snapshotd.transfer import BulkClient, BulkServer, ObjectMissing, PeerBusy, wire
from snapshotd.transfer.objects import HELD_MAX
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ObjectKey, SlotKey
from snapshotd.v1.control_pb2 import SlotRef

MIB = 1 << 20
Serve = Callable[..., BulkServer]


def slot(rank: int = 0, step: int = 1) -> ObjectKey:
    return ObjectKey(job="j", epoch=1, step=step, slot=SlotKey(rank=rank))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena(tmp_path / "arena", budget_bytes=64 * MIB)
    yield arena
    arena.close()


def sealed(arena: Arena, step: int, fill: int = 0) -> tuple[SlotFile, SlotRef]:
    nbytes = 3 * MIB
    made = arena.create_slot(b"header", nbytes)
    made.view[:] = bytes([fill or step]) * nbytes
    digests = chunk_digests(made.view, nbytes)
    ref = SlotRef(job="j", epoch=1, step=step, file_bytes=nbytes, root_digest=root_digest(digests))
    arena.seal(made, ref, digests)
    return made, ref


def read(client: BulkClient, address: str, key: ObjectKey) -> bytes:
    info = client.digests(address, key)
    out = bytearray(info.file_bytes)
    client.read_verified(address, key, [(0, out)], digests=info.digests, file_bytes=info.file_bytes)
    return bytes(out)


# ---------------------------------------------------------------------------------------------- what is held


def test_a_held_slot_is_not_written_again_until_the_hold_ends(arena: Arena, client: BulkClient) -> None:
    """The next step would be written over what somebody is converting."""
    made, ref = sealed(arena, 7)
    with BulkServer(("127.0.0.1", 0), arena.acquire) as server:
        with client.hold(server.address_text, [slot_key(ref)]):
            assert not arena.invalidate(made)
            assert bytes([7]) * made.file_bytes == read(client, server.address_text, slot_key(ref))
            assert not arena.invalidate(made)
        until(lambda: arena.invalidate(made), "the slot may be written again")
        with pytest.raises(ObjectMissing, match="step 7"):
            client.hold(server.address_text, [slot_key(ref)])


def test_what_its_owner_deletes_can_be_read_to_the_end(arena: Arena, client: BulkClient) -> None:
    """A rebuilt slot, or one of an older layout, is deleted with the next commit: a conversion goes on all the same."""
    made, ref = sealed(arena, 7)
    with BulkServer(("127.0.0.1", 0), arena.acquire) as server:
        with client.hold(server.address_text, [slot_key(ref)]):
            used = arena.used_bytes
            assert not arena.delete(made)
            assert arena.find(slot_key(ref)) is None
            assert bytes([7]) * made.file_bytes == read(client, server.address_text, slot_key(ref))
            assert used == arena.used_bytes  # it takes memory as long as it is there
        until(lambda: arena.used_bytes == 0, "the memory is given back")
        with pytest.raises(ObjectMissing):
            client.digests(server.address_text, slot_key(ref))


def test_what_is_there_anew_comes_before_what_is_held(arena: Arena, client: BulkClient) -> None:
    """A rotten slot was rebuilt under the same name: whoever holds the old one would read rot for ever."""
    made, ref = sealed(arena, 7)
    with BulkServer(("127.0.0.1", 0), arena.acquire) as server, client.hold(server.address_text, [slot_key(ref)]):
        arena.delete(made)
        sealed(arena, 7, fill=9)
        assert bytes([9]) * made.file_bytes == read(client, server.address_text, slot_key(ref))


def test_a_reader_keeps_what_the_holder_lets_go_of(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """An answer that is on its way must not lose the memory that it is sent from."""
    thing = shelf.put(slot(), make_thing(64 * MIB))
    hold = client.hold(server.address_text, [slot()])
    shelf.things.clear()
    spans = [(0, thing.file_bytes)]
    with client.stream(
        server.address_text, slot(), spans, digests=thing.digests, file_bytes=thing.file_bytes
    ) as incoming, memoryview(bytearray(thing.file_bytes)) as out:
        incoming.fill(out[:MIB])
        hold.close()
        incoming.fill(out[MIB:])
        assert thing.view == out
    until(lambda: thing.num_readers == 0, "nobody has it")


def test_holders_of_one_object_do_not_know_of_each_other(
    shelf, make_thing, server: BulkServer, client: BulkClient
) -> None:
    thing = shelf.put(slot(), make_thing(MIB))
    with client.hold(server.address_text, [slot()]):
        with client.hold(server.address_text, [slot(), slot()]):
            assert 2 == thing.num_readers
        until(lambda: thing.num_readers == 1, "the second has let go")
        assert bytes(thing.view) == read(client, server.address_text, slot())
    until(lambda: thing.num_readers == 0, "the first has let go")


def test_all_or_nothing(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    """Half of a snapshot is of no use, and would keep memory from the job."""
    thing = shelf.put(slot(0), make_thing(MIB))
    with pytest.raises(ObjectMissing, match="rank 1"):
        client.hold(server.address_text, [slot(0), slot(1)])
    until(lambda: thing.num_readers == 0, "nothing is held")
    with pytest.raises(UsageError, match="nothing"):
        client.hold(server.address_text, [])


# ---------------------------------------------------------------------------------------------- how a hold ends


def test_a_killed_holder_lets_go_at_once(shelf, make_thing, server: BulkServer) -> None:
    """Who presses ctrl-c, or runs out of memory, must not cost the job its slots."""
    thing = shelf.put(slot(), make_thing(MIB))
    script = (
        "import sys; from snapshotd.transfer import BulkClient; from snapshotd.v1.bulk_pb2 import ObjectKey, SlotKey\n"
        "hold = BulkClient().hold(sys.argv[1], [ObjectKey(job='j', epoch=1, step=1, slot=SlotKey(rank=0))])\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, server.address_text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None
    with holder.stdin, holder.stdout:
        assert b"held\n" == holder.stdout.readline()
        assert 1 == thing.num_readers
        os.kill(holder.pid, signal.SIGKILL)
        assert -signal.SIGKILL == holder.wait(10)
        until(lambda: thing.num_readers == 0, "it is let go")


def test_a_holder_that_is_silent_lets_go_by_the_idle_timeout(shelf, make_thing, serve: Serve) -> None:
    """A host that lost its power says nothing any more, and its connection does not end."""
    thing = shelf.put(slot(), make_thing(MIB))
    server = serve(idle_timeout_s=0.2)
    with socket.create_connection(server.address) as sock:
        wire.Outbound(sock).frame(BulkRequest(protocol=wire.PROTOCOL, object=slot(), hold=True))
        assert wire.Inbound(sock).frame(BulkResponse, within_s=10).held
        until(lambda: thing.num_readers == 0, "it is let go")


def test_a_holder_that_lives_says_so(shelf, make_thing, serve: Serve, client: BulkClient) -> None:
    """A conversion of an hour must not lose its source after two minutes."""
    thing = shelf.put(slot(), make_thing(MIB))
    server = serve(idle_timeout_s=2.0)
    began = time.monotonic()
    with client.hold(server.address_text, [slot()], renew_s=0.02):
        until(lambda: time.monotonic() - began > 3.0, "longer than that")
        assert server.counters()["requests"] > 3
        assert (1, 1) == (thing.num_readers, server.counters()["connections"])


def test_the_end_of_the_server_ends_holds(
    shelf, make_thing, serve: Serve, client: BulkClient, caplog: pytest.LogCaptureFixture
) -> None:
    thing = shelf.put(slot(), make_thing(MIB))
    server = serve()
    with client.hold(server.address_text, [slot()], renew_s=0.01):
        server.close()
        assert 0 == thing.num_readers
        until(lambda: "a hold is lost" in caplog.text, "the holder says so")
        with pytest.raises(PeerUnreachable):
            client.digests(server.address_text, slot())


# ---------------------------------------------------------------------------------------------- how many


def test_half_of_the_connections_may_hold_and_none_of_these_is_cut(
    shelf, make_thing, serve: Serve, client: BulkClient
) -> None:
    """Tools must not keep daemons from each other's bytes, nor daemons the tools from what they hold."""
    thing = shelf.put(slot(), make_thing(MIB))
    server = serve(max_connections=4)
    with client.hold(server.address_text, [slot()]), client.hold(server.address_text, [slot()]):
        with pytest.raises(PeerBusy, match="2 connections hold") as refused:
            client.hold(server.address_text, [slot()])
        assert 3 == refused.value.exit_code
        for _ in range(8):  # each on a new connection, for which another one has to go
            with BulkClient() as other:
                assert bytes(thing.view) == read(other, server.address_text, slot())
                other.digests(server.address_text, slot())
        until(lambda: thing.num_readers == 2, "the last answer is sent")
    until(lambda: thing.num_readers == 0, "all have let go")
    with client.hold(server.address_text, [slot()]):
        assert 1 == thing.num_readers


def test_one_connection_holds_so_many_and_no_more(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    thing = make_thing(10)
    for step in range(HELD_MAX + 1):
        shelf.put(slot(step=step), thing)
    with pytest.raises(UsageError, match="at most 4096"):
        client.hold(server.address_text, [slot(step=step) for step in range(HELD_MAX + 1)])
    until(lambda: thing.num_readers == 0, "nothing is held")


def test_a_server_that_does_not_know_the_word_is_found_out(client: BulkClient) -> None:
    """It would answer politely, and hold nothing: the conversion would lose its source in the middle."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                wire.Inbound(sock).frame(BulkRequest, within_s=10)
                wire.Outbound(sock).frame(BulkResponse(ok=True, file_bytes=MIB))
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RemoteProtocolError, match="update its daemon"):
            client.hold(wire.format_address(*listener.getsockname()[:2]), [slot()])
        thread.join(10)
