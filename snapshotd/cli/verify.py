"""`snapshotd verify PATH`: every digest and CRC-32, every element there exactly once; exit code 7 when not."""

from __future__ import annotations

import argparse
import json
import sys

from snapshotd.cli.convert import A_JOB, add_buffers, add_source, make_progress, place, rules_of
from snapshotd.errors import CorruptionError
from snapshotd.sizes import parse_bytes
from snapshotd.universal.compare import verify
from snapshotd.universal.stream import Settings

_SHOWN = 50


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=f"a checkpoint of any format, or {A_JOB}")
    add_source(parser, "PATH")
    add_buffers(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    bar = make_progress("verifying")
    settings = Settings(memory_bytes=parse_bytes(options.memory), threads=options.threads, progress=bar)
    try:
        found = verify(place(options, options.path), options.source_format, settings, rules_of(options))
    finally:
        bar.close()
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        step = "" if found.step is None else f", step {found.step}"
        good = "broken" if found.problems else found.how
        print(f"{options.path}: {found.format}{step}, {found.tensors} tensors, {found.nbytes} bytes: {good}")
        for line in found.problems[:_SHOWN]:
            print(f"  {line}", file=sys.stderr)
        if len(found.problems) > _SHOWN:
            print(f"  ... and {len(found.problems) - _SHOWN} more (--json has all)", file=sys.stderr)
    return CorruptionError.exit_code if found.problems else 0
