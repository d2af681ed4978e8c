"""A simulated node: the production node core, its arena, its link to the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotd.daemon import events
from snapshotd.daemon.core import NodeCore
from snapshotd.daemon.protect import has_part
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.simulation.arena import ArenaParity, ArenaSlot, Durable, can_rebuild, parity_bytes, parity_key
from tests.simulation.network import Link

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker
    from tests.simulation.world import World

TICK_S = 0.5
_SEALED_S = 0.5
"""How long a build that nobody ordered waits for what its peers have not sealed yet."""


class SimNode:
    """Does what the node core wants, with simulated memory and simulated time."""

    def __init__(self, world: World, node_id: str) -> None:
        self.node_id = node_id
        self.core: NodeCore | None = None
        self.arena: dict[int, ArenaSlot] = {}
        self.parities: dict[tuple[int, int, int, int, int], ArenaParity] = {}
        self.conns: dict[int, SimWorker] = {}
        self.lost = False
        self.partitioned = False
        self.slow = 1.0
        self.incarnation = 0
        self.link: Link | None = None
        self._world = world
        self._dice = world.dice.stream(f"node/{node_id}")
        self._readers = world.dice.stream(f"readers/{node_id}")
        self._held_chance = world.dice.stream("readers").choice([0.0, 0.0, 0.05])
        self._hashes = world.dice.stream(f"hashes/{node_id}")
        self.slow_hash_chance = world.dice.stream("hashes").choice([0.0, 0.0, 0.1])
        # Of a node's own kind, so that there are worlds where some pledge their slots and others are asked.
        self._pledge_bytes = world.dice.stream(f"pledges/{node_id}").choice([0, 1 << 30])
        self._cancelled: set[tuple[int, int]] = set()
        self._next_conn = 1

    # ------------------------------------------------------------ life

    def start(self) -> None:
        if self.core is not None or self.lost:
            return
        self.incarnation += 1
        plan = self._world.plan
        for slot_id in [slot_id for slot_id, slot in self.arena.items() if slot.record is None]:
            del self.arena[slot_id]
        # A restarted daemon verifies what it finds before it says that it has it.
        for slot_id in [slot_id for slot_id, slot in self.arena.items() if not slot.good()]:
            del self.arena[slot_id]
        for key in [key for key, parity in self.parities.items() if parity.rotten]:
            del self.parities[key]
        recovered = events.Recovered(
            slots=tuple(
                (events.SlotId(i), s.record, f"slot{i}") for i, s in self.arena.items() if s.record is not None
            ),
            parities=tuple(parity.ref for parity in self.parities.values()),
            durables=(),
        )
        settings = events.NodeSettings(
            node_id=self.node_id,
            nonce=f"{self.node_id}#{self.incarnation}",
            version="sim",
            bulk_address=f"{self.node_id}:1",
            domain="",
            generations=plan.generations,
            persist_every_steps=plan.persist_every_steps,
            restore_wait_s=5.0,
            pledge_bytes=self._pledge_bytes,
        )
        self.core = self._world.node_class(settings, recovered)
        self._world.clock.tell(f"{self.node_id} daemon starts")
        self._tick(self.incarnation)
        self._connect(self.incarnation)

    def crash(self) -> None:
        """The daemon dies; its arena and its workers live on."""
        if self.core is None:
            return
        self._world.clock.tell(f"{self.node_id} daemon crashes")
        self.core = None
        self._cancelled.clear()
        if self.link is not None:
            self.link.cut()
            self.link = None
        for one in list(self.conns.values()):
            one.disconnected()
        self.conns.clear()

    def lose(self) -> None:
        """The whole node dies, with all its memory."""
        self.crash()
        self._world.clock.tell(f"{self.node_id} is lost")
        self.lost = True
        self.arena.clear()
        self.parities.clear()

    def cut(self, *, notice: float | None = None) -> None:
        if self.link is not None:
            self.link.cut(notice_up=notice)

    # ------------------------------------------------------------ coordinator

    def _connect(self, incarnation: int) -> None:
        if self.core is None or self.incarnation != incarnation or self.link is not None:
            return
        coordinator = self._world.coordinator
        if not coordinator.up or self.partitioned:
            self._world.clock.after(self._dice.uniform(0.2, 0.6), self._connect, incarnation)
            return
        sid = self._world.new_session(self.node_id)
        self.link = Link(
            self._world,
            sid,
            up=coordinator.node_said,
            down=self._said,
            ended_up=coordinator.node_ended,
            ended_down=self._link_down,
            latency=0.005 * self.slow,
            ordered=True,
        )
        coordinator.links[sid] = self.link
        self.handle(events.CoordinatorUp())

    def _said(self, link: Link, data: bytes) -> None:
        if link is self.link:
            self.handle(events.CoordinatorSaid(message=control.CoordinatorMessage.FromString(data)))

    def _link_down(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            self.handle(events.CoordinatorDown())
            self._world.clock.after(self._dice.uniform(0.1, 0.5), self._connect, self.incarnation)

    # ------------------------------------------------------------ workers

    def open(self, one: SimWorker) -> int | None:
        if self.core is None:
            return None
        conn, self._next_conn = self._next_conn, self._next_conn + 1
        self.conns[conn] = one
        return conn

    def said(self, conn: int, frame: worker.Frame) -> None:
        if conn in self.conns:
            copy = worker.Frame.FromString(frame.SerializeToString())
            self.handle(events.WorkerFrame(conn=events.WorkerConn(conn), frame=copy))

    def gone(self, conn: int) -> None:
        if self.conns.pop(conn, None) is not None:
            self.handle(events.WorkerGone(conn=events.WorkerConn(conn)))

    # ------------------------------------------------------------ the core

    def handle(self, event: events.Event) -> None:
        if self.core is None:
            return
        counted = dict(self.core.state.counters)
        for effect in self.core.handle(event, self._world.clock.now):
            self._obey(effect)
        for name, count in self.core.state.counters.items() if self.core is not None else ():
            if count != counted.get(name):
                self._world.probe(f"node_{name}")
        self._world.checks.after_node(self)

    def _later(self, seconds: float, event: events.Event) -> None:
        self._world.clock.after(
            seconds * self.slow * self._dice.uniform(0.5, 1.5), self._ending, self.incarnation, event
        )

    def _ending(self, incarnation: int, event: events.Event) -> None:
        if self.incarnation == incarnation:
            self.handle(event)

    def _run(self, seconds: float, work: object, *args: object) -> None:
        self._world.clock.after(
            seconds * self.slow * self._dice.uniform(0.5, 1.5), self._work, self.incarnation, work, args
        )

    def _work(self, incarnation: int, work: object, args: tuple[object, ...]) -> None:
        if self.incarnation == incarnation and self.core is not None:
            ending = work(*args)  # type: ignore[operator]
            if ending is not None:
                self.handle(ending)

    def _void(self, slot: events.SlotId) -> events.SlotReady:
        self.arena[slot].record = None
        self.arena[slot].rotten = False
        self._world.checks.dirty = True
        return events.SlotReady(slot=slot)

    def _obey(self, effect: events.Effect) -> None:
        tell = self._world.clock.tell
        match effect:
            case events.ToCoordinator(message=message):
                tell(f"{self.node_id}->C {message.WhichOneof('body')}")
                if self.link is not None:
                    self.link.send("up", message)
            case events.ToWorker(conn=conn, frame=frame):
                one = self.conns.get(conn)
                if one is not None:
                    copy = worker.Frame.FromString(frame.SerializeToString())
                    self._world.clock.after(0.001, one.heard, conn, copy)
            case events.CloseWorker(conn=conn):
                one = self.conns.pop(conn, None)
                if one is not None:
                    one.disconnected()
            case events.CreateSlot(slot=slot, file_bytes=file_bytes):
                self.arena[slot] = ArenaSlot(file_bytes=file_bytes)
                self._later(0.02, events.SlotCreated(slot=slot, path=f"slot{slot}"))
            case events.VoidSlot(slot=slot):
                if self._readers.random() < self._held_chance:
                    self._run(self._readers.uniform(1.0, 8.0), self._void, slot)  # a tool reads it
                else:
                    self._later(0.01, self._void(slot))
            case events.SealSlot(slot=slot, ref=ref):
                slow = self._hashes.random() < self.slow_hash_chance  # large state, or a machine with other work
                self._run(self._hashes.uniform(0.5, 8.0) / self.slow if slow else 0.05, self._seal, slot, ref)
                self._world.checks.on_handed_over(self, ref)
            case events.DeleteSlot(slot=slot):
                self.arena.pop(slot, None)
                self._world.checks.dirty = True
            case events.BuildParity(protect=protect):
                self._cancelled.discard((protect.epoch, protect.step))
                self._run(0.2 if has_part(protect, self.node_id) else 0.0, self._build, protect)
            case events.CancelParity(epoch=epoch, step=step):
                self._cancelled.add((epoch, step))
            case events.DeleteParity(parity=parity):
                self.parities.pop(parity_key(parity), None)
                self._world.checks.dirty = True
            case events.RebuildObject(rebuild=rebuild, slot=slot):
                self._run(0.2, self._rebuild, rebuild, slot)
            case events.PersistSlots(persist=persist):
                self._run(0.5, self._persist, persist)
            case events.SealPersisted(seal=seal):
                self._run(0.1, self._seal_persisted, seal)
            case events.ServeRestore():
                self._run(0.1, self._serve, effect)
            case events.Note(stream=stream, text=text):
                tell(f"{self.node_id} note {stream}: {text}")
            case events.ReleaseRestore():
                pass

    # ------------------------------------------------------------ work orders

    def _seal(self, slot_id: int, ref: control.SlotRef) -> events.Event:
        slot = self.arena[slot_id]
        done = control.SlotRef()
        done.CopyFrom(ref)
        done.root_digest = slot.content
        slot.record = done
        self._world.checks.on_slot_sealed(self, done, slot.content)
        return events.SlotSealed(slot=events.SlotId(slot_id), ref=done, data_digest=slot.content, seconds=0.05)

    def _source(self, node_id: str, key: tuple[int, int], rank: int) -> ArenaSlot | None:
        """A slot as another daemon can read it: verified, or not at all; what is found rotten is reported there."""
        node = self._world.reachable(node_id)
        if node is None or node.core is None:
            return None
        for slot_id, slot in node.arena.items():
            ref = slot.record
            if ref is not None and (ref.epoch, ref.step, ref.rank) == (*key, rank):
                if slot.good():
                    return slot
                found = events.CorruptionFound(slot=events.SlotId(slot_id), ref=ref, parity=None, detail="read")
                self._world.clock.after(0.01, node.handle, found)
                return None
        return None

    def _build(self, protect: control.Protect, waits: bool = True) -> events.Event | None:
        key = (protect.epoch, protect.step)
        if key in self._cancelled:
            self._cancelled.discard(key)
            return events.ParityAborted(job=protect.job, epoch=key[0], step=key[1], reason="cancelled")
        made = []
        for one in protect.sets if has_part(protect, self.node_id) else ():
            contents = {}
            for position, member in enumerate(one.members):
                if member.slot.file_bytes:
                    source = self._source(member.node_id, key, member.slot.rank)
                    if source is None and not member.slot.root_digest and waits:
                        self._run(_SEALED_S, self._build, protect, False)
                        return None
                    if source is None:
                        reason = f"{member.node_id} does not give the slot of rank {member.slot.rank}"
                        return events.ParityAborted(job=protect.job, epoch=key[0], step=key[1], reason=reason)
                    contents[position] = source.content
            known = control.StripeSet()
            known.CopyFrom(one)
            for position, content in contents.items():
                known.members[position].slot.root_digest = content
            for position, member in enumerate(one.members):
                if member.node_id == self.node_id:
                    made.append((known, position, contents))
        parities = []
        for one, position, contents in made:
            lengths = tuple(member.slot.file_bytes for member in one.members)
            nbytes = parity_bytes(lengths, one.m, position)
            if not nbytes:
                continue
            ref = control.ParityRef(set=one, position=position, file_bytes=nbytes, root_digest="p")
            self.parities[parity_key(ref)] = ArenaParity(ref=ref, contents=contents)
            parities.append(ref)
        self._world.checks.on_parity_built(key, parities)
        return events.ParityFinished(job=protect.job, epoch=key[0], step=key[1], parities=tuple(parities), seconds=0.2)

    def _rebuild(self, order: control.Rebuild, slot_id: int) -> events.Event:
        one = order.set
        key = (one.epoch, one.step)
        done = control.RebuildDone(
            job=one.job, epoch=one.epoch, step=one.step, group=one.group, lane=one.lane, position=order.position
        )
        contents: dict[int, str] = {}
        data, parity = set(), set()
        for position, member in enumerate(one.members):
            if member.slot.file_bytes:
                where = order.slot_nodes[position]
                source = self._source(where, key, member.slot.rank) if where else None
                if source is None:
                    data.add(position)
                else:
                    contents[position] = source.content
            where = order.parity_nodes[position]
            held = self._world.reachable(where) if where else None
            found = held.parities.get((*key, one.group, one.lane, position)) if held and held.core else None
            if found is None or found.rotten:
                parity.add(position)
            else:
                for index, content in found.contents.items():
                    if index in data or index not in contents:
                        contents[index] = content
                    elif contents[index] != content:
                        self._world.checks.fail(f"parity of {key} was computed from other bytes than its slots have")
        lengths = tuple(member.slot.file_bytes for member in one.members)
        if not can_rebuild(lengths, one.m, frozenset(data), frozenset(parity)):
            done.reason = "not enough sources"
            return events.RebuildFinished(done=done, slot=None)
        done.ok = True
        slot: events.SlotId | None = None
        member = one.members[order.position]
        if order.slot and member.slot.file_bytes:
            self.arena[slot_id] = ArenaSlot(
                file_bytes=member.slot.file_bytes, content=contents[order.position], record=member.slot
            )
            if member.slot.root_digest != contents[order.position]:
                self._world.checks.fail(f"rebuilt bytes of {key} do not match their digest")
            done.slot.CopyFrom(member.slot)
            slot = events.SlotId(slot_id)
            self._world.probe("rebuilt_slot")
        if order.parity:
            ref = control.ParityRef(set=one, position=order.position, file_bytes=1, root_digest="p")
            self.parities[parity_key(ref)] = ArenaParity(ref=ref, contents=contents)
            done.parity.CopyFrom(ref)
            self._world.probe("rebuilt_parity")
        return events.RebuildFinished(done=done, slot=slot)

    def _persist(self, order: control.Persist) -> events.Event:
        durable = self._world.durables.setdefault((order.epoch, order.step), Durable(world_size=order.world_size))
        for slot in self.arena.values():
            ref = slot.record
            if ref is not None and (ref.epoch, ref.step) == (order.epoch, order.step) and slot.good():
                durable.contents[ref.rank] = slot.content
        done = control.PersistDone(job=order.job, epoch=order.epoch, step=order.step, ok=True)
        return events.PersistFinished(done=done)

    def _seal_persisted(self, order: control.PersistSeal) -> events.Event:
        durable = self._world.durables.get((order.epoch, order.step))
        done = control.PersistSealed(
            durable=control.DurableRef(
                job=order.job,
                epoch=order.epoch,
                step=order.step,
                world_size=order.world_size,
                path=f"/durable/{order.epoch}/{order.step}",
            ),
            ok=durable is not None and len(durable.contents) == order.world_size,
            reason="files are missing",
        )
        if durable is not None and done.ok:
            durable.sealed = True
            self._world.probe("persisted")
        return events.PersistSealFinished(done=done)

    def _serve(self, order: events.ServeRestore) -> events.Event:
        plan, request_id = order.plan, order.frame.request_id
        key = (plan.source_epoch, plan.source_step)
        if order.frame.WhichOneof("body") == "restore_query":
            decision = worker.RestoreDecision(
                kind=worker.RestoreDecision.KIND_SNAPSHOT,
                epoch=plan.epoch,
                source_epoch=key[0],
                source_step=key[1],
                source_world_size=plan.source_world_size,
                source="durable" if plan.durable_path else "memory",
            )
            frame = worker.Frame(request_id=request_id, restore_decision=decision)
            return events.RestoreServed(conn=order.conn, frame=frame)
        contents: dict[int, str] = {}
        error = ""
        if plan.durable_path:
            durable = self._world.durables.get(key)
            if durable is None or not durable.sealed:
                self._world.checks.fail(f"the plan names a durable snapshot {key} that is not whole")
            else:
                contents = durable.contents
        else:
            for rank, node_id in enumerate(plan.nodes):
                source = self._source(node_id, key, rank)
                if source is None:
                    error = f"{node_id} does not give the slot of rank {rank}"
                    break
                contents[rank] = source.content
        if not error:
            self._world.checks.on_restored(plan, contents)
        ready = worker.RestoreReady(batch_id=1, error=error)
        return events.RestoreServed(conn=order.conn, frame=worker.Frame(request_id=request_id, restore_ready=ready))

    def _tick(self, incarnation: int) -> None:
        if self.core is not None and self.incarnation == incarnation:
            self.handle(events.Ticked())
            self._world.clock.after(TICK_S, self._tick, incarnation)
