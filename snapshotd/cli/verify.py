"""`snapshotd verify PATH`: every digest, every element there exactly once; exit code 7 when not."""

from __future__ import annotations

import argparse
import json
import sys

from snapshotd.cli.convert import A_JOB, add_source, make_progress, place, rules_of
from snapshotd.errors import CorruptionError
from snapshotd.universal.compare import verify

_SHOWN = 50


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=f"a checkpoint of any format, or {A_JOB}")
    add_source(parser, "PATH")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    bar = make_progress("verifying")
    try:
        found = verify(place(options, options.path), options.source_format, bar, rules_of(options))
    finally:
        bar.close()
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        step = "" if found.step is None else f", step {found.step}"
        how = f"{found.digests} digests match" if found.digests else "all bytes are there (the format has no digests)"
        if found.format == "snapshot":
            how = "every chunk matches its digest"  # or it would not have been read
        good = "broken" if found.problems else how
        print(f"{options.path}: {found.format}{step}, {found.tensors} tensors, {found.nbytes} bytes: {good}")
        for line in found.problems[:_SHOWN]:
            print(f"  {line}", file=sys.stderr)
        if len(found.problems) > _SHOWN:
            print(f"  ... and {len(found.problems) - _SHOWN} more (--json has all)", file=sys.stderr)
    return CorruptionError.exit_code if found.problems else 0
