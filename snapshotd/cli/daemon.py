"""`snapshotd daemon`: serve this node's workers until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import os

from snapshotd.cli.process import configure_logging, until_signal
from snapshotd.daemon.node import DaemonNode
from snapshotd.settings import DaemonSettings, add_flags, load

NICENESS = 5
"""The daemon yields to training: all of its threads, so before there is a second one."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DaemonSettings)


def run(options: argparse.Namespace) -> int:
    settings = load(DaemonSettings, options, "daemon")
    configure_logging(settings.log_level)
    os.nice(NICENESS)
    return asyncio.run(_serve(settings))


async def _serve(settings: DaemonSettings) -> int:
    node = DaemonNode(settings)
    await node.start()
    print(f"snapshotd daemon {settings.node_id} on {settings.socket_path}, bulk {node.bulk_address}", flush=True)
    try:
        await until_signal(node.fatal)
    finally:
        await node.stop()
    return 0
