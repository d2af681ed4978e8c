"""Composition root of a daemon: settings in, a serving daemon out."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from pathlib import Path
from typing import Literal, cast

from snapshotd import __version__
from snapshotd.arena import Arena, ParityFile, SlotFile, check, default_budget
from snapshotd.coordinator.node import CoordinatorNode
from snapshotd.daemon import events
from snapshotd.daemon.core import NodeCore
from snapshotd.daemon.link import CoordinatorLink
from snapshotd.daemon.orders import Orders
from snapshotd.daemon.service import WORK_THREADS, DaemonService
from snapshotd.daemon.sources import Sources
from snapshotd.daemon.windows import MAX_THREADS
from snapshotd.durable import scan_durable
from snapshotd.erasure import load_codec
from snapshotd.errors import UsageError
from snapshotd.rpc import parse_address
from snapshotd.security import PeerGuard, private_directory, require_secure
from snapshotd.settings import CoordinatorSettings, DaemonSettings, defaults
from snapshotd.sizes import format_bytes
from snapshotd.transfer import BulkClient, BulkServer, Pacer, format_address
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["DaemonNode"]

log = logging.getLogger("snapshotd.daemon")

PEER_CONNECTIONS = WORK_THREADS * MAX_THREADS
"""To one peer. A pipeline holds one connection to each of its peers while it waits for the next peer's: with fewer than
there are threads of pipelines, two of them could wait for each other."""


class DaemonNode:
    """
    One daemon process's objects; `start`, then `stop`.

    Raises UsageError and BudgetError at construction or start when it could not work as it was told to.
    """

    def __init__(self, settings: DaemonSettings) -> None:
        self._settings = settings
        host, port = parse_address(settings.listen)
        require_secure(host, settings.tls, settings.insecure)
        if settings.coordinator:
            require_secure(parse_address(settings.coordinator)[0], settings.tls, settings.insecure)
        private_directory(settings.socket_path.parent)
        if settings.arena is None:
            private_directory(settings.arena_path.parent)
        self._coordinator = None if settings.coordinator else CoordinatorNode(_own_coordinator(settings))
        self._codec, reason = load_codec(cast(Literal["auto", "isal", "zfec"], settings.codec))
        log.info("codec: %s", reason)
        budget = settings.budget or default_budget(settings.arena_path)
        self._arena = Arena(settings.arena_path, budget_bytes=budget)
        log.info("arena %s, budget %s", settings.arena_path, format_bytes(budget))
        self._recovered, self._slots = _recover(self._arena, settings)
        check(budget, budget=budget, root=settings.arena_path, held_bytes=self._arena.used_bytes)
        tls = settings.tls
        self._orders: Orders | None = None
        self._client = BulkClient(tls=tls.client_context() if tls else None, connections_per_peer=PEER_CONNECTIONS)
        self._server = BulkServer(
            (host, port),
            self._arena.acquire,
            wait=self._arena.wait_sealed,
            tls=tls.server_context() if tls else None,
            guard=PeerGuard(insecure=settings.insecure),
            suspected=self._suspected,
        )
        self.bulk_address = _advertised(settings, self._server)
        self._service: DaemonService | None = None

    @property
    def fatal(self) -> asyncio.Future[None]:
        assert self._service is not None
        assert self._service.fatal is not None
        return self._service.fatal

    async def start(self) -> None:
        settings = self._settings
        address = settings.coordinator
        if self._coordinator is not None:
            address = await self._coordinator.start()
            log.info("no --coordinator: running one for this node alone, on %s", address)
        sources = Sources(settings.node_id, self._arena, self._client)
        orders = self._orders = Orders(
            node_id=settings.node_id,
            arena=self._arena,
            sources=sources,
            codec=self._codec,
            persist_root=Path(settings.persist).absolute() if settings.persist else None,
            persist_keep=settings.persist_keep,
            pace=Pacer(settings.peer_bandwidth) if settings.peer_bandwidth else None,
        )
        core = NodeCore(_node_settings(settings, self.bulk_address, self._arena.budget_bytes), self._recovered)
        identity = worker.IAm(node_id=settings.node_id, coordinator=address, version=__version__)
        self._service = DaemonService(
            arena=self._arena,
            orders=orders,
            core=core,
            slots=self._slots,
            link=CoordinatorLink(address, tls=settings.tls, insecure=settings.insecure),
            who=lambda: identity,
            socket_path=settings.socket_path,
            scrub_rate=settings.scrub_rate,
        )
        await self._service.start()

    def _suspected(self, key: ObjectKey) -> None:
        if self._orders is not None:
            self._orders.suspected(key)

    async def stop(self) -> None:
        """End everything; slots and parity stay for the next daemon of this arena."""
        if self._service is not None:
            await self._service.stop()
        self._server.close()
        self._client.close()
        self._arena.close()
        if self._coordinator is not None:
            await self._coordinator.stop()


def _recover(arena: Arena, settings: DaemonSettings) -> tuple[events.Recovered, dict[events.SlotId, SlotFile]]:
    """Re-attach what an earlier daemon sealed, hash all of it, and drop what does not match."""
    slots: dict[events.SlotId, SlotFile] = {}
    refs: list[tuple[events.SlotId, control.SlotRef, str]] = []
    parities: list[control.ParityRef] = []
    for file in arena.scan():
        if arena.verify(file):
            log.error("%s does not match its digests any more; it is dropped", file.path.name)
            arena.delete(file)
        elif isinstance(file, ParityFile) and file.ref is not None:
            parities.append(file.ref)
        elif isinstance(file, SlotFile) and file.ref is not None:
            slot = events.SlotId(file.slot_id)
            slots[slot] = file
            refs.append((slot, file.ref, str(file.path)))
    for name, reason in arena.dropped:
        log.info("%s: %s; it is deleted", name, reason)
    if refs or parities:
        log.info("re-attached and verified %d slots and %d parity files", len(refs), len(parities))
    durables = scan_durable(settings.persist) if settings.persist and Path(settings.persist).is_dir() else []
    return events.Recovered(slots=tuple(refs), parities=tuple(parities), durables=tuple(durables)), slots


def _node_settings(settings: DaemonSettings, bulk_address: str, budget_bytes: int) -> events.NodeSettings:
    return events.NodeSettings(
        node_id=settings.node_id,
        nonce=secrets.token_hex(8),
        version=__version__,
        bulk_address=bulk_address,
        domain=settings.domain,
        generations=settings.slot_generations,
        capture_every=settings.capture_every,
        budget_bytes=budget_bytes,
        persist_every_steps=settings.persist_every,
        persist_every_s=settings.persist_minutes * 60,
    )


def _own_coordinator(settings: DaemonSettings) -> CoordinatorSettings:
    """Settings of the coordinator inside a daemon without one: loopback, state beside the socket, m = 0 by one node."""
    return defaults(
        CoordinatorSettings, listen="127.0.0.1:0", state=settings.socket_path.parent / f"{settings.node_id}.coordinator"
    )


def _advertised(settings: DaemonSettings, server: BulkServer) -> str:
    """Where peers reach us: as the user says, or as the kernel routes. Never by the host's name, which may mislead."""
    host, port = server.address
    if settings.advertise:
        host = settings.advertise
    elif ipaddress.ip_address(host).is_unspecified:
        host = _route_begins_at(settings.coordinator) if settings.coordinator else "127.0.0.1"
        log.info("listening on every interface; peers are told %s, where the route to the coordinator begins", host)
    return format_address(host, port)


def _route_begins_at(address: str) -> str:
    """Return our own address on the way to that one. Nothing is sent."""
    host, port = parse_address(address)
    try:
        family, kind, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(name)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"--listen is every interface, and which of them leads to {address} cannot be told ({error}); "
            "say with --advertise where other daemons reach this one"
        ) from error
