"""The arena keeps what is sealed, forgets what is not, and never writes under a reader."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd import failpoints
from snapshotd.arena import Arena, ParityFile, SealableFile, SlotFile, State, budget, parity_key, slot_key
from snapshotd.arena.budget import Headroom
from snapshotd.errors import BudgetError, LocalProtocolError, UsageError
from snapshotd.failpoints import FailpointError
from snapshotd.layout.digest import CHUNK_BYTES, chunk_digests, root_digest
from snapshotd.v1.control_pb2 import ParityRef, SlotRef, StripeSet

MIB = 1 << 20
Restart = Callable[..., Arena]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.configure(None)


def _seal(arena: Arena, obj: SealableFile, step: int = 1, *, job: str = "j", rank: int = 0) -> SlotRef | ParityRef:
    digests = chunk_digests(obj.view, obj.file_bytes)
    known = {"file_bytes": obj.file_bytes, "root_digest": root_digest(digests)}
    ref: SlotRef | ParityRef
    if isinstance(obj, SlotFile):
        ref = SlotRef(job=job, epoch=1, step=step, rank=rank, world_size=4, **known)
    else:
        ref = ParityRef(set=StripeSet(job=job, epoch=1, step=step), position=rank, **known)
    arena.seal(obj, ref, digests)
    return ref


def _slot(arena: Arena, step: int = 1, nbytes: int = MIB, **names: object) -> SlotFile:
    slot = arena.create_slot(b"HEADER", nbytes, job="j")
    slot.view[6:] = random.Random(step).randbytes(nbytes - 6)
    _seal(arena, slot, step, **names)  # type: ignore[arg-type]
    return slot


def _names(arena: Arena) -> set[str]:
    return {path.name for path in arena.root.rglob("*") if path.is_file()} - {"arena.lock"}


def test_a_sealed_slot_outlives_its_daemon(open_arena: Restart) -> None:
    arena = open_arena()
    slot = _slot(arena, 7)
    before, ref, digests = bytes(slot.view), slot.ref, slot.digests
    arena = open_arena()
    (found,) = arena.scan()
    assert isinstance(found, SlotFile)
    assert (before, ref, digests, "j") == (bytes(found.view), found.ref, found.digests, found.job)
    assert found is arena.find(slot_key(found.ref))
    assert arena.verify(found) == []
    assert arena.used_bytes == MIB
    assert arena.create_slot(b"", 1).slot_id >> 24 != found.slot_id >> 24


def test_everything_is_private(arena: Arena) -> None:
    _slot(arena)
    arena.create_buffer(10)
    for path in [arena.root, *arena.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_unsealed_files_are_garbage_after_a_restart(open_arena: Restart) -> None:
    arena = open_arena()
    kept = _slot(arena, 1)
    torn = _slot(arena, 2)
    arena.invalidate(torn)
    arena.create_slot(b"x", 5000)
    arena.create_buffer(5000)
    arena.create_parity(ParityRef(), 5000)
    names = {kept.path.name, kept.record_path.name}
    arena = open_arena()
    assert [obj.ref.step for obj in arena.scan() if isinstance(obj.ref, SlotRef)] == [1]
    assert names == _names(arena)
    assert len(arena.dropped) == 4


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[SlotFile], object]] = {
    "rotten record": lambda slot: _flip(slot.record_path),
    "empty record": lambda slot: slot.record_path.write_bytes(b""),
    "huge record": lambda slot: os.truncate(slot.record_path, 1 << 40),
    "record of parity": lambda slot: slot.record_path.rename(slot.path.parents[1] / "parity" / slot.record_path.name),
    "record elsewhere": lambda slot: slot.record_path.rename(slot.record_path.with_name("1.rec")),
    "record is a link": lambda slot: slot.record_path.symlink_to(slot.record_path.rename(slot.path.parents[1] / "x")),
    "record is a fifo": lambda slot: (slot.record_path.unlink(), os.mkfifo(slot.record_path)),
    "record is a folder": lambda slot: (slot.record_path.unlink(), slot.record_path.mkdir()),
    "file is shorter": lambda slot: os.truncate(slot.path, slot.file_bytes - 1),
    "file is longer": lambda slot: os.truncate(slot.path, slot.file_bytes + 1),
    "file is gone": lambda slot: slot.path.unlink(),
    "file is a link": lambda slot: slot.path.symlink_to(slot.path.rename(slot.path.parents[1] / "x")),
    "file is open to others": lambda slot: slot.path.chmod(0o644),
    "file has two names": lambda slot: os.link(slot.path, slot.path.parents[1] / "x"),
    "file is a fifo": lambda slot: (slot.path.unlink(), os.mkfifo(slot.path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_dropped_and_others_kept(damage: str, open_arena: Restart) -> None:
    arena = open_arena()
    slot = _slot(arena, 1)
    kept = _slot(arena, 2)
    arena.close()
    DAMAGE[damage](slot)
    arena = open_arena()
    assert [kept.file_id] == [obj.file_id for obj in arena.scan()]
    assert arena.dropped
    assert {kept.path.name, kept.record_path.name} == _names(arena) - {"x"}
    assert arena.used_bytes == kept.file_bytes


def test_of_two_files_with_one_key_the_newer_stays(root: Path) -> None:
    """A daemon that died while it replaced a rebuilt slot must not come back with the rotten one."""
    clock = [100.0]
    arena = Arena(root, budget_bytes=64 * MIB, clock=lambda: clock[0])
    old = _slot(arena, 1)
    record = old.record_path.read_bytes()
    copy = bytes(old.view)
    clock[0] = 50.0  # clocks may go back: the id does not decide, sealed_at does
    _slot(arena, 1)
    assert not old.path.exists()
    arena.close()
    old.path.write_bytes(copy)
    old.record_path.write_bytes(record)
    for path in (old.path, old.record_path):
        path.chmod(0o600)
    arena = Arena(root, budget_bytes=64 * MIB)
    assert [old.file_id] == [obj.file_id for obj in arena.scan()]
    assert len(_names(arena)) == 2
    arena.close()


def test_seal_replaces_the_file_of_the_same_key(arena: Arena) -> None:
    old = _slot(arena, 1)
    with arena.lease(old) as reading:
        new = _slot(arena, 1)
        assert new is arena.find(slot_key(new.ref))
        assert reading.digests is not None
        assert (old.state, arena.used_bytes) == (State.DOOMED, 2 * MIB)
        assert not old.record_path.exists()
    assert (old.state, arena.used_bytes) == (State.GONE, MIB)
    assert not old.path.exists()


def test_invalidate_unlinks_the_record_first(arena: Arena) -> None:
    slot = _slot(arena)
    key = slot_key(slot.ref)
    assert arena.invalidate(slot)
    assert not slot.record_path.exists()
    assert (arena.find(key), slot.ref, slot.digests, slot.root) == (None, None, None, "")
    assert arena.invalidate(slot)
    arena.rewrite_header(slot, b"other")
    assert bytes(slot.view[:5]) == b"other"
    _seal(arena, slot, 2)
    with pytest.raises(UsageError):
        arena.rewrite_header(slot, b"no")


def test_a_reader_keeps_what_it_reads(arena: Arena) -> None:
    slot = _slot(arena)
    key, before = slot_key(slot.ref), bytes(slot.view)
    with arena.acquire(key) as obj:
        assert obj is slot
        assert not arena.invalidate(slot)
        assert slot.record_path.exists()
        assert not arena.release(slot)
        assert arena.find(key) is None
        assert arena.take_free("j", MIB) is None
        assert before == bytes(obj.view)
        assert arena.verify(slot) == []  # scrubbing goes on with what it has begun
    with pytest.raises(LocalProtocolError):
        arena.lease(slot)
    assert slot is arena.take_free("j", MIB)
    assert arena.acquire(key) is None


def test_delete_wins_over_the_pool(arena: Arena) -> None:
    slot = _slot(arena)
    first, second = arena.lease(slot), arena.lease(slot)
    assert not arena.delete(slot)
    assert not arena.release(slot)
    first.close()
    first.close()
    assert arena.used_bytes == MIB
    second.close()
    assert arena.used_bytes == 0
    assert arena.delete(slot)
    assert set() == _names(arena)


def test_pools_are_by_job_and_size(arena: Arena) -> None:
    """Jobs must not read each other's slots."""
    slot = _slot(arena)
    assert arena.release(slot)
    assert arena.release(slot)
    assert arena.take_free("other", MIB) is None
    assert arena.take_free("j", MIB + 1) is None
    assert slot is arena.take_free("j", MIB)
    assert arena.take_free("j", MIB) is None
    assert State.OPEN is slot.state
    arena.release(slot)
    assert arena.drop_free("other") == 0
    assert arena.drop_free("j", keep_bytes={MIB}) == 0
    assert (arena.pooled_bytes, arena.used_bytes) == (MIB, MIB)
    assert arena.drop_free("j") == MIB
    assert (arena.pooled_bytes, arena.used_bytes) == (0, 0)


