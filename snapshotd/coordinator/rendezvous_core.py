"""
Launchers of one job: who joins, when an epoch is agreed on, who gets which group rank.

Rule 1: the epoch is remembered (Put, sync) before any launcher hears of it.
Rule 2: an epoch that broke is followed by a new one as soon as all its living members have joined, if they are enough;
nobody waits for a replacement that may never come.
Rule 3: a message that comes twice or late changes nothing: joins are told apart by (agent, round). A launcher that
joins again with the round of an epoch that broke has never heard of that epoch: it waits for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snapshotd.coordinator.events import SessionId
from snapshotd.coordinator.job import Context, Job
from snapshotd.v1 import control_pb2 as control

__all__ = ["EXIT_LOST", "Launcher", "Launchers"]

EXIT_FAILED = 1
EXIT_LOST = 6
"""Exit code of launchers whose job's state is lost."""


@dataclass(slots=True)
class Launcher:
    """
    One launcher.

    waiting: it has joined and is in no running epoch. heard: it has spoken since the coordinator started; one that is
    only remembered gets the grace of a start. joined_round 0: it never joined (it resumed).
    """

    agent: str
    node_id: str
    host: str = ""
    session: SessionId | None = None
    heard: bool = False
    down_since: float | None = None
    waiting: bool = False
    joined_round: int = 0
    formed_round: int = 0
    joined_at: float = 0.0
    min_nodes: int = 1
    max_nodes: int = 1
    last_call_s: float = 0.0
    join_timeout_s: float = 0.0


