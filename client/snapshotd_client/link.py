"""
The connection to this node's daemon: one background thread that owns the socket.

Rule 1: no other thread touches the socket. ``post`` puts a frame into a queue and returns; nobody waits for the daemon,
but who calls ``ask``, and that has a timeout.
Rule 2: a connection that breaks is made again, for ever, after 0.1 to 2 seconds. Each one that was welcomed is a new
``session``: what belongs to an older one (grants, seals) is void.
Rule 3: the peer must run as our own user.
Rule 4: a forked child only closes its copies of the file descriptors.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from snapshotd.errors import RemoteProtocolError
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.wire import FrameReader, pack

__all__ = ["Link", "Listener", "Question"]

_BACKOFF_S: Final = (0.1, 2.0)
_CONNECT_S: Final = 1.0
_WELCOME_S: Final = 10.0
_READ_BYTES: Final = 256 * 1024
_MAX_QUEUE: Final = 10_000

Settled: TypeAlias = Callable[[bool], None]


class Listener(Protocol):
    """Who hears what the daemon says; called on the link's thread, must not block."""

    def on_welcome(self, welcome: pb.WorkerWelcome, session: int) -> None: ...

    def on_frame(self, frame: pb.Frame, session: int) -> None: ...

    def on_lost(self, reason: str, was_welcome: bool) -> None: ...

    def on_refused(self, error: pb.WorkerError) -> None: ...


class Question:
    """One frame that waits for its answer. ``session``: the one that it was asked in; 0 when it could not be sent."""

    def __init__(self, request_id: int, session: int) -> None:
        self.request_id = request_id
        self.session = session
        self.done = threading.Event()
        self.answer: pb.Frame | None = None


