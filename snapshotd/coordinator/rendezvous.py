"""
torchrun's side of the membership: `torchrun --rdzv-backend snapshotd --rdzv-endpoint HOST:PORT`.

The launcher (torchrun's agent, one per node) joins through the coordinator, which decides who is in
an epoch and with which rank. The launchers' small exchanges (how many workers each) go through the
coordinator's key-value space of the epoch; the process group's store is hosted by rank 0's worker,
so it lives on a node of the epoch and dies with the epoch.

Rule 1: while the coordinator is away nothing here raises; workers go on training.
Rule 2: an epoch that breaks while launchers still exchange ranks is not an error: the workers are
        started, and torchrun is told at its next look to restart them.

Settings (`--rdzv-conf k=v,...`): timeout (s, waiting for enough nodes), last_call_timeout (s, waiting
for more nodes than the minimum at the first start), host (address that other nodes reach this one at),
node_id, and insecure / tls_cert / tls_key / tls_ca as for the daemon.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import grpc
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.utils.distributed import get_free_port

from snapshotd.rpc import open_channel, parse_address
from snapshotd.security import tls_files
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc
from snapshotd.workersocket import ask_who

__all__ = ["SnapshotdRendezvous", "create_handler", "get_handler"]

log = logging.getLogger("snapshotd.rendezvous")

RECONNECT_S = 0.2
CALL_TIMEOUT_S = 10.0
EPOCH_VARIABLE = "SNAPSHOTD_EPOCH"


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The entry point of the group `torchrun.handlers`."""
    return create_handler


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    return SnapshotdRendezvous(params)


class SnapshotdRendezvous(RendezvousHandler):
    """Rendezvous of one launcher; see the module's rules."""

    def __init__(self, params: RendezvousParameters) -> None:
        host, port = parse_address(params.endpoint)
        self._job = params.run_id
        self._timeout_s = float(params.get("join_timeout", params.get("timeout", 600)))
        tls = tls_files(*(_setting(params, name) for name in ("tls_cert", "tls_key", "tls_ca")))
        insecure = _setting(params, "insecure").lower() in ("1", "true", "yes", "on")
        daemon = ask_who()
        self._host = str(params.get("host") or params.local_addr or _address_towards(host, port))
        self._link = _Link(
            open_channel(f"{host}:{port}", tls=tls, insecure=insecure),
            endpoint=params.endpoint,
            join=control.AgentJoin(
                job=params.run_id,
                agent=secrets.token_hex(8),
                node_id=str(params.get("node_id") or (daemon.node_id if daemon is not None else "")),
                min_nodes=params.min_nodes,
                max_nodes=params.max_nodes,
                host=self._host,
                last_call_s=float(params.get("last_call_timeout", 0) or 0),
                join_timeout_s=self._timeout_s,
            ),
        )

    def get_backend(self) -> str:
        return "snapshotd"

    def get_run_id(self) -> str:
        return self._job

    def is_closed(self) -> bool:
        return self._link.closed is not None

    def set_closed(self) -> None:
        self._link.leave(reason="closed by the launcher")

    def num_nodes_waiting(self) -> int:
        return 1 if self._link.restart_wanted else 0

    def shutdown(self) -> bool:
        failure = sys.exc_info()[1]
        reason = "finished" if failure is None else f"failed: {type(failure).__name__}"
        self._link.leave(reason=reason, failed=failure is not None)
        self._link.stop()
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """
        Wait until the coordinator takes this launcher into an epoch.

        Raises RendezvousTimeoutError after the join timeout, RendezvousClosedError when the job was
        closed; exits with the coordinator's code when the job's state is lost (6) or, as a spare,
        when the job has finished (0) or another launcher has given it up (1).
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            formed = self._link.join(deadline)
            store = CoordinatorStore(self._link, formed)
            if formed.group_rank == 0:
                store.set("snapshotd/master_port", str(get_free_port()))
            values = self._link.kv_get(formed.epoch, ["snapshotd/master_port"], deadline)
            store.set(f"snapshotd/ready/{formed.group_rank}", b"1")
            ready = [f"snapshotd/ready/{rank}" for rank in range(formed.group_world_size)]
            if values is None or self._link.kv_get(formed.epoch, ready, deadline) is None:
                log.info("epoch %d broke before all launchers were ready; joining again", formed.epoch)
                continue
            break
        os.environ[EPOCH_VARIABLE] = str(formed.epoch)
        bootstrap = RendezvousStoreInfo(formed.master_host or self._host, int(values[0]))
        return RendezvousInfo(store, formed.group_rank, formed.group_world_size, bootstrap)


class CoordinatorStore(Store):
    """The key-value space of one epoch at the coordinator, as torchrun's launchers use it."""

    def __init__(self, link: _Link, formed: control.AgentFormed) -> None:
        super().__init__()
        self._link = link
        self._formed = formed
        self._role_info: dict[str, Any] | None = None
        self.set_timeout(timedelta(seconds=300))

    def set(self, key: str, value: str | bytes) -> None:
        if key.startswith(_ROLE_INFO):
            self._role_info = json.loads(value)
        self._link.kv_set(self._formed.epoch, {key: value.encode() if isinstance(value, str) else bytes(value)})

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = self._link.kv_get(self._formed.epoch, keys, self._deadline())
        if values is None:
            return [self._stand_in(key) for key in keys]
        return values

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._link.kv_get(self._formed.epoch, keys, self._deadline(timeout))

    def check(self, keys: list[str]) -> bool:
        try:
            return self._link.kv_get(self._formed.epoch, keys, time.monotonic() + 0.001) is not None
        except RendezvousTimeoutError:
            return False

    def add(self, key: str, amount: int) -> int:
        return self._link.kv_add(self._formed.epoch, key, amount)

    def _deadline(self, timeout: timedelta | None = None) -> float:
        return time.monotonic() + (timeout or self.timeout).total_seconds()  # type: ignore[attr-defined]

    def _stand_in(self, key: str) -> bytes:
        """
        A value for a key that nobody will ever write, because its epoch is over (rule 2).

        Raises RendezvousConnectionError for a key that has no harmless value.
        """
        size = int((self._role_info or {}).get("local_world_size", 1))
        if key.startswith(_ROLE_INFO) and self._role_info is not None:
            rank = int(key.rsplit("/", 1)[1])
            return json.dumps({**self._role_info, "rank": rank}).encode()
        if key.startswith("torchelastic/assigned_ranks/"):
            base = self._formed.group_rank * size
            world = self._formed.group_world_size * size
            return json.dumps([base, world, base, world]).encode()
        raise RendezvousConnectionError(f"epoch {self._formed.epoch} ended while waiting for {key}")


