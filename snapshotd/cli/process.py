"""What the two long-running commands share: logging to stderr, and running until a signal."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from typing import Any

from snapshotd.errors import UsageError

__all__ = ["configure_logging", "until_signal"]


def configure_logging(level: str) -> None:
    """Log lines to stderr: time, level, logger, text. UsageError for a level that is none."""
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(f"--log-level {level!r} is not known; use DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s",
        datefmt="%H:%M:%S",
    )


async def until_signal(fatal: asyncio.Future[None]) -> None:
    """
    Return at SIGTERM or SIGINT; raise what `fatal` was given, if that comes first.

    What is there by now, modules above all, stays: the garbage collector never looks at it again.
    """
    gc.freeze()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    waiting = asyncio.ensure_future(stopped.wait())
    try:
        ends: set[asyncio.Future[Any]] = {waiting, fatal}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if fatal.done():
            fatal.result()
    finally:
        waiting.cancel()
