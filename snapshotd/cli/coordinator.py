"""`snapshotd coordinator`: serve until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio

from snapshotd.cli.process import configure_logging, until_signal
from snapshotd.coordinator.node import CoordinatorNode
from snapshotd.settings import CoordinatorSettings, add_flags, load


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, CoordinatorSettings)


def run(options: argparse.Namespace) -> int:
    settings = load(CoordinatorSettings, options, "coordinator")
    configure_logging(settings.log_level)
    return asyncio.run(_serve(settings))


async def _serve(settings: CoordinatorSettings) -> int:
    node = CoordinatorNode(settings)
    address = await node.start()
    print(f"snapshotd coordinator on {address}", flush=True)
    try:
        await until_signal(node.fatal)
    finally:
        await node.stop()
    return 0