_ROLE_INFO = "torchelastic/role_info/"


class _Link:
    """The launcher's session with the coordinator: joins, keeps the newest word of it, reconnects."""

    def __init__(self, channel: grpc.Channel, *, endpoint: str, join: control.AgentJoin) -> None:
        self._channel = channel
        self._stub = control_grpc.CoordinatorServiceStub(channel)
        self._endpoint = endpoint
        self._join = join
        self._changed = threading.Condition()
        self._outbox: queue.SimpleQueue[control.AgentMessage | None] = queue.SimpleQueue()
        self._formed: control.AgentFormed | None = None
        self._joining = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._call: Any = None
        self._waiting_reason = ""
        self.restart_wanted = False
        self.closed: control.AgentClosed | None = None

    # ---------------------------------------------------------------- membership

    def join(self, deadline: float) -> control.AgentFormed:
        """Ask to be in the next epoch; returns when it has formed with us in it."""
        with self._changed:
            self._join.round += 1
            self._joining = True
            self._formed = None
            self.restart_wanted = False
            self.closed = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="snapshotd-rendezvous", daemon=True)
                self._thread.start()
            else:
                self._outbox.put(control.AgentMessage(join=self._join))
            while self._formed is None:
                if self.closed is not None:
                    self._raise_closed(self.closed)
                left = deadline - time.monotonic()
                if left <= 0:
                    why = self._waiting_reason or f"the coordinator at {self._endpoint} did not answer"
                    raise RendezvousTimeoutError(f"no epoch formed in time: {why}")
                self._changed.wait(left)
            self._joining = False
            return self._formed

    def _raise_closed(self, closed: control.AgentClosed) -> None:
        if closed.exit_code == 6:
            print(f"snapshotd: {closed.reason}", file=sys.stderr, flush=True)
            raise SystemExit(6)
        if closed.exit_code == 0:
            log.info("the job is over: %s", closed.reason)
            raise SystemExit(0)
        raise RendezvousClosedError(closed.reason)

    def leave(self, *, reason: str, failed: bool = False) -> None:
        """The job is over, for all of its launchers."""
        leave = control.AgentLeave(
            job=self._join.job, agent=self._join.agent, close=True, reason=reason, failed=failed
        )
        self._outbox.put(control.AgentMessage(leave=leave))

    def stop(self) -> None:
        """Say what is still to be said (bounded), then end the session."""
        with self._changed:
            self._stopping = True
        self._outbox.put(None)
        if self._thread is not None:
            self._thread.join(2.0)
        if self._call is not None:
            self._call.cancel()
        if self._thread is not None:
            self._thread.join(2.0)
        self._channel.close()

    def _run(self) -> None:
        while True:
            outbox: queue.SimpleQueue[control.AgentMessage | None] = queue.SimpleQueue()
            with self._changed:
                leftovers = _drain(self._outbox)
                if self._stopping and not any(m is not None and m.HasField("leave") for m in leftovers):
                    return
                self._outbox = outbox
                if self._joining:
                    outbox.put(control.AgentMessage(join=self._join))
                elif self._formed is not None:
                    outbox.put(control.AgentMessage(resume=self._resume(self._formed)))
                for message in leftovers:
                    if message is None or message.HasField("leave"):
                        outbox.put(message)
            try:
                self._call = self._stub.AgentSession(_messages(outbox), wait_for_ready=True)
                for update in self._call:
                    self._heard(update)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.PERMISSION_DENIED:
                    with self._changed:
                        self.closed = control.AgentClosed(reason=str(error.details()), exit_code=4)
                        self._changed.notify_all()
                    return
                log.debug("the session with the coordinator broke: %s", error.code())
            with self._changed:
                if self._stopping:
                    return
                self._changed.wait(RECONNECT_S)

    def _resume(self, formed: control.AgentFormed) -> control.AgentResume:
        return control.AgentResume(
            job=formed.job,
            agent=self._join.agent,
            epoch=formed.epoch,
            node_id=self._join.node_id,
            group_rank=formed.group_rank,
            group_world_size=formed.group_world_size,
        )

    def _heard(self, update: control.AgentUpdate) -> None:
        with self._changed:
            kind = update.WhichOneof("body")
            if kind == "formed" and self._joining and update.formed.round == self._join.round:
                self._formed = update.formed
            elif kind == "restart" and self._formed is not None and update.restart.epoch >= self._formed.epoch:
                log.info("epoch %d is over: %s", update.restart.epoch, update.restart.reason)
                self.restart_wanted = True
            elif kind == "closed":
                self.closed = update.closed
            elif kind == "waiting" and update.waiting.reason != self._waiting_reason:
                self._waiting_reason = update.waiting.reason
                log.info("waiting: %s", update.waiting.reason)
            self._changed.notify_all()

    # ---------------------------------------------------------------- key-value space

    def kv_set(self, epoch: int, entries: dict[str, bytes]) -> None:
        request = control.KvSetRequest(job=self._join.job, epoch=epoch, entries=entries)
        self._until_answered(lambda: self._stub.KvSet(request, timeout=CALL_TIMEOUT_S), time.monotonic() + 300)

    def kv_add(self, epoch: int, key: str, amount: int) -> int:
        request = control.KvAddRequest(
            job=self._join.job, epoch=epoch, key=key, amount=amount, request_id=secrets.token_hex(8)
        )
        answer = self._until_answered(lambda: self._stub.KvAdd(request, timeout=CALL_TIMEOUT_S), time.monotonic() + 300)
        return int(answer.value)

    def kv_get(self, epoch: int, keys: list[str], deadline: float) -> list[bytes] | None:
        """
        The values once all are there; None when the epoch ends first.

        Raises RendezvousTimeoutError at the deadline.
        """
        first = True
        while first or time.monotonic() < deadline:
            first = False
            if self.restart_wanted or self.closed is not None:
                return None
            wait_ms = max(1, int(min(0.5, deadline - time.monotonic()) * 1000))
            request = control.KvGetRequest(job=self._join.job, epoch=epoch, keys=keys, timeout_ms=wait_ms)
            answer = self._until_answered(partial(self._stub.KvGet, request, timeout=CALL_TIMEOUT_S), deadline + 1)
            if answer.found:
                return list(answer.values)
        raise RendezvousTimeoutError(f"nobody wrote {', '.join(keys[:4])} in time")

    def _until_answered(self, call: Callable[[], Any], deadline: float) -> Any:
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() not in _PASSING or time.monotonic() >= deadline:
                    raise RendezvousConnectionError(f"{self._endpoint}: {error.code()} {error.details()}") from error
                with self._changed:
                    self._changed.wait(RECONNECT_S)


_PASSING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


def _messages(outbox: queue.SimpleQueue[control.AgentMessage | None]) -> Iterator[control.AgentMessage]:
    while (message := outbox.get()) is not None:
        yield message


def _drain(outbox: queue.SimpleQueue[control.AgentMessage | None]) -> collections.deque[control.AgentMessage | None]:
    drained: collections.deque[control.AgentMessage | None] = collections.deque()
    while True:
        try:
            drained.append(outbox.get_nowait())
        except queue.Empty:
            return drained


def _setting(params: RendezvousParameters, name: str) -> str:
    """--rdzv-conf first, then the environment."""
    return str(params.get(name) or os.environ.get("SNAPSHOTD_" + name.upper(), ""))


def _address_towards(host: str, port: int) -> str:
    """The address of the interface that leads to the coordinator: measured, not guessed from the host name."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
