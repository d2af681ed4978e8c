"""`snapshotd diff A B`: two checkpoints of any formats, tensor by tensor, bit by bit; exit code 1 when they differ."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from dataclasses import asdict

from snapshotd.cli.convert import A_JOB, place, rules_of
from snapshotd.settings import ToolSettings, add_flags
from snapshotd.universal import readers
from snapshotd.universal.compare import Difference, diff

_SHOWN = 50


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="A", help=f"a checkpoint of any format, or {A_JOB}")
    parser.add_argument("other", metavar="B", help="another one")
    parser.add_argument("--rules", metavar="FILE", help="how ranks' parts make a whole: TOML, or a preset's name")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_flags(parser, ToolSettings)


def run(options: argparse.Namespace) -> int:
    rules = rules_of(options)
    with (
        closing(readers.read(place(options, options.one), rules=rules, idle_rules=True)) as one,
        closing(readers.read(place(options, options.other), rules=rules, idle_rules=True)) as other,
    ):
        one.check()
        other.check()
        found = diff(one, other)
    if options.json:
        same = sum(1 for tensor in one.tensors) - sum(1 for item in found if item.kind and item.what != "extra")
        print(json.dumps({"equal": not found, "same": same, "differences": [asdict(item) for item in found]}, indent=2))
        return 1 if found else 0
    if not found:
        print(f"equal: {len(one.tensors)} tensors in every bit, and all else")
        return 0
    for item in found[:_SHOWN]:
        print(_line(item))
    if len(found) > _SHOWN:
        print(f"... and {len(found) - _SHOWN} more (--json has all)")
    return 1


def _line(item: Difference) -> str:
    name = f"{item.kind} of {item.name}: " if item.name else ""
    far = "" if item.max_abs is None else f", at most {item.max_abs:g} apart"
    return f"{item.what}: {name}{item.detail}{far}"
