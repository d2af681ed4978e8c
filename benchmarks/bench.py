"""
Run the parts one after the other, each in a process of its own, and collect their rows.

A part that fails, hangs or is killed leaves a row that says so, and the others go on. Whatever a part has started or
left in tmpfs is taken away before the next one begins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotd import __version__
from snapshotd.errors import UsageError

from . import parts
from .processes import adopt_orphans, end_descendants, make_directory
from .rows import FAILED, MISSED, Row

__all__ = ["Plan", "broken", "names", "run_parts", "whole_run"]

PART_S, SHORT_PART_S = 600.0, 100.0
WHOLE_S = 840.0
"""A whole run is to be over after so long, where the machine lets it: a quarter of an hour with its set-up."""

_PACE_MIN = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. `only`: parts by name or by how it begins; none: all but those that stand apart."""

    only: Sequence[str] = ()
    scale: float = 1.0
    short: bool = False


def names() -> list[str]:
    """All parts, in the order of the table."""
    found = [module.name for module in pkgutil.iter_modules(parts.__path__)]
    return sorted(found, key=lambda name: (_goal(name), name))


def whole_run() -> list[str]:
    """The parts of a run that names none: not those with `APART = True`, which have a run of their own."""
    return [name for name in names() if not re.search(r"^APART = True$", _text(name), re.MULTILINE)]


def run_parts(plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """
    The results: what machine, what plan, all rows. `progress` hears the name of each part before it begins.

    Of a run that is interrupted, the rows of the parts that were done, and `interrupted`: in which part.
    """
    chosen = _chosen(plan.only)
    adopt_orphans()
    signal.signal(signal.SIGTERM, _interrupt)
    home = make_directory()
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    interrupted = {}
    try:
        for index, name in enumerate(chosen):
            interrupted = {"interrupted": name}
            progress(name)
            began = time.monotonic()
            rows += _run_part(name, plan, home / name, 1.0 if plan.only else _pace(seconds, chosen[index:]))
            seconds[name] = round(time.monotonic() - began, 1)
        interrupted = {}
    except KeyboardInterrupt:
        if not rows:
            raise
    finally:
        end_descendants()
        shutil.rmtree(home, ignore_errors=True)
    return {
        **interrupted,
        "machine": machine(),
        "scale": plan.scale,
        "short": plan.short,
        "seconds": seconds,
        "rows": rows,
    }


def broken(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that must not be: goals missed, parts that failed."""
    return [row for row in results["rows"] if row.get("verdict") in (MISSED, FAILED)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)):
        cpu = match[1]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "snapshotd": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _chosen(only: Sequence[str]) -> list[str]:
    if not only:
        return whole_run()
    known = names()
    for word in only:
        if not any(name.startswith(word) for name in known):
            raise UsageError(f"there is no part {word!r}; there are {', '.join(known)}")
    return [name for name in known if name.startswith(tuple(only))]


def _pace(done: dict[str, float], left: Sequence[str]) -> float:
    """
    What share of the time that parts give their rounds there is for those that are left, so that the run is over in
    time: all of it, unless the parts that are done took longer than they do in a quiet hour.
    """
    expected_s = sum(_number(name, "SECONDS", 10) for name in left)
    slowness = sum(done.values()) / sum(_number(name, "SECONDS", 10) for name in done) if done else 1.0
    pace = (WHOLE_S - sum(done.values())) / (expected_s * max(1.0, slowness))
    return round(min(1.0, max(_PACE_MIN, pace)), 2)


def _goal(name: str) -> int:
    return _number(name, "GOAL", 99)


def _number(name: str, constant: str, default: int) -> int:
    match = re.search(rf"^{constant} = (\d+)$", _text(name), re.MULTILINE)
    return int(match[1]) if match else default


def _text(name: str) -> str:
    """The part's source: importing it may cost seconds, and may fail."""
    spec = importlib.util.find_spec(f"{parts.__name__}.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _run_part(name: str, plan: Plan, directory: Path, pace: float) -> list[dict[str, Any]]:
    directory.mkdir()
    ours, theirs = os.pipe()
    folders = os.pathsep.join(parts.__path__)
    arguments = [name, folders, str(directory), str(plan.scale), str(int(plan.short)), str(pace), str(theirs)]
    log = directory.parent / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=(theirs,),
            start_new_session=True,
        )
    os.close(theirs)
    limit_s = SHORT_PART_S if plan.short else PART_S
    late = threading.Timer(limit_s, process.kill)
    late.daemon = True  # who interrupts the run does not wait for it
    late.start()
    with os.fdopen(ours, encoding="utf-8") as pipe:
        rows = [json.loads(line) for line in pipe]
    code = process.wait()
    overdue = late.finished.is_set()
    late.cancel()
    end_descendants()
    if code:
        why = f"was stopped after {limit_s:.0f} s" if overdue else f"ended with code {code}"
        rows.append(Row.failed(name, f"{why}: {_last_words(log)}").judged(name, short=plan.short).as_json())
        print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    return rows


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "(it said nothing)"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