def test_parity_is_sealed_found_and_used_again(open_arena: Restart) -> None:
    arena = open_arena()
    parity = arena.create_parity(ParityRef(position=2), 3 * CHUNK_BYTES + 1)
    parity.view[:4] = b"abcd"
    ref = _seal(arena, parity, 3, rank=2)
    empty = arena.create_parity(ParityRef(), 0)
    _seal(arena, empty, 4)
    arena = open_arena()
    found = arena.scan()
    assert [obj.kind for obj in found] == ["parity", "parity"]
    assert isinstance(ref, ParityRef)
    again = arena.find(parity_key(ref))
    assert isinstance(again, ParityFile)
    assert (b"abcd", ref) == (bytes(again.view[:4]), again.ref)
    assert arena.verify(found[1]) == []
    arena.release(again)
    other = arena.create_parity(ParityRef(position=9), again.file_bytes)
    assert other is again
    assert other.ref is not None
    assert other.ref.position == 9


def test_verify_names_the_bad_chunks_and_paces(arena: Arena) -> None:
    slot = _slot(arena, nbytes=40 * CHUNK_BYTES + 5)
    slot.view[3 * CHUNK_BYTES] ^= 1
    slot.view[40 * CHUNK_BYTES + 4] ^= 128
    paced: list[int] = []
    assert arena.verify(slot, paced.append) == [3, 40]
    assert paced == [32 * CHUNK_BYTES, 8 * CHUNK_BYTES + 5]

    def stop(nbytes: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        arena.verify(slot, stop)
    assert arena.delete(slot)


def test_budget_is_checked_and_the_pool_makes_room(open_arena: Restart) -> None:
    arena = open_arena(4 * MIB)
    first, second, third = (_slot(arena, step) for step in (1, 2, 3))
    with pytest.raises(BudgetError, match=r"1048576 bytes are missing.*budget is 4 MiB, 3 MiB are used"):
        arena.create_slot(b"", 2 * MIB)
    arena.release(first)
    arena.release(second)
    assert arena.available() == 3 * MIB
    big = arena.create_slot(b"", 2 * MIB)  # the older one went, the other may stay
    assert (arena.pooled_bytes, first.state, second.state) == (MIB, State.GONE, State.POOLED)
    with pytest.raises(BudgetError):
        arena.create_buffer(3 * MIB)
    assert State.POOLED is second.state  # nothing is thrown away for what does not fit anyway
    for obj in (big, third):
        arena.delete(obj)
    assert arena.used_bytes == MIB


def test_a_full_tmpfs_is_an_error_and_no_sigbus(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BudgetError, match="1 MiB .* No space left"):
        arena.create_slot(b"", MIB)
    assert (0, set()) == (arena.used_bytes, _names(arena))


@pytest.mark.parametrize("chunks", [0, 1, 40])
def test_sealing_takes_no_memory_that_was_not_there_before(chunks: int, arena: Arena) -> None:
    """Somebody else fills the tmpfs while a job trains: not one step more would be sealed."""

    def blocks() -> int:
        return sum(path.stat().st_blocks for path in arena.root.rglob("*"))

    slot = arena.create_slot(b"", chunks * CHUNK_BYTES + 100, job="j")
    parity = arena.create_parity(ParityRef(), chunks * CHUNK_BYTES)
    most = blocks()
    for step in (1, 1 << 40, 3):
        for obj in (slot, parity):
            _seal(arena, obj, step, job="a job of some name" * 10)
            assert blocks() <= most
            assert arena.invalidate(obj)
            assert (blocks() <= most, obj.record_path.exists()) == (True, False)
    for obj in (slot, parity):
        arena.delete(obj)
    assert set() == _names(arena)


def test_headroom_is_checked_before_allocating(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "snapshotd.arena.arena.headroom", lambda root: Headroom(filesystem=GIB, cgroup=MIB, machine=None)
    )
    assert arena.available() == MIB
    with pytest.raises(BudgetError, match="control group has 1 MiB"):
        arena.create_slot(b"", MIB + 1)
    arena.create_slot(b"", MIB)


GIB = 1 << 30


@pytest.mark.parametrize("site", ["arena.before_seal_record", "arena.after_seal_record"])
def test_dying_around_the_record(site: str, open_arena: Restart) -> None:
    """Before the rename there is nothing; after it the slot is whole."""
    arena = open_arena()
    slot = arena.create_slot(b"x", 1000)
    failpoints.configure(f"{site}=raise")
    with pytest.raises(FailpointError):
        _seal(arena, slot, 1)
    failpoints.configure(None)
    arena = open_arena()
    assert (1 if "after" in site else 0) == len(arena.scan())


@pytest.mark.parametrize("meanwhile", ["release", "close"])
def test_giving_back_while_sealing(meanwhile: str, open_arena: Restart, tmp_path: Path) -> None:
    """A pooled file must never have a record; one that was whole when its daemon stopped must keep it."""
    arena = open_arena()
    slot = arena.create_slot(b"x", 1000, job="j")
    reached, go = tmp_path / "reached", tmp_path / "go"
    failpoints.configure(f"arena.after_seal_record=touch({reached});arena.after_seal_record=wait({go})")
    errors: list[BaseException] = []

    def seal() -> None:
        try:
            _seal(arena, slot)
        except LocalProtocolError as error:
            errors.append(error)

    thread = threading.Thread(target=seal)
    thread.start()
    failpoints._wait(str(reached))
    arena.release(slot) if meanwhile == "release" else arena.close()
    go.touch()
    thread.join(10)
    assert len(errors) == 1
    assert (meanwhile == "close") == slot.record_path.exists()
    assert (meanwhile == "close") == (len(open_arena().scan()) == 1)


def test_sealing_what_does_not_belong_together(arena: Arena) -> None:
    slot = arena.create_slot(b"x", CHUNK_BYTES)
    digests = chunk_digests(slot.view, CHUNK_BYTES)
    good = {"file_bytes": CHUNK_BYTES, "root_digest": root_digest(digests)}
    bad: list[tuple[SlotRef | ParityRef, bytes]] = [
        (SlotRef(**(good | {"file_bytes": 5})), digests),
        (SlotRef(**(good | {"root_digest": "0"})), digests),
        (SlotRef(**good), digests + digests),
        (ParityRef(**good), digests),
    ]
    for ref, with_digests in bad:
        with pytest.raises(LocalProtocolError):
            arena.seal(slot, ref, with_digests)
    arena.seal(slot, SlotRef(**good), digests)
    with pytest.raises(LocalProtocolError):
        arena.seal(slot, SlotRef(**good), digests)
    with pytest.raises(UsageError):
        arena.create_slot(b"long", 3)


def test_views_that_are_still_held_do_no_harm(arena: Arena) -> None:
    """A thread that still has a slice when the slot goes must not crash the daemon."""
    slot = _slot(arena)
    part = slot.view[:10]
    arena.delete(slot)
    assert bytes(part[:6]) == b"HEADER"
    with pytest.raises(ValueError, match="released"):
        slot.view[:1]


def _try_open(root: Path, answer: multiprocessing.Queue[str]) -> None:
    try:
        Arena(root, budget_bytes=MIB).close()
        answer.put("opened")
    except UsageError as error:
        answer.put(str(error))


def test_one_daemon_per_arena(root: Path) -> None:
    arena = Arena(root, budget_bytes=MIB)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    for expected in (f"in use by another daemon (process {os.getpid()})", "opened"):
        child = context.Process(target=_try_open, args=(root, answers))
        child.start()
        assert expected in answers.get(timeout=30)
        child.join(30)
        arena.close()
        arena.close()
    with pytest.raises(LocalProtocolError):
        arena.create_buffer(1)


def test_refuses_directories_that_are_not_its_own(root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        Arena(root, budget_bytes=MIB)
    root.chmod(0o700)
    (root / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"not an arena.*thesis"):
        Arena(root, budget_bytes=MIB)
    assert os.listdir(root) == ["thesis.tex"]
    link = root.with_name("link")
    link.symlink_to(root)
    with pytest.raises(UsageError):
        Arena(link, budget_bytes=MIB)
    with pytest.raises(UsageError):
        Arena(root, budget_bytes=0)


def test_scan_comes_first(arena: Arena) -> None:
    assert arena.scan() == []
    arena.create_slot(b"", 10)
    with pytest.raises(LocalProtocolError):
        arena.scan()


def test_many_threads(arena: Arena) -> None:
    """Capture, readers and scrubbing at once; the bytes of a leased slot never change and the books balance."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return run

    def capture(rank: int) -> None:
        kept: list[SlotFile] = []
        for step in range(40):
            slot = arena.take_free("j", 40_000) or arena.create_slot(b"", 40_000, job="j")
            slot.view[:] = bytes([step]) * 40_000
            _seal(arena, slot, step, rank=rank)
            kept.append(slot)
            if len(kept) > 2:
                arena.release(kept.pop(0))
        for slot in kept:
            arena.delete(slot)

    def read() -> None:
        while not stop.is_set():
            for obj in arena.sealed():
                lease = arena.acquire(slot_key(obj.ref)) if isinstance(obj.ref, SlotRef) else None
                if lease is not None:
                    with lease as leased:
                        assert len(set(bytes(leased.view))) == 1
                        assert arena.verify(leased) == [] if leased.sealed else True

    readers = [threading.Thread(target=guarded(read)) for _ in range(2)]
    writers = [threading.Thread(target=guarded(lambda rank=rank: capture(rank))) for rank in range(3)]  # type: ignore[misc]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    for thread in readers:
        thread.join(60)
    assert errors == []
    arena.drop_free()
    assert (0, 0, set()) == (arena.used_bytes, arena.pooled_bytes, _names(arena))


def test_budget_module_is_what_the_arena_uses(root: Path) -> None:
    assert budget.default_budget(root) > 0


@pytest.mark.parametrize("ends", ["sealed", "closed"])
def test_waiting_for_a_seal(ends: str, arena: Arena) -> None:
    ref = SlotRef(job="j", epoch=1, step=1, file_bytes=CHUNK_BYTES)
    slot = arena.create_slot(b"", CHUNK_BYTES, job="j")
    arena.wait_sealed(slot_key(ref), 0.001)
    waiter = threading.Thread(target=arena.wait_sealed, args=(slot_key(ref), 600.0))
    waiter.start()
    if ends == "sealed":
        digests = chunk_digests(slot.view, CHUNK_BYTES)
        ref.root_digest = root_digest(digests)
        arena.seal(slot, ref, digests)
    else:
        arena.close()
    waiter.join(60.0)
    assert not waiter.is_alive()