class Link:
    """
    Frames to and from the daemon at ``path``, over as many connections as it takes.

    ``hello`` is the first frame of each connection. ``session`` is 0 while there is no welcomed connection.
    """

    def __init__(self, path: str, hello: pb.WorkerHello, listener: Listener) -> None:
        self._path = path
        self._hello = hello
        self._listener = listener
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._outbox: deque[tuple[int, bytes, Settled | None]] = deque()
        self._under_way: deque[tuple[int, Settled]] = deque()  # by how many bytes are sent when the frame is
        self._sent_bytes = 0  # on this connection
        self._questions: dict[int, Question] = {}
        self._next_request = 1
        self._sessions = 0
        self._stopping = False
        self._seen = threading.Event()
        self._refused: pb.WorkerError | None = None
        self._flushed = threading.Event()
        self._flushed.set()
        self._socket: socket.socket | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self.session = 0
        self._thread = threading.Thread(target=self._run, name="snapshotd-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def refused(self) -> pb.WorkerError | None:
        """Set once the daemon has said that it will never serve this worker."""
        return self._refused

    @property
    def was_seen(self) -> bool:
        """Whether a daemon has ever welcomed us."""
        return self._seen.is_set()

    def wait_session(self, timeout_s: float) -> bool:
        """Wait for a daemon that welcomes us; False when none did in time, or none ever will."""
        with self._changed:
            self._changed.wait_for(lambda: self.session or self._refused is not None or self._stopping, timeout_s)
            return self.session != 0

    def post(self, frame: pb.Frame, session: int, settled: Settled | None = None) -> bool:
        """
        Send ``frame`` if ``session`` is still the current one; says whether it is on its way.

        If so, ``settled`` is told how that ended, on the link's thread: sent (True), or void with its connection.
        """
        data = pack(frame)
        with self._lock:
            if session == 0 or session != self.session or self._stopping or len(self._outbox) >= _MAX_QUEUE:
                return False
            self._outbox.append((session, data, settled))
            self._flushed.clear()
        self._wake()
        return True

    def ask(self, frame: pb.Frame, timeout_s: float) -> pb.Frame | None:
        """Send ``frame`` and return the answer; None when there was no connection, it broke, or time ran out."""
        return self.finish(self.begin(frame), timeout_s)

    def begin(self, frame: pb.Frame) -> Question:
        """Send ``frame`` and return the question, which is to be given to ``finish``."""
        with self._lock:
            question = Question(self._next_request, self.session)
            self._next_request += 1
            self._questions[question.request_id] = question
        frame.request_id = question.request_id
        if not self.post(frame, question.session):
            question.session = 0
            question.done.set()
        return question

    def finish(self, question: Question, timeout_s: float) -> pb.Frame | None:
        """Return the answer; None when there was no connection, it broke, or time ran out."""
        question.done.wait(timeout_s)
        with self._lock:
            self._questions.pop(question.request_id, None)
        return question.answer

    def next_request(self) -> int:
        """Return a request id for a frame whose answer the listener awaits."""
        with self._lock:
            self._next_request += 1
            return self._next_request - 1

    def flush(self, timeout_s: float | None) -> bool:
        """Wait until all that was posted is sent, or void because its connection broke; False when time ran out."""
        return self._flushed.wait(timeout_s)

    def close(self, goodbye: pb.Frame | None, timeout_s: float = 2.0) -> None:
        """Send what is queued, then ``goodbye``, and end the thread."""
        if goodbye is not None and self.post(goodbye, self.session):
            self.flush(timeout_s)
        with self._lock:
            self._stopping = True
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            with self._lock:
                for fd in (self._wake_reader, self._wake_writer):
                    if fd >= 0:
                        os.close(fd)
                self._wake_reader = self._wake_writer = -1

    def abandon_in_child(self) -> None:
        """After fork: close this process's copies; take no lock, for its holder does not exist here."""
        self._stopping = True
        self.session = 0
        sock = self._socket
        self._socket = None
        fds = [self._wake_reader, self._wake_writer]
        self._wake_reader = self._wake_writer = -1
        if sock is not None:
            with contextlib.suppress(OSError):
                fds.append(sock.detach())
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        backoff = _BACKOFF_S[0]
        while not self._stopping and self._refused is None:
            reason, welcomed = "it is not there", False
            try:
                sock = self._connect()
                self._socket = sock
                try:
                    reason, welcomed = self._talk(sock)
                finally:
                    self._socket = None
                    sock.close()
            except OSError as error:
                reason = f"{error.strerror or error} ({self._path})"
            except RemoteProtocolError as error:
                reason = str(error)
            self._lose()
            if self._stopping or self._refused is not None:
                break
            self._listener.on_lost(reason, welcomed)
            backoff = _BACKOFF_S[0] if welcomed else min(backoff * 2, _BACKOFF_S[1])
            self._pause(backoff)
        self._flushed.set()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_CONNECT_S)
            sock.connect(self._path)
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.geteuid():
                raise RemoteProtocolError(f"the daemon at {self._path} runs as uid {uid}, not as {os.geteuid()}")
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def _talk(self, sock: socket.socket) -> tuple[str, bool]:
        """Serve one connection until it ends; return why, and whether it had been welcomed."""
        reader = FrameReader()
        pending = bytearray(pack(pb.Frame(hello=self._hello)))
        self._sent_bytes = 0
        started = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._stopping:
                self._fill(pending)
                selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if pending else 0))
                if self.session == 0 and time.monotonic() - started > _WELCOME_S:
                    return "it does not answer", False
                for key, events in selector.select(1.0):
                    if key.fileobj is not sock:
                        self._drain_wake()
                        continue
                    if events & selectors.EVENT_WRITE and pending:
                        with contextlib.suppress(BlockingIOError):
                            self._send(sock, pending)
                    if events & selectors.EVENT_READ:
                        try:
                            data = sock.recv(_READ_BYTES)
                        except BlockingIOError:
                            continue
                        if not data:
                            return "it closed the connection", self.session != 0
                        for frame in reader.feed(data):
                            self._hear(frame)
                        if self._refused is not None:
                            return "it refused", False
        return "closed", self.session != 0

    def _fill(self, pending: bytearray) -> None:
        with self._lock:
            if self.session:
                while self._outbox:
                    session, data, settled = self._outbox.popleft()
                    if session == self.session:
                        pending += data
                        if settled is not None:
                            self._under_way.append((self._sent_bytes + len(pending), settled))
            if not pending and not self._outbox:
                self._flushed.set()

    def _send(self, sock: socket.socket, pending: bytearray) -> None:
        count = sock.send(pending)
        del pending[:count]
        self._sent_bytes += count
        while self._under_way and self._under_way[0][0] <= self._sent_bytes:
            self._under_way.popleft()[1](True)

    def _hear(self, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("body")
        if kind == "error" and frame.error.fatal:
            with self._changed:
                self._refused = frame.error
                self._changed.notify_all()
            self._listener.on_refused(frame.error)
            return
        if kind == "welcome":
            with self._lock:
                self._sessions += 1
                self.session = self._sessions
                self._changed.notify_all()
            self._seen.set()
            self._listener.on_welcome(frame.welcome, self.session)
            return
        if frame.request_id:
            with self._lock:
                question = self._questions.pop(frame.request_id, None)
            if question is not None:
                question.answer = frame
                question.done.set()
                return
        self._listener.on_frame(frame, self.session)

    def _lose(self) -> None:
        with self._lock:
            self.session = 0
            lost = [*(settled for _, settled in self._under_way), *(settled for *_, settled in self._outbox)]
            self._under_way.clear()
            self._outbox.clear()
            questions = list(self._questions.values())
            self._questions.clear()
        for settled in lost:
            if settled is not None:
                settled(False)
        self._flushed.set()  # behind what was lost: who waited may look at it now
        for question in questions:
            question.done.set()

    def _pause(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            if selector.select(seconds):
                self._drain_wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe wakes as well; a closed one has nobody to wake
            os.write(self._wake_writer, b"x")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_reader, 4096):
                pass
