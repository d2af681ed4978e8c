"""
Named places in the code where a test, or a person with a doubt, makes something go wrong.

Rule 1: off means free. ``failpoint(...)`` is one test of a global when nothing is armed.
Rule 2: they ship. What is tested is what runs; there is no other build.
Rule 3: every site has a sentence in SITES (a test looks for those that have none).

``SNAPSHOTD_FAILPOINTS="name=action[@N];name2=action"`` arms them for one process, at import. ``@N`` lets
the action happen at the N-th hit of the site only (1 is the first); without it, at each hit. One name may be given
several times: the actions then happen in the order they are written, each with its own ``@N``.

=============  =========================================================================
action         what happens at the site
=============  =========================================================================
off            nothing
raise          FailpointError is raised
delay(MS)      sleeps that many milliseconds
exit(CODE)     ``os._exit(CODE)``: no handlers, no flushing
kill           SIGKILL to the process itself
hang           sleeps for ever
corrupt        "corrupt" is returned: the site flips a bit of what it has in hand
touch(PATH)    creates an empty file, so that a test knows that the site was reached
wait(PATH)     blocks until that file exists
=============  =========================================================================

Names that no code has are accepted (they may belong to another version); unknown actions are not.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from snapshotd.errors import SnapshotdError, UsageError

__all__ = ["ENVIRONMENT", "SITES", "FailpointError", "armed", "configure", "failpoint", "parse"]

ENVIRONMENT: Final = "SNAPSHOTD_FAILPOINTS"

SITES: Final[dict[str, str]] = {
    "arena.after_seal_record": "A slot or parity record is in place: the file is found again after a restart.",
    "arena.before_seal_record": "Digests are known, the record is not renamed into place: the file is still unsealed.",
    "client.after_restore": "The worker has loaded everything and has not yet told the daemon.",
    "client.after_seal": "The daemon has been told that the slot is whole.",
    "client.before_seal": "All bytes are in the slot, the daemon does not know yet.",
    "client.capture": "capture() was called, nothing is copied yet.",
    "client.mid_copy": "Some tensors are in the slot, others are not.",
    "client.mid_restore": "Some tensors are loaded, others are not.",
    "coordinator.after_commit": "A commit is durable, nobody has been told yet.",
    "coordinator.after_epoch": "A new epoch is durable, nobody has been told yet.",
    "coordinator.before_commit": "A commit is decided and not yet durable.",
    "coordinator.before_epoch": "A new epoch is decided and not yet durable.",
    "daemon.after_encode": "Parity is computed and verified, its record is not yet written.",
    "daemon.after_hash": "A sealed slot's digests are computed, its record is not yet written.",
    "daemon.before_encode": "The daemon was told to protect a step and has read nothing yet.",
    "daemon.before_hash": "The worker has sealed a slot and it is not hashed yet.",
    "daemon.before_report": "Sealed or protected here, the coordinator does not know yet.",
    "daemon.mid_assemble": "A restoring rank's state is partly assembled, or found for it.",
    "daemon.mid_encode": "Some windows of parity are computed, others are not.",
    "daemon.mid_rebuild": "A lost part is partly decoded.",
    "persist.after_rename": "A durable file has its name, the snapshot has no marker.",
    "persist.before_marker": "All durable files are there, the marker is not.",
    "persist.before_rename": "A durable file is written under a temporary name.",
    "transfer.before_send": "A bulk request is understood, nothing is answered yet.",
    "transfer.corrupt_send": "A piece of bulk payload is about to be sent: corrupt flips one bit of it on the wire.",
    "transfer.mid_send": "Some of a bulk answer's payload is sent, more is to come.",
}
"""Every known site, and what is true when it is reached."""

_POLL_S: Final = 0.002
_ACTION: Final = re.compile(r"(?P<verb>[a-z]+)(?:\((?P<argument>[^()]*)\))?(?:@(?P<hit>[0-9]{1,9}))?")


class FailpointError(SnapshotdError):
    """What the action ``raise`` raises; stands for any error that nobody foresaw."""

    code = "FAILPOINT"
    hint = f"a failpoint is armed by {ENVIRONMENT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Armed:
    """One armed action of one site."""

    verb: str
    act: Callable[[str], None]
    hit: int  # 0: each


class _Table:
    """The armed actions by site and how often each site was hit; safe to use from many threads."""

    def __init__(self, actions: dict[str, list[_Armed]]) -> None:
        self._actions = actions
        self._hits = dict.fromkeys(actions, 0)
        self._lock = threading.Lock()

    def names(self) -> frozenset[str]:
        return frozenset(self._actions)

    def hit(self, name: str) -> str | None:
        actions = self._actions.get(name)
        if actions is None:
            return None
        with self._lock:
            self._hits[name] += 1
            count = self._hits[name]
        verb = None
        for armed_action in actions:
            if armed_action.hit in (0, count) and armed_action.verb != "off":
                verb = armed_action.verb
                armed_action.act(name)
        return verb


def failpoint(name: str) -> str | None:
    """
    Let happen what is armed for the site ``name``; cost nothing when nothing is.

    Returns the action that happened (of several, the last), or None: a site that can corrupt what it has in hand looks
    for "corrupt". Raises FailpointError for ``raise``; blocks for ``delay``, ``hang`` and ``wait``.
    """
    if _table is None:
        return None
    return _table.hit(name)


def armed() -> frozenset[str]:
    """Return the names of the sites that have an action, for the log at start."""
    return frozenset() if _table is None else _table.names()


def configure(text: str | None) -> None:
    """
    Arm exactly what ``text`` says (see the module), with all hit counters at 0; None or "" disarms everything.

    Threads that already wait at a site go on waiting. UsageError for text that is not understood.
    """
    global _table
    _table = parse(text) if text and text.strip() else None


def parse(text: str) -> _Table | None:
    """Return the table that ``text`` describes, None when it arms nothing. UsageError says which part is wrong."""
    actions: dict[str, list[_Armed]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, action = part.partition("=")
        match = _ACTION.fullmatch(action.strip())
        if not equals or not name.strip() or match is None:
            raise UsageError(f"{ENVIRONMENT}: {part!r} is not name=action[@N]")
        verb, hit = match["verb"], match["hit"]
        if hit is not None and int(hit) == 0:
            raise UsageError(f"{ENVIRONMENT}: {part!r}: hits are counted from 1")
        act = _make_action(verb, match["argument"], part)
        actions.setdefault(name.strip(), []).append(_Armed(verb=verb, act=act, hit=int(hit or 0)))
    return _Table(actions) if actions else None


def _make_action(verb: str, argument: str | None, part: str) -> Callable[[str], None]:
    simple = _SIMPLE.get(verb)
    if simple is not None:
        if argument is not None:
            raise UsageError(f"{ENVIRONMENT}: {part!r}: {verb} takes no argument")
        return simple
    if verb in ("delay", "exit"):
        if argument is None or not re.fullmatch(r"[0-9]{1,9}", argument):
            raise UsageError(f"{ENVIRONMENT}: {part!r}: {verb} takes one number, as in {verb}(50)")
        number = int(argument)
        if verb == "delay":
            return lambda name: time.sleep(number / 1000)
        return lambda name: os._exit(number)
    if verb in ("touch", "wait"):
        if not argument:
            raise UsageError(f"{ENVIRONMENT}: {part!r}: {verb} takes a path, as in {verb}(/tmp/reached)")
        path = argument
        if verb == "touch":
            return lambda name: _touch(path)
        return lambda name: _wait(path)
    known = ", ".join(sorted([*_SIMPLE, "delay(MS)", "exit(CODE)", "touch(PATH)", "wait(PATH)"]))
    raise UsageError(f"{ENVIRONMENT}: {part!r}: unknown action {verb!r}; there are {known}")


def _nothing(name: str) -> None:
    pass


def _raise(name: str) -> None:
    raise FailpointError(f"failpoint {name}")


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    _hang(name)  # the signal may take a moment; nothing after the site may run


def _hang(name: str) -> None:
    while True:
        time.sleep(3600)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _wait(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(_POLL_S)


_SIMPLE: Final[dict[str, Callable[[str], None]]] = {
    "corrupt": _nothing,
    "hang": _hang,
    "kill": _kill,
    "off": _nothing,
    "raise": _raise,
}

_table: _Table | None = None
configure(os.environ.get(ENVIRONMENT))