class Launchers:
    """The launchers of one job. state: "idle", "running", "broken" or "closed"."""

    def __init__(self, ctx: Context, job: Job, mint: Callable[[Job, str], int]) -> None:
        self.agents: dict[str, Launcher] = {}
        self.members: dict[str, int] = {}
        self.places: dict[str, int] = {}
        self.size = 0
        self.epoch = 0
        self.state = "idle"
        self.reason = ""
        self.closed_code = 0
        self.broken_at = 0.0
        self._ctx = ctx
        self._job = job
        self._mint = mint
        self._restored_rounds: dict[str, int] = {}

    # ------------------------------------------------------------ messages

    def join(self, session: SessionId, join: control.AgentJoin) -> None:
        agent = self.agents.get(join.agent)
        if agent is None and self.state == "closed":
            closed = control.AgentClosed(job=self._job.name, reason=self.reason, exit_code=self.closed_code)
            self._ctx.out.to_agent(session, closed=closed)
            return
        if agent is None:
            agent = self.agents[join.agent] = Launcher(agent=join.agent, node_id=join.node_id)
            agent.formed_round = self._restored_rounds.get(join.agent, 0)
            agent.joined_round = agent.formed_round
        agent.session, agent.heard, agent.down_since = session, True, None
        agent.node_id, agent.host = join.node_id, join.host
        agent.min_nodes, agent.max_nodes = max(1, join.min_nodes), max(1, join.min_nodes, join.max_nodes)
        agent.last_call_s = join.last_call_s or self._ctx.settings.last_call_s
        agent.join_timeout_s = join.join_timeout_s or self._ctx.settings.join_timeout_s
        if self.state == "closed":
            self._tell_closed(agent)
            return
        if join.round < agent.formed_round:
            self._job.counts["late_messages"] += 1
            return
        if join.round == agent.formed_round and self.state == "running" and join.agent in self.members:
            self._tell_formed(agent)
            return
        if join.round > agent.joined_round:
            agent.joined_round, agent.joined_at = join.round, self._ctx.now
        agent.waiting = True
        if self.state == "running" and join.agent in self.members:
            self._break(f"the launcher on {agent.node_id} stopped its workers and joins again", but=join.agent)
        elif self.state == "running" and len(self.members) < agent.max_nodes:
            self._break(f"{agent.node_id} joins: the job grows", but=join.agent)
        self.advance()
        if agent.waiting:
            self._ctx.out.to_agent(session, waiting=control.AgentWaiting(reason=self._why_waiting(agent)))

    def resume(self, session: SessionId, resume: control.AgentResume) -> None:
        agent = self.agents.setdefault(resume.agent, Launcher(agent=resume.agent, node_id=resume.node_id))
        agent.session, agent.heard, agent.down_since = session, True, None
        if self.state == "closed":
            self._tell_closed(agent)
            return
        if resume.epoch > self.epoch and resume.epoch >= self._job.number:
            # Nothing is remembered of this epoch: the launcher knows more than the store.
            self._job.number = self.epoch = resume.epoch
            self.members, self.state = {}, "running"
        member = resume.epoch == self.epoch == self._job.number and (
            resume.agent in self.members or len(self.members) < resume.group_world_size
        )
        if member and self.state == "running":
            self.members.setdefault(resume.agent, resume.group_rank)
            self.size = max(self.size, resume.group_world_size)
            self.places.setdefault(resume.node_id, resume.group_rank)
            return
        if member and self.state == "broken":
            self.members.setdefault(resume.agent, resume.group_rank)
        if not agent.waiting:
            reason = self.reason or f"epoch {resume.epoch} is over, the job is at epoch {self._job.number}"
            self._tell_restart(agent, reason)

    def leave(self, leave: control.AgentLeave) -> None:
        agent = self.agents.pop(leave.agent, None)
        where = agent.node_id if agent is not None else leave.agent
        member = self.members.pop(leave.agent, None) is not None
        why = f"the launcher on {where} left" + (f": {leave.reason}" if leave.reason else "")
        if leave.close and self.state != "closed":
            self.close(why, EXIT_FAILED if leave.failed else 0)
        elif member and self.state == "running":
            self._break(why)
        self._maybe_reopen()
        self.advance()

    def session_ended(self, session: SessionId) -> None:
        for agent in self.agents.values():
            if agent.session == session:
                agent.session, agent.down_since = None, self._ctx.now
                if agent.agent in self.members:
                    self._job.sign(self._ctx.now, f"the launcher on {agent.node_id} lost its connection")

    def close(self, reason: str, exit_code: int) -> None:
        """Tell all launchers that this job is over."""
        self.state, self.reason, self.closed_code = "closed", reason, exit_code
        self._ctx.out.note("membership", self._job.name, f"closed: {reason}", epoch=self._job.number)
        for agent in self.agents.values():
            self._tell_closed(agent)
        self._maybe_reopen()

    def take_over(self, older: Launchers) -> None:
        """The job was forgotten, its launchers were not: a closed one may be joined again, a running one restarts."""
        self.agents, self.members, self.places = older.agents, older.members, older.places
        self.epoch, self.size, self.state, self.reason = older.epoch, older.size, older.state, older.reason
        self.broken_at = older.broken_at
        self.reopen()
        self.restart("the job was forgotten")

    def reopen(self) -> None:
        """A closed job may be joined again."""
        if self.state == "closed":
            self.state, self.reason, self.closed_code = "idle", "", 0
            self.members = {}

    # ------------------------------------------------------------ time

    def tick(self) -> None:
        now, lease_s = self._ctx.now, self._ctx.settings.agent_lease_s
        for agent in list(self.agents.values()):
            if agent.session is not None:
                continue
            if agent.down_since is None:
                agent.down_since = now
            grace_s = 0.0 if agent.heard else self._ctx.settings.startup_grace_s
            if now - agent.down_since < max(lease_s, grace_s):
                continue
            del self.agents[agent.agent]
            if self.members.pop(agent.agent, None) is not None and self.state == "running":
                self._break(
                    f"the launcher on {agent.node_id} is gone (no connection for {now - agent.down_since:.1f} s)"
                )
        self._maybe_reopen()
        self.advance()

    def advance(self) -> None:
        """Complete the next epoch if it can be completed now."""
        if self.state in ("running", "closed"):
            return
        ready = sorted(
            (agent for agent in self.agents.values() if agent.waiting and agent.session is not None),
            key=lambda agent: (agent.agent not in self.members, agent.joined_at, agent.node_id),
        )
        if not ready:
            return
        least, most = ready[0].min_nodes, ready[0].max_nodes
        now = self._ctx.now
        if self.state == "broken":
            missing = [agent for agent in self.members if agent in self.agents and not self.agents[agent].waiting]
            away = [agent for agent in self.members if agent in self.agents and self.agents[agent].session is None]
            complete = not missing and not away and len(ready) >= least
            since = self.broken_at
        else:
            called = now - max(agent.joined_at for agent in ready) >= ready[0].last_call_s
            complete = len(ready) >= most or (len(ready) >= least and called)
            since = min(agent.joined_at for agent in ready)
        if complete:
            self._form(ready[:most])
        elif len(ready) < least and now - since >= ready[0].join_timeout_s:
            text = f"{len(ready)} of at least {least} nodes joined within {ready[0].join_timeout_s:.0f} s"
            self.close(text, 1)

    # ------------------------------------------------------------ remembered

    def to_json(self) -> dict[str, object]:
        return {
            "epoch": self.epoch,
            "members": {
                agent: [rank, self.agents[agent].formed_round, self.agents[agent].node_id, self.agents[agent].host]
                for agent, rank in self.members.items()
                if agent in self.agents
            },
            "places": self.places,
            "size": self.size,
        }

    def remember(self, value: Mapping[str, Any]) -> None:
        self.epoch, self.size = int(value["epoch"]), int(value["size"])
        self.places = {str(node_id): int(rank) for node_id, rank in value["places"].items()}
        for agent, (rank, formed_round, node_id, host) in value["members"].items():
            self.members[agent] = int(rank)
            self._restored_rounds[agent] = int(formed_round)
            self.agents[agent] = Launcher(
                agent=agent,
                node_id=node_id,
                host=host,
                joined_round=int(formed_round),
                formed_round=int(formed_round),
            )
        self.state = "running" if self.members else "idle"

    # ------------------------------------------------------------ private

    def _form(self, chosen: list[Launcher]) -> None:
        self.members = self._group_ranks(chosen)
        self.places = {agent.node_id: self.members[agent.agent] for agent in chosen}
        self.size = len(chosen)
        for agent in chosen:
            agent.waiting, agent.formed_round = False, agent.joined_round
        self.state = "running"
        why, self.reason = self.reason, ""
        self.epoch = self._mint(self._job, why)
        for agent in chosen:
            self._tell_formed(agent)
        for agent in self.agents.values():
            if agent.waiting:
                self._ctx.out.to_agent(agent.session, waiting=control.AgentWaiting(reason=self._why_waiting(agent)))

    def _group_ranks(self, chosen: list[Launcher]) -> dict[str, int]:
        """Survivors keep their rank where the size stays the same, else their order; the others fill the gaps."""
        size = len(chosen)
        before: dict[str, int] = {}
        for agent in chosen:
            rank = self.members.get(agent.agent, self.places.get(agent.node_id))
            if rank is not None and rank not in before.values():
                before[agent.agent] = rank
        if size != self.size or any(rank >= size for rank in before.values()):
            ordered = sorted(before, key=lambda agent: before[agent])
            before = {agent: rank for rank, agent in enumerate(ordered)}
        free = iter(rank for rank in range(size) if rank not in before.values())
        others = [agent for agent in chosen if agent.agent not in before]
        if not before:
            others.sort(key=lambda agent: agent.node_id)
        return {**before, **{agent.agent: next(free) for agent in others}}

    def _break(self, reason: str, *, but: str = "") -> None:
        """The running epoch is over: its members have to stop their workers and join again."""
        self.state, self.reason, self.broken_at = "broken", reason, self._ctx.now
        self._job.sign(self._ctx.now, reason)
        self._ctx.out.note("membership", self._job.name, f"epoch {self.epoch} ends: {reason}", epoch=self.epoch)
        for agent in self.members:
            if agent != but and agent in self.agents and not self.agents[agent].waiting:
                self._tell_restart(self.agents[agent], reason)

    def restart(self, reason: str) -> None:
        """Break the running epoch from outside (its restore plan became impossible)."""
        if self.state == "running":
            self._break(reason)

    def _tell_formed(self, agent: Launcher) -> None:
        first = next((name for name, rank in self.members.items() if rank == 0), agent.agent)
        formed = control.AgentFormed(
            job=self._job.name,
            epoch=self.epoch,
            group_rank=self.members[agent.agent],
            group_world_size=self.size,
            master_host=self.agents[first].host if first in self.agents else "",
            round=agent.formed_round,
        )
        self._ctx.out.to_agent(agent.session, formed=formed)

    def _tell_restart(self, agent: Launcher, reason: str) -> None:
        restart = control.AgentRestart(job=self._job.name, epoch=self._job.number, reason=reason)
        self._ctx.out.to_agent(agent.session, restart=restart)

    def _tell_closed(self, agent: Launcher) -> None:
        agent.waiting = False
        closed = control.AgentClosed(job=self._job.name, reason=self.reason, exit_code=self.closed_code)
        self._ctx.out.to_agent(agent.session, closed=closed)

    def _maybe_reopen(self) -> None:
        if self.state == "closed" and not self.agents:
            self.reopen()
        elif self.state in ("running", "broken") and not self.agents:
            self.state, self.members = "idle", {}

    def _why_waiting(self, agent: Launcher) -> str:
        waiting = sum(other.waiting for other in self.agents.values())
        if self.state == "running":
            return (
                f"epoch {self.epoch} runs on {len(self.members)} of at most {agent.max_nodes} nodes: waiting as a spare"
            )
        if self.state == "broken":
            slow = sorted(
                self.agents[member].node_id
                for member in self.members
                if member in self.agents and not self.agents[member].waiting
            )
            if slow:
                return f"waiting for {', '.join(slow)} to stop its workers and join again ({self.reason})"
        if waiting < agent.min_nodes:
            return f"{waiting} of at least {agent.min_nodes} nodes are there"
        return f"{waiting} nodes are there (at most {agent.max_nodes}); waiting {agent.last_call_s:.0f} s for more"
