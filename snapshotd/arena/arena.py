"""
The arena: all of a daemon's bytes, as files in one tmpfs directory that outlive worker, launcher and daemon.

    root/           0700, ours
      arena.lock    held (flock) by the daemon that owns the arena
      slots/        ID.slot, and ID.rec once it is sealed; until then that is ID.rec.tmp
      parity/       ID.parity, ID.rec or ID.rec.tmp
      buffers/      ID.buffer

Rule 1: a record's existence is the seal. It is renamed away BEFORE a file may be written again.
Rule 2: what somebody reads under a lease is neither written, nor given to somebody else, nor unmapped.
Rule 3: memory is counted before it is taken, and there before it is handed out.
Rule 4: after a restart, what has a valid record is whole; everything else is garbage and goes.
Rule 5: bookkeeping happens under one lock; allocating, mapping, hashing and unmapping outside of it.

Slots, parity and buffers count in whole pages. Records (1/32768 of the data) are not counted.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Literal, TypeVar

from snapshotd.arena import records
from snapshotd.arena.budget import headroom, page_bytes
from snapshotd.arena.files import (
    AnyFile,
    BufferFile,
    Outcome,
    ParityFile,
    SealableFile,
    SlotFile,
    State,
    check_header,
    create_file,
    seal_key,
)
from snapshotd.arena.inventory import Found, read_folder, write_record
from snapshotd.arena.keys import KeyId, key_id, ref_key
from snapshotd.arena.lease import Lease
from snapshotd.arena.lock import FOLDERS, take_lock
from snapshotd.errors import BudgetError, LocalProtocolError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import digest
from snapshotd.security import private_directory
from snapshotd.sizes import format_bytes
from snapshotd.v1.bulk_pb2 import ObjectKey
from snapshotd.v1.control_pb2 import ParityRef, SlotRef

__all__ = ["Arena", "Lease"]

_ID_HIGH_BITS: Final = 28
_ID_LOW_BITS: Final = 24
_VERIFY_WINDOW_BYTES: Final = 32 * digest.CHUNK_BYTES

FileT = TypeVar("FileT", SlotFile, ParityFile, BufferFile)
LeaseT = TypeVar("LeaseT", bound=AnyFile)


class Arena:
    """
    Slots, parity and buffers below ``root``; one process at a time. Safe to use from many threads.

    Args:
        root: a directory on a tmpfs. Created 0700, or one of an arena before; anything else is refused (UsageError).
        budget_bytes: what all files together may take.
        clock: seconds since 1970, for the records.
    """

    def __init__(self, root: Path, *, budget_bytes: int, clock: Callable[[], float] = time.time) -> None:
        if budget_bytes <= 0:
            raise UsageError(f"an arena needs a budget, not {budget_bytes} bytes")
        self.root = private_directory(root)
        self.budget_bytes = budget_bytes
        self.dropped: list[tuple[str, str]] = []
        """What scan() deleted: (file name, reason)."""
        self._clock = clock
        self._lock = threading.Lock()
        self._more_sealed = threading.Condition(self._lock)
        self._used_bytes = 0
        self._live: dict[int, AnyFile] = {}  # by file id: whatever is counted
        self._sealed: dict[KeyId, SealableFile] = {}
        self._pool: list[SealableFile] = []  # oldest first
        self._closed = False
        self._lock_descriptor = take_lock(self.root)
        try:
            self._folders = {kind: private_directory(self.root / name) for kind, name in FOLDERS.items()}
        except BaseException:
            os.close(self._lock_descriptor)
            raise
        # The upper bits are new in every process: a worker of a daemon before us cannot mean one of our files.
        self._next_id = secrets.randbits(_ID_HIGH_BITS) << _ID_LOW_BITS

    # ------------------------------------------------------------------------------------------ taking

    def create_slot(self, header: bytes, file_bytes: int, *, job: str = "") -> SlotFile:
        """
        Return a new open slot of ``file_bytes`` that begins with ``header``, for ``job``.

        All its memory is there. Pooled files go first when memory is short. BudgetError with the numbers when it is
        not enough; UsageError when the header does not fit.
        """
        check_header(header, file_bytes)
        slot = self._create(SlotFile, file_bytes)
        slot.job = job
        slot.view[: len(header)] = header
        return slot

    def take_free(self, job: str, file_bytes: int) -> SlotFile | None:
        """Return an open slot of this job and size from the pool (its bytes are old, its header too), or None."""
        slot = self._take_pooled(
            lambda obj: isinstance(obj, SlotFile) and obj.job == job and obj.file_bytes == file_bytes
        )
        return slot if isinstance(slot, SlotFile) else None

    def rewrite_header(self, slot: SlotFile, header: bytes) -> None:
        """Let an open slot begin with another ``header``. UsageError if it does not fit or the slot is not open."""
        check_header(header, slot.file_bytes)
        if slot.state is not State.OPEN:
            raise UsageError(f"{slot!r} is not open")
        slot.view[: len(header)] = header

    def create_parity(self, ref: ParityRef, nbytes: int) -> ParityFile:
        """
        Return an open parity file of ``nbytes`` for ``ref``: a pooled one of that size with old bytes, or a new one.

        BudgetError as for create_slot(); ``nbytes`` may be 0.
        """
        parity = self._take_pooled(lambda obj: isinstance(obj, ParityFile) and obj.file_bytes == nbytes)
        if not isinstance(parity, ParityFile):
            parity = self._create(ParityFile, nbytes)
        parity.ref = ref
        return parity

    def create_buffer(self, nbytes: int) -> BufferFile:
        """Return a new buffer of zeros; release() deletes it. BudgetError as for create_slot()."""
        return self._create(BufferFile, nbytes)

    # ------------------------------------------------------------------------------------------ sealing

    def seal(self, obj: SealableFile, ref: SlotRef | ParityRef, digests: bytes) -> None:
        """
        Write the record of an open file whose bytes are all there, so that it is found from now on, also by a daemon
        that comes after us.

        ``ref`` must have the file's size and the root digest of ``digests`` (else LocalProtocolError). A file that was
        sealed under the same key before is deleted (when its readers are done). BudgetError when the record needs more
        memory than was kept for it, and there is none: the file stays open.
        """
        key = seal_key(obj, ref, digests)
        if obj.state is not State.OPEN:
            raise LocalProtocolError(f"{obj!r} cannot be sealed")
        data = records.encode(records.make_record(ref, digests, self._clock()))
        write_record(obj, data)
        failpoint("arena.after_seal_record")
        with self._lock:
            if obj.state is not State.OPEN:
                if not self._closed:  # a bug of the owner; after close() the record is right, and not ours any more
                    obj.record_path.unlink(missing_ok=True)
                raise LocalProtocolError(f"{obj!r} was given back while it was sealed")
            self._index(obj, key, ref, digests)
            old = self._sealed.get(key)
            gone = self._dismiss(old, "delete") if old is not None else False
            self._sealed[key] = obj
            self._more_sealed.notify_all()
        if old is not None and gone:
            old.unmap()

    def invalidate(self, obj: SealableFile) -> bool:
        """
        Take the record of a sealed file away, so that it may be written again; False (and nothing is changed) while it
        is leased. True for an open file. LocalProtocolError for one that was given back.
        """
        with self._lock:
            if obj.state is State.OPEN:
                return obj.num_leases == 0
            if obj.state is not State.SEALED:
                raise LocalProtocolError(f"{obj!r} cannot be opened again")
            if obj.num_leases:
                return False
            self._unseal(obj)
            obj.state = State.OPEN
            return True

    # ------------------------------------------------------------------------------------------ giving back

    def release(self, obj: AnyFile) -> bool:
        """
        Give a file back: slots and parity to the pool, buffers for good. It cannot be found any more at once.

        Returns False when somebody still reads it: then the rest follows by itself with the last lease.
        """
        return self._give_back(obj, "delete" if isinstance(obj, BufferFile) else "pool")

    def delete(self, obj: AnyFile) -> bool:
        """Unlink a file and give its memory back; as release() where somebody still reads it."""
        return self._give_back(obj, "delete")

    def drop_free(self, job: str | None = None, *, keep_bytes: Collection[int] = ()) -> int:
        """
        Delete pooled files and return the bytes gained.

        With ``job``, that job's slots only; files of a size in ``keep_bytes`` stay.
        """
        with self._lock:
            victims: list[SealableFile] = [
                obj
                for obj in self._pool
                if obj.file_bytes not in keep_bytes and (job is None or (isinstance(obj, SlotFile) and obj.job == job))
            ]
            gained = self._evict(victims)
        for obj in victims:
            obj.unmap()
        return gained

    # ------------------------------------------------------------------------------------------ finding

    def find(self, key: ObjectKey) -> SealableFile | None:
        """Return the sealed file of that key, or None. Without a lease it may be gone a moment later."""
        with self._lock:
            return self._sealed.get(key_id(key))

    def sealed(self) -> list[SealableFile]:
        """Return all sealed files, oldest epoch and step first: the inventory."""
        with self._lock:
            return [self._sealed[key] for key in sorted(self._sealed, key=lambda key: (key.epoch, key.step, key))]

    def lease(self, obj: LeaseT) -> Lease[LeaseT]:
        """
        Return a lease on a file that is open, sealed, or read by others. LocalProtocolError for one that was given
        back: where that may happen meanwhile, acquire() is what you want.
        """
        with self._lock:
            if obj.state not in (State.OPEN, State.SEALED, State.DOOMED):
                raise LocalProtocolError(f"{obj!r} cannot be leased")
            obj.num_leases += 1
            return Lease(obj, self._unlease)

    def acquire(self, key: ObjectKey) -> Lease[SealableFile] | None:
        """Find and lease in one go; None when there is no sealed file of that key."""
        with self._lock:
            obj = self._sealed.get(key_id(key))
            if obj is None:
                return None
            obj.num_leases += 1
            return Lease(obj, self._unlease)

    def wait_sealed(self, key: ObjectKey, timeout_s: float) -> None:
        """Return when there is a sealed file of that key, when the time is over, or when the arena is closed."""
        name = key_id(key)
        with self._lock:
            self._more_sealed.wait_for(lambda: name in self._sealed or self._closed, timeout_s)

    def verify(self, obj: SealableFile, pace: Callable[[int], None] | None = None) -> list[int]:
        """
        Hash a sealed file again and return the indexes of the chunks that do not match.

        ``pace`` is called with the number of bytes after each 4 MiB: it may sleep, or raise to stop. The file is leased
        in between only: nobody waits for a slow reader. LocalProtocolError when its owner has given it back.
        """
        ref, bad = obj.ref, list[int]()
        for begin in range(0, obj.file_bytes, _VERIFY_WINDOW_BYTES):
            end = min(begin + _VERIFY_WINDOW_BYTES, obj.file_bytes)
            with self.lease(obj):
                digests = obj.digests
                if digests is None or obj.ref is not ref:
                    raise LocalProtocolError(f"{obj!r} is not what was to be verified any more")
                bad += digest.verify(obj.view, digests, begin, end, cold=True)
            if pace is not None:
                pace(end - begin)
        return bad

    # ------------------------------------------------------------------------------------------ start and end

    def scan(self) -> list[SealableFile]:
        """
        Attach again what a daemon before us had sealed, delete everything else, and return what was attached.

        Once, before anything is created (LocalProtocolError). Records are checked, bytes are not: see verify().
        What was deleted, and why, is in ``dropped``. Of two files with one key the one that was sealed last stays.
        The budget is not enforced here: what is there stays, and nothing new is given until it fits.
        """
        with self._lock:
            if self._live:
                raise LocalProtocolError("an arena is scanned once, before anything is created")
        found: list[Found] = []
        for kind, folder in self._folders.items():
            attached, dropped = read_folder(folder, kind)
            found += attached
            self.dropped += dropped
        newest: dict[KeyId, Found] = {}
        for item in sorted(found, key=lambda item: (item.sealed_at, item.obj.file_id)):
            key = ref_key(item.ref)
            before = newest.get(key)
            if before is not None:
                before.obj.record_path.unlink(missing_ok=True)
                before.obj.path.unlink(missing_ok=True)
                before.obj.unmap()
                self.dropped.append((before.obj.path.name, "sealed again later"))
            newest[key] = item
        with self._lock:
            for key, item in newest.items():
                obj = item.obj
                self._live[obj.file_id] = obj
                self._used_bytes += obj.cost_bytes
                self._index(obj, key, item.ref, item.digests)
                self._sealed[key] = obj
            while any(file_id >> _ID_LOW_BITS == self._next_id >> _ID_LOW_BITS for file_id in self._live):
                self._next_id = secrets.randbits(_ID_HIGH_BITS) << _ID_LOW_BITS
        return self.sealed()

    def close(self) -> None:
        """Unmap everything and let another daemon have the arena. The files stay; scan() finds what is sealed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._more_sealed.notify_all()
            objects = list(self._live.values())
            for table in (self._live, self._sealed, self._pool):
                table.clear()
            for obj in objects:
                obj.state = State.GONE
        for obj in objects:
            obj.unmap()
        os.close(self._lock_descriptor)

    # ------------------------------------------------------------------------------------------ accounting

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, pooled ones too."""
        with self._lock:
            return self._used_bytes

    @property
    def pooled_bytes(self) -> int:
        """Bytes of files that wait to be taken again; they make room by themselves when memory is short."""
        with self._lock:
            return sum(obj.cost_bytes for obj in self._pool)

    def available(self) -> int:
        """Return how many bytes of new files would fit now: by the budget, the tmpfs, the cgroup and the machine."""
        room = headroom(self.root).least
        with self._lock:
            pooled = sum(obj.cost_bytes for obj in self._pool)
            return max(0, min(self.budget_bytes - self._used_bytes, room) + pooled)

    # ------------------------------------------------------------------------------------------ insides

    def _take_pooled(self, wanted: Callable[[SealableFile], bool]) -> SealableFile | None:
        with self._lock:
            for obj in reversed(self._pool):  # the newest is the warmest
                if wanted(obj):
                    self._pool.remove(obj)
                    obj.state = State.OPEN
                    return obj
        return None

    def _create(self, kind: type[FileT], nbytes: int) -> FileT:
        if nbytes < 0:
            raise UsageError(f"a file of {nbytes} bytes cannot be")
        cost_bytes = page_bytes(nbytes)
        file_id, folder = self._reserve(kind.kind, cost_bytes), self._folders[kind.kind]
        path = folder / f"{file_id:016x}.{kind.kind}"
        try:
            view = create_file(path, nbytes, record_bytes=0 if kind is BufferFile else records.room_for(nbytes))
            obj = kind(file_id, path, nbytes, view, cost_bytes)
        except BaseException as error:
            with self._lock:
                if self._live.pop(file_id, None) is not None:
                    self._used_bytes -= cost_bytes
            if isinstance(error, BudgetError):
                raise BudgetError(f"{error}; {self._numbers()}") from error
            raise
        with self._lock:
            if self._closed:
                obj.state = State.GONE
            else:
                self._live[file_id] = obj
        if obj.state is State.GONE:
            obj.unmap()
            path.unlink(missing_ok=True)
            raise LocalProtocolError("the arena is closed")
        return obj

    def _reserve(self, kind: Literal["slot", "parity", "buffer"], cost_bytes: int) -> int:
        """Count the bytes of a file to be, making room from the pool, and return its id; or BudgetError."""
        room = headroom(self.root).least
        with self._lock:
            if self._closed:
                raise LocalProtocolError("the arena is closed")
            missing = max(self._used_bytes + cost_bytes - self.budget_bytes, cost_bytes - room)
            victims: list[SealableFile] = []
            for obj in self._pool:
                if missing <= 0:
                    break
                victims.append(obj)
                missing -= obj.cost_bytes
            if missing <= 0:
                self._evict(victims)
                file_id = self._next_id
                self._next_id += 1
                self._used_bytes += cost_bytes
                # Stands in for the file until it is there.
                self._live[file_id] = BufferFile(file_id, self.root, 0, None, cost_bytes)
        if missing > 0:
            raise BudgetError(
                f"a {kind} file of {format_bytes(cost_bytes)} ({cost_bytes} bytes) does not fit, {missing} bytes are "
                f"missing: {self._numbers()}. Raise --budget or the limit that is short, or keep fewer generations"
            )
        for obj in victims:
            obj.unmap()
        return file_id

    def _numbers(self) -> str:
        room = headroom(self.root)
        with self._lock:
            used, pooled = self._used_bytes, sum(obj.cost_bytes for obj in self._pool)
        names = ("the file system", "the control group", "the machine")
        limits = zip(names, (room.filesystem, room.cgroup, room.machine), strict=True)
        left = ", ".join(f"{name} has {format_bytes(value)}" for name, value in limits if value is not None)
        return (
            f"the budget is {format_bytes(self.budget_bytes)}, {format_bytes(used)} are used "
            f"({format_bytes(pooled)} of them free to be taken again); left in {self.root}: {left}"
        )

    def _give_back(self, obj: AnyFile, outcome: Outcome) -> bool:
        with self._lock:
            if obj.state is State.GONE or (obj.state is State.POOLED and outcome == "pool"):
                return True
            gone = self._dismiss(obj, outcome)
            done = obj.state is not State.DOOMED
        if gone:
            obj.unmap()
        return done

    def _dismiss(self, obj: AnyFile, outcome: Outcome) -> bool:
        """Under the lock: the owner has done with ``obj``. Returns whether it is to be unmapped now."""
        if obj.state is State.SEALED and not isinstance(obj, BufferFile):
            self._unseal(obj)
        if obj.state is State.POOLED and not isinstance(obj, BufferFile):
            self._pool.remove(obj)
        if obj.num_leases:
            # "delete" wins over "pool", whichever came first.
            obj.outcome = outcome if obj.state is not State.DOOMED or outcome == "delete" else obj.outcome
            obj.state = State.DOOMED
            return False
        return self._finish(obj, outcome)

    def _finish(self, obj: AnyFile, outcome: Outcome) -> bool:
        """Under the lock: nobody reads ``obj`` any more. Returns whether it is to be unmapped now."""
        if outcome == "pool" and not isinstance(obj, BufferFile) and not self._closed:
            obj.state = State.POOLED
            self._pool.append(obj)
            return False
        obj.state = State.GONE
        obj.unlink()
        if self._live.pop(obj.file_id, None) is not None:
            self._used_bytes -= obj.cost_bytes
        return True

    def _evict(self, victims: list[SealableFile]) -> int:
        """Under the lock: pooled files go. The caller unmaps them. Returns the bytes gained."""
        for obj in victims:
            self._pool.remove(obj)
            self._finish(obj, "delete")
        return sum(obj.cost_bytes for obj in victims)

    def _index(self, obj: SealableFile, key: KeyId, ref: SlotRef | ParityRef, digests: bytes) -> None:
        obj.key, obj.digests, obj.state = key, digests, State.SEALED
        if isinstance(obj, SlotFile) and isinstance(ref, SlotRef):
            obj.ref, obj.job = ref, ref.job
        elif isinstance(obj, ParityFile) and isinstance(ref, ParityRef):
            obj.ref = ref

    def _unseal(self, obj: SealableFile) -> None:
        obj.unseal()
        if obj.key is not None and self._sealed.get(obj.key) is obj:
            del self._sealed[obj.key]
        obj.key, obj.state = None, State.OPEN
        if not obj.num_leases:  # readers go on with what they found
            obj.ref = obj.digests = None

    def _unlease(self, obj: AnyFile) -> None:
        with self._lock:
            obj.num_leases -= 1
            last = obj.num_leases == 0 and obj.state is State.DOOMED
            if last and not isinstance(obj, BufferFile):
                obj.ref = obj.digests = None
            gone = last and self._finish(obj, obj.outcome)
        if gone:
            obj.unmap()
