"""Composition root of a coordinator: settings in, a serving coordinator out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from snapshotd.coordinator.events import CoreSettings
from snapshotd.coordinator.service import CoordinatorService
from snapshotd.coordinator.store import Store
from snapshotd.rpc import parse_address, server_credentials
from snapshotd.security import require_secure
from snapshotd.settings import CoordinatorSettings

__all__ = ["CoordinatorNode"]


class CoordinatorNode:
    """One coordinator process's objects; `start`, then `stop`."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._host, self._port = parse_address(settings.listen)
        require_secure(self._host, settings.tls, settings.insecure)
        self._service = CoordinatorService(
            core_settings(settings),
            Store(settings.state),
            plain=settings.tls is None and not settings.insecure,
        )

    @property
    def fatal(self) -> asyncio.Future[None]:
        assert self._service.fatal is not None
        return self._service.fatal

    async def start(self) -> str:
        """Serve; returns "host:port" and writes it into the address file."""
        port = await self._service.start(self._settings.listen, server_credentials(self._settings.tls))
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{port}"
        if self._settings.address_file:
            target = Path(self._settings.address_file)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.write_text(address + "\n", encoding="ascii")
            temporary.replace(target)
        return address

    async def stop(self) -> None:
        await self._service.stop()


def core_settings(settings: CoordinatorSettings) -> CoreSettings:
    """The core's policy out of the settings of the process."""
    return CoreSettings(
        parity=settings.parity,
        group_size=settings.group_size,
        node_lease_s=settings.node_lease,
        agent_lease_s=settings.agent_lease,
        last_call_s=settings.last_call,
        protect_timeout_s=settings.protect_timeout,
        restore_wait_s=settings.restore_wait,
        startup_grace_s=settings.startup_grace,
        hang_factor=settings.hang_factor,
        hang_least_s=settings.hang_least,
        hang_restart=settings.hang_restart,
    )
