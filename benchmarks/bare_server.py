"""A gRPC server as a bare process: each session's messages go to one function, and what lies in a queue goes out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from snapshotd.rpc import CHANNEL_OPTIONS

__all__ = ["relay", "serve"]


async def relay(context: Any, queue: asyncio.Queue[Any], hear: Callable[[Any], None]) -> None:
    """One session, for as long as it lasts."""

    async def read() -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            hear(message)

    reader = asyncio.create_task(read())
    try:
        while True:
            await context.write(await queue.get())
    finally:
        reader.cancel()


async def serve(port_file: str, register: Callable[[Any], None]) -> None:
    """Serve what `register` adds to the server until killed; its address is in PORT_FILE as soon as that is there."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    part = Path(f"{port_file}.part")
    part.write_text(f"127.0.0.1:{port}", encoding="ascii")
    os.rename(part, port_file)
    await server.wait_for_termination()
