"""`snapshotd convert SRC DST --to FORMAT`: any checkpoint into another format, streamed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from snapshotd.settings import ToolSettings, add_flags, load
from snapshotd.sizes import parse_bytes
from snapshotd.universal.convert import DTYPE_NAMES, Report, convert, parse_layout
from snapshotd.universal.places import Place, place_of
from snapshotd.universal.readers import FORMATS as SOURCES
from snapshotd.universal.rules import Rules, load_rules
from snapshotd.universal.stream import DEFAULT_MEMORY, Progress, Settings
from snapshotd.universal.writers import FORMATS as TARGETS

_LINE_EVERY_S = 10.0
A_JOB = "job:NAME[@STEP], a snapshot in a running job's memory"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=f"a checkpoint's directory or file, or {A_JOB}")
    parser.add_argument("target", metavar="DST", help="a directory that does not exist, or is empty (a file for torch)")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format to write")
    add_source(parser, "SRC")
    parser.add_argument("--layout", metavar="SPEC", help="parallel layout of the target, as in dp=2,tp=4,pp=2")
    parser.add_argument("--dtype", choices=[*DTYPE_NAMES, *DTYPE_NAMES.values()], help="of the model's weights")
    parser.add_argument("--only", choices=("model", "optimizer"), help="convert a part")
    add_buffers(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    parser.add_argument("--strict", action="store_true", help="refuse when the target cannot hold everything")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_source(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that say how a source is read, the same for all commands that read one."""
    add_flags(parser, ToolSettings)
    parser.add_argument(
        "--from", dest="source_format", default="auto", choices=("auto", *SOURCES), help=f"the format of {name}"
    )
    parser.add_argument("--rules", metavar="FILE", help="how ranks' parts make a whole: TOML, or a preset's name")


def add_buffers(parser: argparse.ArgumentParser) -> None:
    """The options that say how much memory and how many threads read large files."""
    parser.add_argument("--memory", default=str(DEFAULT_MEMORY), metavar="SIZE", help="for buffers (default 512MiB)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: the cores, at most 4")


def place(options: argparse.Namespace, source: str) -> Place:
    """Where the source is that an argument names."""
    return place_of(source, lambda: load(ToolSettings, options, "tools"))


def rules_of(options: argparse.Namespace) -> Rules | None:
    """The rules that ``--rules`` names."""
    return load_rules(options.rules) if options.rules else None


def run(options: argparse.Namespace) -> int:
    bar = make_progress("converting")
    settings = Settings(
        memory_bytes=parse_bytes(options.memory), threads=options.threads, resume=options.resume, progress=bar
    )
    try:
        report = convert(
            place(options, options.source),
            options.target,
            to=options.to,
            source_format=options.source_format,
            layout=parse_layout(options.layout),
            rules=rules_of(options),
            dtype=options.dtype,
            only=options.only,
            strict=options.strict,
            dry_run=options.dry_run,
            settings=settings,
        )
    finally:
        bar.close()
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    return 0


class ProgressBar:
    """A bar on stderr where that is a terminal, else a line every ten seconds. Callable as stream.Progress."""

    def __init__(self, verb: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.verb = verb
        self.clock = clock
        self.began = self.spoke = clock()
        self.bar: Any = None
        self.task: Any = None

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._draw(done, total)
            return
        now = self.clock()
        if now - self.spoke >= _LINE_EVERY_S:
            self.spoke = now
            rate = done / max(now - self.began, 1e-9)
            left = (total - done) / max(rate, 1)
            print(
                f"{self.verb}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _draw(self, done: int, total: int) -> None:
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.bar = Progress(self.verb, *columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.verb, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total)


def make_progress(verb: str) -> ProgressBar:
    bar = ProgressBar(verb)
    _: Progress = bar
    return bar


def _show(report: Report) -> None:
    done = "would be converted" if report.dry_run else "converted"
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    step = "" if report.step is None else f", step {report.step}"
    print(f"{done}: {report.source_format} to {report.target_format}{step}, {report.nbytes} bytes ({kinds})")
    for line in report.lost:
        print(f"not kept: {line}", file=sys.stderr)
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
