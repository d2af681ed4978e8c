"""`snapshotd restore --job JOB [--step N] DIR`: write a job's snapshot, from memory or durable, into a directory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from snapshotd.daemon.held import held_snapshot
from snapshotd.daemon.persist import export_snapshot
from snapshotd.errors import UsageError
from snapshotd.settings import ToolSettings, add_flags, load


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job", required=True, help="the job's name (torchrun's --rdzv-id)")
    parser.add_argument("--step", type=int, default=None, help="which step (default: the newest that can be had)")
    parser.add_argument("directory", type=Path, help="a new or empty directory")
    add_flags(parser, ToolSettings)


def run(options: argparse.Namespace) -> int:
    settings = load(ToolSettings, options, "tools")
    directory: Path = options.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not an empty directory; choose another")
    if options.step is not None and options.step < 0:
        raise UsageError(f"--step {options.step} is below 0")
    began = time.monotonic()
    with held_snapshot(settings, options.job, options.step) as (plan, sources):
        durable = export_snapshot(plan, directory, sources)
    print(
        f"step {durable.step} of job {durable.job} (epoch {durable.epoch}, {durable.world_size} ranks) is in "
        f"{directory}; {time.monotonic() - began:.2f} s; {plan.reason}"
    )
    return 0
