"""`snapshotd bench`: what snapshotd costs on this machine, beside its floors and beside what people use instead."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import snapshotd
from snapshotd.errors import UsageError

MISSED_CODE = 1
"""Exit code of --check when a goal was missed or a part failed."""

INTERRUPTED_CODE = 130


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="PART,...", help="these parts only, by how their names begin")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed or a part fails")
    parser.add_argument("--short", action="store_true", help="small and quick: ratios only, judged widely")
    parser.add_argument("--scale", type=float, default=None, metavar="X", help="factor on all sizes (1; short: 0.1)")
    parser.add_argument("--list", action="store_true", help="name the parts, and run none")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write the results as JSON into DIR, too")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    bench, table = _load("bench"), _load("table")
    if options.list:
        print("\n".join(bench.names()))
        return 0
    scale = (0.1 if options.short else 1.0) if options.scale is None else options.scale
    if not 0 < scale <= 100:
        raise UsageError(f"--scale {scale:g} cannot be: it must be above 0 and at most 100")
    only = [word for word in options.only.split(",") if word]
    plan = bench.Plan(only=only, scale=scale, short=options.short)
    results = bench.run_parts(plan, lambda name: print(f"bench: {name}", file=sys.stderr, flush=True))
    text = json.dumps(results, indent=1)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"local-{time.strftime('%Y%m%d-%H%M%S')}.json"
        path.write_text(text + "\n", encoding="utf-8")
        print(f"bench: results in {path}", file=sys.stderr)
    if options.json:
        print(text)
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table.render(results))
    if name := results.get("interrupted"):
        print(f"bench: interrupted in {name}; what is above is of the parts before it", file=sys.stderr)
        return INTERRUPTED_CODE
    broken = bench.broken(results)
    for row in broken:
        print(f"bench: {row['part']}: {row['what']}: {row['verdict']}", file=sys.stderr)
    return MISSED_CODE if broken and options.check else 0


def _load(name: str) -> ModuleType:
    """A module of the benchmarks: in a wheel they are snapshotd.benchmarks, in a checkout they lie beside snapshotd."""
    if importlib.util.find_spec("snapshotd.benchmarks") is not None:
        return importlib.import_module(f"snapshotd.benchmarks.{name}")
    checkout = Path(snapshotd.__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "bench.py").is_file():
        raise UsageError("this installation has no benchmarks; install snapshotd's wheel, or use a checkout")
    return importlib.import_module(f"benchmarks.{name}")
