"""
The copy thread: takes one capture at a time, waits for a slot, copies, checks, seals.

A job's states:

    WAITING --(a slot is granted)--> COPYING --(bytes are copied or issued)--> COPIED --(sealed or skipped)--> DONE
       |                                                                                                        ^
       +--(the fence: the next optimizer step is due)--> CANCELLED ----------------------------------------------+

Rule 1: the training thread waits for COPYING to end, and for nothing else; the daemon is never in its way.
Rule 2: a slot is used up by a Seal only. A torn, late or failed copy leaves it granted.
Rule 3: grants belong to one session and one registered layout; all others are dropped.
Rule 4: only this thread maps slots and writes to them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final

from snapshotd.errors import SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.binding import Binding
from snapshotd_client.copier import Copier, Marks
from snapshotd_client.copying import copy_alone, go_first
from snapshotd_client.counters import Counters, Warner, logger
from snapshotd_client.device import CopyStream
from snapshotd_client.link import Link
from snapshotd_client.plan import Plan
from snapshotd_client.replicas import ReplicaDigest

__all__ = ["Job", "Pipeline", "Registration"]

_MAX_GRANTS: Final = 64
_REASON_COUNTER: Final[dict[int, str]] = {
    pb.Skip.REASON_NO_SLOT: "skipped_no_slot",
    pb.Skip.REASON_TORN: "skipped_torn",
    pb.Skip.REASON_LATE: "skipped_late",
    pb.Skip.REASON_ALIGNING: "skipped_aligning",
    pb.Skip.REASON_REFUSED: "skipped_refused",
    pb.Skip.REASON_ERROR: "skipped_error",
}


class _State(Enum):
    WAITING = "waiting"
    COPYING = "copying"
    COPIED = "copied"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Registration:
    """The layout that the daemon knows, or is being told, in one session."""

    plan: Plan
    session: int
    request_id: int
    accepted: bool | None = None
    reason: str = ""


@dataclass(slots=True, eq=False)
class Job:
    """One step's capture."""

    step: int
    binding: Binding
    meta: list[bytes]
    wants_digest: bool
    session: int
    marks: Marks = field(default_factory=list)
    state: _State = _State.WAITING
    fenced: bool = False
    stall_ns: int = 0
    copied_marks: Marks = field(default_factory=list)


