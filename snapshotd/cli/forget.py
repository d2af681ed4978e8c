"""`snapshotd forget --job JOB`: free a job's snapshots and lift a refusal."""

from __future__ import annotations

import argparse

from snapshotd.calls import ask
from snapshotd.settings import ToolSettings, add_flags, load
from snapshotd.v1 import control_pb2 as control


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job", required=True, help="the job's name (torchrun's --rdzv-id)")
    add_flags(parser, ToolSettings)


def run(options: argparse.Namespace) -> int:
    settings = load(ToolSettings, options, "tools")
    request = control.ForgetJobRequest(job=options.job)
    print(ask(settings, lambda stub: stub.ForgetJob(request, timeout=10)).message)
    return 0
