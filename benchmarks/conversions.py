"""
Converters side by side: ours and the formats' own, on a checkpoint that the format's framework has just written.

Each is timed as a whole command, and behind its start and imports; with the memory of its largest process, and with
what it had on the disk besides its output. The floor is `cp` of the same bytes, warm. All of it lies in tmpfs.

DeepSpeed's tools run in an environment of their own: SNAPSHOTD_BENCH_DEEPSPEED names its Python (`make bench-convert`).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import psutil

from .figures import Series
from .processes import BenchError, die_with_parent
from .rows import Row
from .run import Run

__all__ = ["DCP", "DEEPSPEED", "ZERO", "Source", "compare", "compare_all"]

DEEPSPEED = "SNAPSHOTD_BENCH_DEEPSPEED"

_MAKERS = Path(__file__).resolve().parent / "makers"
_SAMPLE_S = 0.005
_SPACE = 5
"""Free memory that is asked for, times the checkpoint: it lies there, with what a tool writes, and its temporaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How a checkpoint is made, and which tools take it: their names in makers/tool.py, and arguments."""

    what: str
    script: str
    before: tuple[str, ...]
    tools: Mapping[str, tuple[str, ...]]
    deepspeed: bool = False


DCP = (
    Source(
        what="DCP, 4 ranks",
        script="dcp.py",
        before=("4",),
        tools={"dcp_to_torch_save": ("TARGET",), "dcp_load": ("2", "PORT")},
    ),
)
ZERO = tuple(
    Source(
        what=f"ZeRO-{stage}, 2 ranks",
        script="zero.py",
        before=(stage, "2"),
        tools={"ds_to_universal": ("TARGET",), "zero_to_fp32": ("TARGET",)},
        deepspeed=True,
    )
    for stage in ("1", "3")
)


@dataclass(slots=True)
class _Found:
    inner: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    temporary: list[float] = field(default_factory=list)


def compare_all(run: Run, sources: Sequence[Source], nbytes: float, *, at_most: float) -> Iterator[Row]:
    """Rows for a checkpoint of each of `sources`, one after the other."""
    for source in sources:
        if run.short:
            yield Row.note(source.what, "not in the short form: making the checkpoint takes longer than that")
        else:
            yield from compare(run, source, run.size(nbytes), at_most=at_most)


def compare(run: Run, source: Source, nbytes: int, *, at_most: float) -> Iterator[Row]:
    """Rows for one checkpoint of about `nbytes`; the goal of the whole command is `at_most` times `cp`."""
    python = os.environ.get(DEEPSPEED, "") if source.deepspeed else sys.executable
    if not python:
        yield Row.note(source.what, f"DeepSpeed's tools are not here: make bench-convert, or {DEEPSPEED}=PYTHON")
        return
    room = min(shutil.disk_usage(run.directory).free, psutil.virtual_memory().available)
    if room < _SPACE * nbytes:
        yield Row.note(source.what, f"{_SPACE * nbytes / 1e9:.1f} GB of tmpfs are needed, {room / 1e9:.1f} GB are free")
        return
    checkpoint = run.directory / "checkpoint"
    _call([python, source.script, *source.before, str(nbytes), str(checkpoint), str(_free_port())], _MAKERS)
    size = _bytes_of(checkpoint)
    found = {"ours": _Found(), **{tool: _Found() for tool in source.tools}}
    ways = {"cp": lambda: _copy(checkpoint, run.directory / "out")}
    ways["ours"] = lambda: _tool(sys.executable, "snapshotd", checkpoint, ("TARGET", "universal"), found["ours"])
    for tool, arguments in source.tools.items():
        ways[tool] = lambda tool=tool, arguments=arguments: _tool(python, tool, checkpoint, arguments, found[tool])
    series = run.rounds(ways, rounds=5, within_s=100, warm=0)
    peers = {tool: series[tool] for tool in source.tools}
    label = f"{source.what}, {size / 1e9:.2f} GB"
    floor, ours = series["cp"], series["ours"]
    yield Row.cost(f"{label}: whole command", ours, floor, at_most=at_most, against="cp", nbytes=size, peers=peers)
    inner = {name: Series(tuple(one.inner)) for name, one in found.items()}
    mine = inner.pop("ours")
    yield Row.cost(f"{label}: without start", mine, floor, at_most=None, against="cp", peers=inner)
    best = min(peers, key=lambda tool: peers[tool].median)
    yield Row.speed(f"{label}: beside the fastest tool", ours, peers[best], at_least=1.0, against=best)
    memory = {name: Series(tuple(one.memory)) for name, one in found.items()}
    mine = memory.pop("ours")
    least = min(memory, key=lambda tool: memory[tool].median)
    yield Row.cost(
        f"{label}: memory at its peak", mine, memory[least], at_most=1.0, against=least, unit="B", peers=memory
    )
    extra = {name: Series(tuple(one.temporary)) for name, one in found.items()}
    yield Row.shown(f"{label}: temporary disk", extra.pop("ours"), unit="B", peers=extra)
    shutil.rmtree(checkpoint)


def _copy(checkpoint: Path, target: Path) -> float:
    began = perf_counter()
    subprocess.run(["cp", "-r", str(checkpoint), str(target)], check=True)
    seconds = perf_counter() - began
    shutil.rmtree(target)
    return seconds


def _tool(python: str, name: str, checkpoint: Path, arguments: tuple[str, ...], found: _Found) -> float:
    """One run of a tool in a process of its own; returns the seconds of the whole command."""
    target = checkpoint.parent / "out"
    words = [{"TARGET": str(target), "PORT": str(_free_port())}.get(word, word) for word in arguments]
    with _Disk(checkpoint.parent) as disk:
        began = perf_counter()
        output, usage = _call([python, str(_MAKERS / "tool.py"), name, str(checkpoint), *words], _MAKERS)
        seconds = perf_counter() - began
    found.inner.append(float(output.rpartition("seconds=")[2]))
    found.memory.append(usage * 1024.0)
    found.temporary.append(max(0.0, disk.peak - _bytes_of(target)))
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    for left in checkpoint.parent.glob("latest_universal"):
        left.unlink()
    return seconds


def _call(command: list[str], folder: Path) -> tuple[str, int]:
    """Run it to its end; returns its output, and the KiB of its largest process. BenchError when it fails."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with code {process.returncode}: {output.strip()[-300:]}")
    return output, usage.ru_maxrss


class _Disk:
    """The most that a file system held more than at the beginning, sampled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._first = self._used()
        self.peak = 0

    def __enter__(self) -> _Disk:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._used() - self._first)
            if self._ended.wait(_SAMPLE_S):
                return

    def _used(self) -> int:
        found = os.statvfs(self._path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def _bytes_of(path: Path) -> int:
    """Bytes on the disk, in whole blocks, as the file system counts them."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()] if path.exists() else []
    return sum(file.stat().st_blocks * 512 for file in files)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
