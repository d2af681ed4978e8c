"""
From sealed to committed: which step is whole, protected, relied on; and how ranks that lost step find together again.

Rule 1: a step is committed only when every rank of the current, complete epoch has sealed it and, where the epoch has
parity, every node of it has built its part. A step that cannot be protected is given up, never committed half. A node
without a part answers all the same, unless it has pledged its slots: from then on it does not give them away to a newer
step.
Rule 2: one step at a time is being protected; of several whole ones the latest wins. Nodes are told what to build, but
for those that have begun without being told: what they built counts if it is what they would be told.
Rule 3: a step that some rank left out can never be whole. Then all ranks start again at one step further on, and
further each time that this fails in a row (1, 2, 4 ... 64 steps), until a commit succeeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from snapshotd.coordinator.inventory import Node, ParityKey
from snapshotd.coordinator.job import Context, Job, Sealed
from snapshotd.coordinator.membership import Epoch
from snapshotd.coordinator.protecting import Protecting, Shards, begin_protecting
from snapshotd.coordinator.snapshots import collect
from snapshotd.v1 import control_pb2 as control

__all__ = ["SLACK_STEPS_MAX", "Commits"]

SLACK_STEPS_MAX = 64
_STEPS_KEPT = 64
_ORDERS_KEPT = 4
"""Newest Protects that a node may still answer: one at a time is in flight, and a node works on the newest only."""

SEALED = control.Committed.LEVEL_SEALED
PROTECTED = control.Committed.LEVEL_PROTECTED


class Commits:
    """The uncommitted steps of one job's current epoch."""

    def __init__(self, ctx: Context, job: Job, on_commit: Callable[[Job], None]) -> None:
        self.in_flight: Protecting | None = None
        self.min_step = 0
        self.sealed: dict[int, Shards] = {}
        self.progress: dict[int, int] = {}
        self.furthest = -1
        self._skipped: dict[int, set[int]] = {}
        self._streak = 0
        self._adopted = False
        self._adopting_since: float | None = None
        self._ordered: list[Protecting] = []
        self._unasked: dict[int, dict[str, control.ParityBuilt | None]] = {}
        self._abandon: control.Abandon | None = None
        self._ctx = ctx
        self._job = job
        self._on_commit = on_commit

    # ------------------------------------------------------------ messages

    def reset(self, *, adopt: bool = False) -> None:
        """A new epoch begins (or, adopt: is heard of): nothing of the older ones can be committed any more."""
        self._adopted = not adopt
        self.in_flight, self._abandon = None, None
        self.min_step, self._streak, self.furthest = 0, 0, -1
        self.sealed, self.progress, self._skipped, self._unasked = {}, {}, {}, {}
        self._adopting_since = None

    def on_sealed(self, node: Node, message: control.NodeSealed) -> None:
        self._ctx.nodes.add(node, (shard.slot for shard in message.shards), ())
        if message.shards:
            self._job.saw((message.epoch, message.step))
        epoch = self._current(message.epoch, f"step {message.step} sealed by {node.node_id}")
        if epoch is None:
            return
        step = message.step
        kept = step >= self.min_step and not self._is_committed(epoch.number, step)
        for shard in message.shards:
            rank = shard.slot.rank
            who = epoch.ranks.get(rank)
            if who is None or who.node_id != node.node_id:
                self._job.counts["refused_messages"] += 1
                continue
            self._saw_progress(rank, step)
            if kept:
                self.sealed.setdefault(step, {})[rank] = shard
        if kept:
            self._note_unasked(node, message)
        self.advance()

    def on_skipped(self, node: Node, message: control.NodeSkipped) -> None:
        self._job.counts[f"skipped_{message.reason or 'unknown'}"] += 1
        epoch = self._current(message.epoch, f"step {message.step} skipped by {node.node_id}")
        if epoch is None:
            return
        self._saw_progress(message.rank, message.step)
        if message.rank not in self.sealed.get(message.step, {}):
            self._skipped.setdefault(message.step, set()).add(message.rank)
            for old in sorted(self._skipped)[:-_STEPS_KEPT]:
                del self._skipped[old]
        self.advance()

    def on_parity_built(self, node: Node, message: control.ParityBuilt) -> None:
        if not message.unasked:
            self._add_built(node, message)
        epoch = self._current(message.epoch, f"parity of step {message.step} by {node.node_id}")
        if epoch is None:
            return
        if message.unasked:
            self._on_unasked(node, message)
        flight = self.in_flight
        if flight is not None and flight.step == message.step:
            self._note_built(node)
            self.advance()

    def _note_unasked(self, node: Node, message: control.NodeSealed) -> None:
        """Whether the parity of a sealed step is built, or being built, there without an order."""
        flight = self.in_flight
        if message.HasField("built"):
            self._on_unasked(node, message.built)
        elif message.protecting:
            if flight is None or flight.step != message.step:
                self._unasked.setdefault(message.step, {})[node.node_id] = None
        else:
            self._unasked.get(message.step, {}).pop(node.node_id, None)
            if flight is not None and flight.step == message.step and node.node_id in flight.unasked:
                self._order(flight, node)

    def _on_unasked(self, node: Node, built: control.ParityBuilt) -> None:
        """What was built without an order counts when it is what the order says; and counts as nothing until then."""
        flight = self.in_flight
        if flight is None or flight.step != built.step:
            if built.step in self.sealed:
                self._unasked.setdefault(built.step, {})[node.node_id] = built
        elif node.node_id in flight.waiting:
            self._add_unasked(flight, node, built)

    def _add_unasked(self, flight: Protecting, node: Node, built: control.ParityBuilt) -> None:
        flight.unasked.discard(node.node_id)
        if flight.means(node.node_id, built):
            self._add_parities(node, flight.expected[node.node_id], built)
            self._note_built(node)
        if node.node_id in flight.waiting:
            self._order(flight, node)

    def _order(self, flight: Protecting, node: Node) -> None:
        flight.unasked.discard(node.node_id)
        self._ctx.out.to_node(node.session, protect=flight.order_of(node.node_id))

    def on_parity_failed(self, node: Node, message: control.ParityFailed) -> None:
        epoch = self._current(message.epoch, f"parity of step {message.step} by {node.node_id}")
        if epoch is None or self.in_flight is None or self.in_flight.step != message.step:
            return
        if self._away(epoch):
            # A peer is away, perhaps for good: the sealed step stays where it is, for the recovery to choose from.
            self.in_flight = None
        else:
            self._give_up(f"{node.node_id} could not build parity: {message.reason}")
        self.advance()

    def on_node_lost(self, node: Node) -> None:
        epoch = self._job.current
        if epoch is not None and node.node_id in epoch.node_ids:
            self.in_flight = None
            self._forget_seals(epoch, node)

    def resync(self, node: Node) -> None:
        """Bring a node that said hello up to date; it reports its uncommitted sealed steps again after this."""
        epoch = self._job.current
        if epoch is not None:
            self._forget_seals(epoch, node)
        if self._abandon is not None:
            self._ctx.out.to_node(node.session, abandon=self._abandon)
        flight = self.in_flight
        if flight is not None:
            if flight.expected.get(node.node_id):
                self._note_built(node)
            if node.node_id in flight.waiting:
                self._order(flight, node)

    def tick(self) -> None:
        flight = self.in_flight
        if flight is not None and self._ctx.now - flight.since >= self._ctx.settings.protect_timeout_s:
            late = ", ".join(sorted(flight.waiting))
            self._give_up(f"no parity from {late} within {self._ctx.settings.protect_timeout_s:.0f} s")
        self.advance()

    # ------------------------------------------------------------ decisions

    def advance(self) -> None:
        """Take each step that can be taken now. Each round commits, protects or abandons, so the loop ends."""
        epoch = self._job.current
        if epoch is None or not epoch.formed or epoch.number != self._job.number:
            return
        for _ in range(_STEPS_KEPT):
            if not self._advance_once(epoch):
                return

    def _advance_once(self, epoch: Epoch) -> bool:
        if self.in_flight is not None:
            if self.in_flight.waiting:
                return False
            return self._finish(epoch)
        if self._adopted and self._job.fallback is None and not self._may_go_on(epoch):
            return False
        if self._away(epoch):
            # Whoever is away may know of a newer commit than the store, or come back with what is missing here.
            return False
        if not self._adopted:
            self._adopted = True
            self._adopt(epoch)
        if self._is_adopting(epoch):
            return False
        whole = [step for step, shards in self.sealed.items() if len(shards) == epoch.world_size]
        if whole:
            self._begin(epoch, max(whole))
            return True
        impossible = [step for step in self.sealed if self._is_impossible(epoch, step)]
        if impossible:
            step = max(impossible)
            left_out = sorted(rank for rank in epoch.ranks if rank not in self.sealed[step])
            self._job.counts["abandoned_steps"] += 1
            self._send_abandon(f"step {step} was left out by rank {', '.join(map(str, left_out[:8]))}")
            return True
        return False

    def _adopt(self, epoch: Epoch) -> None:
        """
        Learn from the nodes what was committed: the store may have forgotten the newest commits of this epoch.

        A protected step of which everything is there may have been committed; to commit it (again) is right in any
        case. One that lacks a part, but can be had, is kept beside the older commit until it is whole again. One of
        which a group has no parity at all was not: it is sealed, and protected as any other.
        """
        job, number = self._job, epoch.number
        nodes = self._ctx.nodes.connected()
        found = collect(job.name, nodes, lambda key: key[0] == number and not self._is_committed(*key))
        for key in sorted(found, reverse=True):
            snapshot = found[key]
            if not snapshot.verdict()[0] or (epoch.m and not snapshot.covered()):
                continue
            older = job.committed
            if epoch.m == 0 or snapshot.redundant() or older is None or not self._can_be_had(older):
                self._commit(epoch, key[1], PROTECTED if epoch.m and snapshot.redundant() else SEALED)
                return
            job.committed = Sealed(epoch=number, step=key[1], level=SEALED, world_size=snapshot.world_size)
            job.fallback = older
            self._ctx.out.put(job.name, "commit", job.commit_json(), sync=True)
            return

    def _can_be_had(self, sealed: Sealed) -> bool:
        found = collect(self._job.name, self._ctx.nodes.connected(), lambda key: key == sealed.key).get(sealed.key)
        return found is not None and found.verdict()[0]

    def _is_adopting(self, epoch: Epoch) -> bool:
        """Whether an adopted step is still being made whole; after protect_timeout_s it is taken as it is."""
        adopted = self._job.committed
        if self._job.fallback is None or adopted is None or adopted.epoch != epoch.number:
            self._adopting_since = None
            return False
        if self._adopting_since is None:
            self._adopting_since = self._ctx.now
        if self._ctx.now - self._adopting_since < self._ctx.settings.protect_timeout_s:
            return True
        self._commit(epoch, adopted.step, SEALED)
        return False

    def _may_go_on(self, epoch: Epoch) -> bool:
        """Whether any step is whole, or might be impossible. Asked with each message, so no look at each rank."""
        return any(
            len(shards) == epoch.world_size or self.furthest > step or step in self._skipped
            for step, shards in self.sealed.items()
        )

    def _is_impossible(self, epoch: Epoch, step: int) -> bool:
        shards, skipped = self.sealed[step], self._skipped.get(step, set())
        return any(
            rank not in shards and (rank in skipped or self.progress.get(rank, -1) > step) for rank in epoch.ranks
        )

    def _begin(self, epoch: Epoch, step: int) -> None:
        shards = self.sealed[step]
        wrong = self._replica_conflict(shards)
        if wrong:
            self._job.split = False
            self._job.counts["replica_conflicts"] += 1
            mode = control.SetReplicaMode(job=self._job.name, epoch=epoch.number, split=False, reason=wrong)
            self._to_epoch(epoch, set_replica_mode=mode)
            self._ctx.out.note("integrity", self._job.name, wrong, epoch=epoch.number, step=step)
            self._send_abandon(wrong)
            return
        if epoch.m == 0:
            self._commit(epoch, step, SEALED)
            return
        nodes = self._ctx.nodes
        flight = self.in_flight = begin_protecting(self._job.name, epoch, step, shards, nodes, self._ctx.now)
        self._ordered = [*self._ordered[1 - _ORDERS_KEPT :], flight]
        unasked = self._unasked.pop(step, {})
        flight.unasked = flight.waiting & unasked.keys()
        for group, order in zip(epoch.groups, flight.orders, strict=True):
            asked = (node_id for node_id in group if node_id in flight.waiting and node_id not in flight.unasked)
            self._ctx.out.to_nodes(map(nodes.session_of, asked), protect=order)
        for node_id in sorted(flight.unasked):
            built, node = unasked[node_id], nodes.get(node_id)
            if built is not None and node is not None:
                self._add_unasked(flight, node, built)

    def _finish(self, epoch: Epoch) -> bool:
        flight = self.in_flight
        assert flight is not None
        missing = self._missing_parts(epoch, flight)
        if missing:
            self._give_up(f"parts are gone before the commit: {', '.join(missing[:4])}")
            return True
        self._ctx.nodes.settled[self._job.name, epoch.number, flight.step] = True
        self.in_flight = None
        self._commit(epoch, flight.step, PROTECTED)
        return True

    def _missing_parts(self, epoch: Epoch, flight: Protecting) -> list[str]:
        """Pair assertion: what is committed must really be there, by the nodes' own inventories."""
        missing: list[str] = []
        for node_id in epoch.node_ids:
            node = self._ctx.nodes.get(node_id)
            slots = flight.sealed[node_id] - node.slots.keys() if node is not None else flight.sealed[node_id]
            missing += (f"slot of rank {key[3]} on {node_id}" for key in sorted(slots))
            if node is None or not flight.expected[node_id].keys() <= node.parities.keys():
                missing.append(f"parity of {node_id}")
        return missing

    def _commit(self, epoch: Epoch, step: int, level: control.Committed.Level) -> None:
        older = self._job.committed
        self._job.committed = Sealed(epoch=epoch.number, step=step, level=level, world_size=epoch.world_size)
        self._job.fallback = None
        self._job.saw((epoch.number, step))
        self._job.counts["commits"] += 1
        self._streak = 0
        self.sealed = {later: shards for later, shards in self.sealed.items() if later > step}
        self._skipped = {later: ranks for later, ranks in self._skipped.items() if later > step}
        self._unasked = {later: built for later, built in self._unasked.items() if later > step}
        # That there ever was a commit must not be forgotten: it makes the difference to a fresh start.
        first = older is None or older.epoch != epoch.number
        self._ctx.out.put(self._job.name, "commit", self._job.commit_json(), sync=first)
        committed = control.Committed(job=self._job.name, epoch=epoch.number, step=step, level=level)
        members = set(epoch.node_ids)
        nodes = self._ctx.nodes.connected()
        concerned = (node for node in nodes if node.node_id in members or node.holds_job(self._job.name))
        self._ctx.out.to_nodes((node.session for node in concerned), committed=committed)
        self._on_commit(self._job)

    def _give_up(self, reason: str) -> None:
        """The step in flight will not be committed; go on with the next one."""
        flight = self.in_flight
        assert flight is not None
        self.in_flight = None
        self._job.counts["protect_failures"] += 1
        self._send_abandon(f"step {flight.step} is not protected: {reason}")

    def _send_abandon(self, reason: str) -> None:
        slack = min(SLACK_STEPS_MAX, (1 << self._streak) >> 1)
        self._streak = min(self._streak + 1, 10)
        self.min_step = self.furthest + 1 + slack
        self.sealed, self._skipped, self._unasked = {}, {}, {}
        self._abandon = control.Abandon(
            job=self._job.name,
            epoch=self._job.number,
            up_to_step=max(0, self.min_step - 1),
            min_step=self.min_step,
            reason=reason,
        )
        epoch = self._job.current
        self._ctx.out.note("commit", self._job.name, f"abandons: {reason}; goes on at step {self.min_step}")
        if epoch is not None:
            self._to_epoch(epoch, abandon=self._abandon)

    # ------------------------------------------------------------ small ones

    def _current(self, number: int, what: str) -> Epoch | None:
        """Fencing: the current epoch if `number` is it, else None, counted."""
        epoch = self._job.current
        if number < self._job.number:
            self._job.counts["fenced_messages"] += 1
            text = f"refused: {what} speaks of epoch {number}, the job is at {self._job.number}"
            self._ctx.out.note("commit", self._job.name, text, epoch=number)
            return None
        return epoch if epoch is not None and epoch.number == number == self._job.number else None

    def _is_committed(self, number: int, step: int) -> bool:
        committed = self._job.committed
        return committed is not None and (number, step) <= committed.key

    def _away(self, epoch: Epoch) -> bool:
        return any(self._ctx.nodes.session_of(node_id) is None for node_id in epoch.node_ids)

    def _forget_seals(self, epoch: Epoch, node: Node) -> None:
        ranks = epoch.ranks_of(node.node_id)
        for step in list(self.sealed):
            for rank in ranks:
                self.sealed[step].pop(rank, None)
            if not self.sealed[step]:
                del self.sealed[step]
        for unasked in self._unasked.values():
            unasked.pop(node.node_id, None)

    def _saw_progress(self, rank: int, step: int) -> None:
        self.progress[rank] = max(self.progress.get(rank, -1), step)
        self.furthest = max(self.furthest, step)

    def _add_built(self, node: Node, message: control.ParityBuilt) -> None:
        """What a node has built is known from its order; one that answers none of ours is to say all that it holds."""
        key = (message.epoch, message.step)
        order = next((one for one in self._ordered if (one.epoch, one.step) == key), None)
        expected = order.expected.get(node.node_id) if order is not None else None
        if expected is None:
            if message.lanes and node.session is not None:
                self._job.counts["refused_messages"] += 1
                self._ctx.out.close(node.session)
            return
        self._add_parities(node, expected, message)

    def _add_parities(
        self, node: Node, expected: dict[ParityKey, control.StripeSet], built: control.ParityBuilt
    ) -> None:
        lanes = set(built.lanes)
        for place, part_of in expected.items():
            if part_of.lane in lanes:
                self._ctx.nodes.add_parity(node, place, part_of)

    def _note_built(self, node: Node) -> None:
        flight = self.in_flight
        if flight is not None and flight.expected.get(node.node_id, {}).keys() <= node.parities.keys():
            flight.waiting.discard(node.node_id)

    def _to_epoch(self, epoch: Epoch, **body: Any) -> None:
        self._ctx.out.to_nodes(map(self._ctx.nodes.session_of, epoch.node_ids), **body)

    @staticmethod
    def _replica_conflict(shards: Shards) -> str:
        """Return in words which ranks disagree about what is replicated, or ""."""
        groups: dict[str, tuple[int, control.NodeSealed.Shard]] = {}
        digests: dict[str, tuple[int, str]] = {}
        for rank, shard in sorted(shards.items()):
            if not shard.replica_group:
                continue
            first, one = groups.setdefault(shard.replica_group, (rank, shard))
            if one.replica_hash != shard.replica_hash:
                return (
                    f"ranks {first} and {rank} do not mean the same by their replicated state: each captures all of it"
                )
            if shard.replica_digest:
                first, digest = digests.setdefault(shard.replica_group, (rank, shard.replica_digest))
                if digest != shard.replica_digest:
                    return (
                        f"replicated values differ between ranks {first} and {rank}: each rank captures all of its own"
                    )
        sizes = Counter(shard.replica_group for shard in shards.values())
        for group, (first, _) in groups.items():
            if sizes[group] != _group_size(group):
                return f"rank {first} splits its replicated state with ranks that do not: each rank captures all of it"
        return ""


def _group_size(group: str) -> int:
    """How many ranks a replica group has: it lists them, or, where there are many, begins with their number."""
    words = group.split()
    return int(words[0]) if len(words) > 1 else group.count(",") + 1
