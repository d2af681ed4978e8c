"""
What happens to the coordinator core (past facts) and what it wants done (imperatives).

Rule 1: the core sees time only as `now`, seconds on the shell's monotonic-like clock.
Rule 2: an Output is obeyed in the order of its fields: `persist` is durable before anything in
        `send` or `answer` leaves; `close` comes last.
Rule 3: a session is one stream of one peer. A peer that reconnects has a new session.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from snapshotd.v1 import control_pb2 as control

SessionId = NewType("SessionId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMessageArrived:
    """A daemon said something."""

    session: SessionId
    message: control.NodeMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSessionEnded:
    """The stream of a daemon broke; the daemon may be dead, or only unreachable for a moment."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentMessageArrived:
    """A launcher said something."""

    session: SessionId
    message: control.AgentMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSessionEnded:
    """The stream of a launcher broke."""

    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotWanted:
    """A tool wants to read a snapshot (step None: the newest that can be had)."""

    request_id: str
    job: str
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetWanted:
    """A person wants a job forgotten."""

    request_id: str
    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time passed; the shell sends this every `tick_s`."""


Event: TypeAlias = (
    NodeMessageArrived
    | NodeSessionEnded
    | AgentMessageArrived
    | AgentSessionEnded
    | SnapshotWanted
    | ForgetWanted
    | Ticked
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """
    Remember this. The store keeps one value (JSON text) per (job, key).

    sync: must survive a power loss (epochs do; a commit may be forgotten by one or two steps,
    since the daemons' inventories are the truth about bytes).
    """

    job: str
    key: str
    value: str
    sync: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Forget a key of a job, or (key None) the whole job."""

    job: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToNode:
    session: SessionId
    message: control.CoordinatorMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ToAgent:
    session: SessionId
    message: control.AgentUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a tool's request: exactly one of the fields is set."""

    request_id: str
    located: control.LocateSnapshotResponse | None = None
    forgotten: control.ForgetJobResponse | None = None
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """
    Something that people should be able to read: goes to the log and the status page.

    stream: "membership", "commit", "recovery" or "integrity". text: the reason in words.
    """

    stream: str
    job: str
    text: str
    epoch: int = 0
    step: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the shell must do next, in this order."""

    persist: tuple[Put | Delete, ...] = ()
    send: tuple[ToNode | ToAgent, ...] = ()
    answer: tuple[Answer, ...] = ()
    notes: tuple[Note, ...] = ()
    close: tuple[SessionId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """
    Policy of the coordinator. All times in seconds.

    parity: m that is asked for; the effective m of a group of n nodes is min(m, n - 1).
    group_size: most nodes in one parity group; groups are balanced (10 nodes, size 8: 5 + 5).
    node_lease_s: a node without a session for longer is dead. agent_lease_s: the same for launchers.
    A stream that breaks starts the lease; a reconnect ends it.
    hang_factor: a job none of whose ranks ends a step for so many median steps, and hang_least_s, counts as hung
    (0: never); with hang_restart its workers are started again.
    """

    parity: int = 1
    group_size: int = 16
    node_lease_s: float = 5.0
    agent_lease_s: float = 3.0
    last_call_s: float = 10.0
    join_timeout_s: float = 600.0
    protect_timeout_s: float = 60.0
    attach_timeout_s: float = 60.0
    restore_wait_s: float = 30.0
    startup_grace_s: float = 5.0
    hang_factor: float = 30.0
    hang_least_s: float = 60.0
    hang_restart: bool = False
    nodes_expected: frozenset[str] = field(default_factory=frozenset)
