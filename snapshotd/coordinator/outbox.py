"""
What one `handle` call wants done, collected in the order that `Output` promises.

Rule: nothing here decides. The other files of the core write into it; `take` hands it over and empties it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from snapshotd.coordinator.events import Answer, Delete, Note, Output, Put, SessionId, ToAgent, ToNode
from snapshotd.v1 import control_pb2 as control

__all__ = ["NOTES_KEPT", "Outbox"]

NOTES_KEPT = 50
"""Newest notes per job that `status` shows."""

_NOTHING: Final = Output()
_encode: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


class Outbox:
    """Collects effects; `recent` keeps the newest notes of each job for people."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[str]] = {}
        self._last_text: dict[tuple[str, str], str] = {}
        self._persist: list[Put | Delete] = []
        self._send: list[ToNode | ToAgent] = []
        self._answers: list[Answer] = []
        self._notes: list[Note] = []
        self._close: list[SessionId] = []

    def put(self, job: str, key: str, value: Mapping[str, object], *, sync: bool) -> None:
        text = _encode(value)
        for index, earlier in enumerate(self._persist):
            if isinstance(earlier, Put) and (earlier.job, earlier.key) == (job, key):
                self._persist[index] = Put(job=job, key=key, value=text, sync=sync or earlier.sync)
                return
        self._persist.append(Put(job=job, key=key, value=text, sync=sync))

    def delete(self, job: str, key: str | None) -> None:
        self._persist.append(Delete(job=job, key=key))

    def to_node(self, session: SessionId | None, **body: Any) -> None:
        """Send to a daemon; without a session nothing is sent, because its next hello brings it up to date."""
        if session is not None:
            self._send.append(ToNode(session=session, message=control.CoordinatorMessage(**body)))

    def to_nodes(self, sessions: Iterable[SessionId | None], **body: Any) -> None:
        """The same words to many daemons: one message, made once."""
        message = control.CoordinatorMessage(**body)
        self._send.extend(ToNode(session=session, message=message) for session in sessions if session is not None)

    def to_agent(self, session: SessionId | None, **body: Any) -> None:
        if session is not None:
            self._send.append(ToAgent(session=session, message=control.AgentUpdate(**body)))

    def answer(self, answer: Answer) -> None:
        self._answers.append(answer)

    def note(self, stream: str, job: str, text: str, *, epoch: int = 0, step: int = -1) -> None:
        """Say it once: the same words about the same job and stream are not repeated until they change."""
        if self._last_text.get((stream, job)) == text:
            return
        self._last_text[(stream, job)] = text
        self._notes.append(Note(stream=stream, job=job, text=text, epoch=epoch, step=step))
        self.recent.setdefault(job, deque(maxlen=NOTES_KEPT)).append(text)

    def forget(self, job: str) -> None:
        self.recent.pop(job, None)
        for key in [key for key in self._last_text if key[1] == job]:
            del self._last_text[key]

    def close(self, session: SessionId) -> None:
        self._close.append(session)

    def take(self) -> Output:
        if not (self._persist or self._send or self._answers or self._notes or self._close):
            return _NOTHING  # as for most messages: the others of the step are awaited
        output = Output(
            persist=tuple(self._persist),
            send=tuple(self._send),
            answer=tuple(self._answers),
            notes=tuple(self._notes),
            close=tuple(self._close),
        )
        for effects in (self._persist, self._send, self._answers, self._notes, self._close):
            effects.clear()
        return output