class Pipeline:
    """Owns the copy thread, the grants and the mapped slots."""

    def __init__(
        self,
        *,
        link: Link,
        counters: Counters,
        warner: Warner,
        copy_threads: int,
        streams: dict[str, CopyStream],
        compare: bool,
    ) -> None:
        self._link = link
        self._counters = counters
        self._warner = warner
        self._compare = compare
        self._streams = streams
        self._copier = Copier(copy_threads, streams)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._job: Job | None = None
        self._holds_job = False  # the copy thread, in whatever state the job is
        self._grants: deque[pb.Grant] = deque(maxlen=_MAX_GRANTS)
        self._registration: Registration | None = None
        self._opened: set[int] = set()  # slots that were mapped ahead, or could not be
        self._last_step, self._void_step = 0, -1
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="snapshotd-copy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ------------------------------------------------------------------ for the training thread

    def register(self, plan: Plan, session: int) -> None:
        """
        Tell the daemon this layout; grants for any other are void from now on.

        Called by the training thread and, in a new session, by the link's: whoever comes second finds it done.
        """
        registration = Registration(plan, session, self._link.next_request())
        frame = pb.Frame(
            request_id=registration.request_id,
            register_layout=pb.RegisterLayout(
                header=plan.layout.header, replica_group=plan.replica_group, replica_hash=plan.replica_hash
            ),
        )
        with self._changed:  # posted under the lock: the last layout here must be the last one there
            if self.is_registered(plan, session):
                return
            known, self._registration = self._registration, registration
            if known is None or known.session != session or known.plan.layout.hash != plan.layout.hash:
                self._grants.clear()
                self._opened.clear()
            self._link.post(frame, session)
            self._changed.notify_all()

    def is_registered(self, plan: Plan, session: int) -> bool:
        """Whether the daemon was told this layout in ``session`` (by content: another plan may have the same one)."""
        known = self._registration
        if known is None or known.session != session:
            return False
        return (known.plan.layout.hash, known.plan.replica_hash) == (plan.layout.hash, plan.replica_hash)

    def submit(self, job: Job) -> None:
        """Hand over a capture; the one before must be fenced."""
        with self._changed:
            self._job, self._last_step = job, job.step
            self._changed.notify_all()

    def away(self, step: int) -> None:
        """Count a step that there is no daemon for."""
        with self._changed:
            self._last_step = step
            self._count_away(step)

    def hold(self) -> None:
        """Fence the capture that was just handed over, once it has begun: nobody may call ``fence`` in time."""
        with self._changed:
            job = self._job
            self._changed.wait_for(lambda: job is None or job.state is not _State.WAITING or not self._job_is_ready())
        self.fence()

    def fence(self, *, recording: bool = False) -> None:
        """
        Return when nothing reads the tensors any more; a capture that has not begun is given up.

        On an accelerator the copies may still run: what is issued from now on runs after them. When it is only
        ``recording`` what is issued, to run it again and again, they have ended instead.
        """
        if self._job is None:
            return
        begun = time.perf_counter_ns()
        skip: pb.Frame | None = None
        with self._changed:
            job = self._job
            if job is None or job.fenced:
                return
            if job.state is _State.WAITING:
                skip = self._give_up(job)
            while job.state is _State.COPYING or (recording and job.state is not _State.DONE):
                self._changed.wait()
            job.fenced = True
            marks = [] if recording else job.copied_marks
        for stream, mark in marks:
            stream.hold_compute(mark)
        stall = time.perf_counter_ns() - begun
        job.stall_ns += stall
        self._counters.add("stall_ns", stall)
        if skip is not None:
            self._link.post(skip, job.session)

    def drain(self) -> None:
        """Fence, and return when copies on an accelerator have ended, too, and nothing here holds what was copied."""
        self.fence()
        with self._changed:
            self._changed.wait_for(lambda: self._job is None and not self._holds_job)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until the last capture is skipped, or the daemon has it; False if it is void, or time ran out."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._job is None, timeout_s):
                return False
        flushed = self._link.flush(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return flushed and self._void_step != self._last_step

    def close(self, timeout_s: float) -> None:
        """Finish a copy that has begun, give up one that has not, end the threads and unmap the slots."""
        self.wait(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._copier.close()

    def idle(self) -> bool:
        return self._job is None

    # ------------------------------------------------------------------ for the link's thread

    def on_grant(self, grant: pb.Grant, session: int) -> None:
        with self._changed:
            registration = self._registration
            if registration is None or registration.session != session:
                return
            if grant.layout_hash != registration.plan.layout.hash:
                return
            if registration.accepted is False:
                registration.accepted, registration.reason = True, ""
                if self._warner.over("layout"):
                    logger.warning("snapshotd: there is room for this worker's snapshots now; steps are captured again")
            self._grants = deque((g for g in self._grants if g.slot_id != grant.slot_id), maxlen=_MAX_GRANTS)
            self._grants.append(grant)
            self._changed.notify_all()

    def on_layout_reply(self, request_id: int, reply: pb.LayoutReply) -> None:
        with self._changed:
            registration = self._registration
            if registration is None or registration.request_id != request_id:
                return
            registration.accepted, registration.reason = reply.accepted, reply.reason
            if reply.accepted and reply.layout_hash not in ("", registration.plan.layout.hash):
                registration.accepted = False
                registration.reason = f"it calls the layout {reply.layout_hash}, not {registration.plan.layout.hash}"
            self._changed.notify_all()
        if registration.accepted:
            self._warner.over("layout")
        else:
            self._warner.warn("layout", f"the daemon refuses to keep snapshots of this worker: {registration.reason}")

    def on_lost(self) -> None:
        with self._changed:
            self._registration = None
            self._grants.clear()
            self._changed.notify_all()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        go_first()
        copy_alone()
        while True:
            with self._changed:
                if self._holds_job:
                    self._holds_job = False
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self._job_is_ready() or self._unopened())
                if self._stopping:
                    return
                job = self._job if self._job_is_ready() else None
                self._holds_job = job is not None
                ahead = self._unopened()
                if job is not None:
                    outcome = self._take_grant(job)
                    if isinstance(outcome, pb.Grant):
                        job.state = _State.COPYING
            if job is None:
                if ahead is not None:
                    self._open_ahead(*ahead)
            elif isinstance(outcome, pb.Grant):
                self._serve(job, outcome)
            else:
                self._finish(job, outcome)
            job = None

    def _job_is_ready(self) -> bool:
        job = self._job
        if job is None or job.state is not _State.WAITING:
            return False
        registration = self._registration
        if registration is None or registration.session != job.session or registration.accepted is False:
            return True
        return bool(self._grants)

    def _unopened(self) -> tuple[pb.Grant, Plan] | None:
        """Return a slot that was granted and is not mapped yet: that takes as long as a copy; no step should wait."""
        registration = self._registration
        grant = next((g for g in self._grants if g.slot_id not in self._opened), None)
        return None if grant is None or registration is None else (grant, registration.plan)

    def _open_ahead(self, grant: pb.Grant, plan: Plan) -> None:
        self._opened.add(grant.slot_id)
        try:
            self._copier.open(grant, plan)
        except (OSError, ValueError, SnapshotdError) as error:  # the first capture into it tries again, and says why
            logger.debug("the slot %s could not be mapped ahead: %s", grant.path, error)

    def _take_grant(self, job: Job) -> pb.Grant | pb.Frame | None:
        """Return a slot, or the Skip for why there is none; None where the daemon is gone. The lock is held."""
        registration = self._registration
        if registration is None or registration.session != job.session:
            self._count_away(job.step)
            return None
        if registration.accepted is False:
            return self._skip(job, pb.Skip.REASON_REFUSED, registration.reason)
        usable = next((g for g in self._grants if g.min_step <= job.step), None)
        if usable is None:
            return self._skip(job, pb.Skip.REASON_ALIGNING, f"from step {self._grants[0].min_step}")
        self._grants.remove(usable)
        return usable

    def _give_up(self, job: Job) -> pb.Frame | None:
        """End a job that has not begun, because the next update is due. The lock is held."""
        registration = self._registration
        skip: pb.Frame | None = None
        if registration is None or registration.session != job.session:
            self._count_away(job.step)
        elif registration.accepted is False:
            skip = self._skip(job, pb.Skip.REASON_REFUSED, registration.reason)
        elif self._grants:
            skip = self._skip(job, pb.Skip.REASON_LATE, "the next update came before the copy could begin")
        else:
            skip = self._skip(job, pb.Skip.REASON_NO_SLOT, "")
        job.state = _State.DONE
        self._job = None
        self._changed.notify_all()
        return skip

    def _skip(self, job: Job, reason: pb.Skip.Reason, detail: str) -> pb.Frame:
        self._counters.add("skipped")
        self._counters.add(_REASON_COUNTER[reason])
        return pb.Frame(skip=pb.Skip(step=job.step, reason=reason, detail=detail[:500]))

    def _count_away(self, step: int) -> None:
        """The lock is held."""
        self._void_step = max(self._void_step, step)
        self._counters.add("skipped")
        self._counters.add("skipped_away")

    def _settled(self, step: int, sent: bool) -> None:
        """The daemon has the seal of ``step`` and needs us no more for it; or it went away before."""
        if sent:
            self._counters.add("sealed")
            return
        with self._changed:
            self._count_away(step)

    def _finish(self, job: Job, frame: pb.Frame | None) -> None:
        """The job is over; ``frame`` is the Skip that says why, if there is anything to say and somebody to tell."""
        if frame is not None:
            self._link.post(frame, job.session)
        with self._changed:
            job.state = _State.DONE
            if self._job is job:
                self._job = None
            self._changed.notify_all()

    def _serve(self, job: Job, grant: pb.Grant) -> None:
        frame: pb.Frame | None = None
        used_up = False
        try:
            frame, used_up = self._capture(job, grant)
        except Exception as error:  # nothing may end this thread: the step is skipped, and the slot stays granted
            self._counters.add("errors")
            self._warner.warn(f"copy:{type(error).__name__}", f"step {job.step} was not captured: {error}")
            frame = self._skip(job, pb.Skip.REASON_ERROR, f"{type(error).__name__}: {error}")
        if not used_up:
            with self._changed:
                registration = self._registration
                current = registration is not None and registration.session == job.session
                if current and all(g.slot_id != grant.slot_id for g in self._grants):
                    self._grants.appendleft(grant)
        self._finish(job, frame)

    def _capture(self, job: Job, grant: pb.Grant) -> tuple[pb.Frame | None, bool]:
        plan, binding = job.binding.plan, job.binding
        begun = time.perf_counter_ns()
        try:
            slot = self._copier.open(grant, plan)
            self._copier.issue(slot, binding, job.marks)
            wants_digest = job.wants_digest and plan.replicated
            digest = ReplicaDigest(binding.replicated(), self._streams) if wants_digest else None
            job.copied_marks = marks = _ends(job.marks)
            digests = self._copier.copy(slot, binding)
            moved = binding.moved()
            if self._compare and not moved:
                self._copier.check_equal(slot, binding)
        finally:
            if job.marks and not job.copied_marks:  # an error: what was issued must still be waited for
                job.copied_marks = _ends(job.marks)
            with self._changed:
                job.state = _State.COPIED
                self._changed.notify_all()
        for stream, mark in marks:
            stream.wait(mark)
        with self._changed:
            # Behind the fence the next update may change them: it is ordered after these copies.
            if marks and not moved and not job.fenced:
                moved = binding.moved()
        if moved:
            self._counters.add("torn")
            names = ", ".join(moved[:5])
            return self._skip(job, pb.Skip.REASON_TORN, f"{len(moved)} tensors changed: {names}"), False
        self._copier.write_meta(slot, plan, job.meta)
        failpoint("client.before_seal")
        copy_ns = time.perf_counter_ns() - begun
        seal = pb.Seal(
            slot_id=grant.slot_id,
            step=job.step,
            layout_hash=plan.layout.hash,
            replica_hash=plan.replica_hash,
            replica_digest=digest.hexdigest() if digest else "",
            copy_ns=copy_ns,
            stall_ns=job.stall_ns,
            digests=[pb.Seal.Digests(first=known.first, digests=known.digests) for known in digests],
        )
        if not self._link.post(pb.Frame(seal=seal), job.session, partial(self._settled, job.step)):
            self._settled(job.step, sent=False)
            return None, True
        failpoint("client.after_seal")
        self._counters.add("copy_ns", copy_ns)
        self._counters.add("copied_bytes", plan.layout.file_bytes)
        return None, True


def _ends(marks: Marks) -> Marks:
    """Return the marks behind what was issued so far on the streams of ``marks``."""
    return [(stream, stream.mark_copied()) for stream, _ in marks]
