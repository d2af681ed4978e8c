"""
What a part gets: sizes, rounds in turns, memory in tmpfs, a training state, processes.

A part runs in a process of its own. What it makes through its `Run` is taken away at its end, however it ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snapshotd.mapping import map_new_file

from .cluster import Cluster
from .figures import Sample, Series
from .processes import Child, cpu_seconds

if TYPE_CHECKING:
    from .state import Training

__all__ = ["SETTLING_CAPTURES", "STATE_BYTES", "STATE_TENSORS", "Run"]

STATE_BYTES = 1_200_000_000
STATE_TENSORS = 592

SETTLING_CAPTURES = 5
"""Until then a job has layouts, slots and mappings."""

Way = Callable[[], "float | Sample | None"]


class Run:
    """
    One part's run.

    Attributes:
        short: the short form of CI: a second or two per row, ratios only.
        scale: factor on all sizes, at `size`.
        pace: factor on the time that rounds may take, where the run is late.
        directory: this part's own, in tmpfs.
    """

    def __init__(self, directory: Path, *, scale: float = 1.0, short: bool = False, pace: float = 1.0) -> None:
        self.directory = directory
        self.scale = scale
        self.pace = pace
        self.short = short
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ measuring

    def size(self, nbytes: float = STATE_BYTES) -> int:
        """That many bytes, scaled."""
        return max(1, round(nbytes * self.scale))

    def rounds(
        self,
        ways: Mapping[str, Way],
        *,
        rounds: int = 9,
        within_s: float = 30.0,
        pids: Iterable[int] = (),
        warm: int = 1,
    ) -> dict[str, Series]:
        """
        Run each way once per round, in turns, every other round backwards; returns a series per way.

        A way is timed unless it returns what it measured (a number, or a Sample). CPU seconds are those of this process
        and of `pids`. At least 3 rounds, then no more than fit into `within_s`; `warm` rounds before do not count.
        """
        pids = [os.getpid(), *pids]
        found: dict[str, list[float | Sample]] = {name: [] for name in ways}
        for _ in range(warm):
            for way in ways.values():
                way()
        least, most = (3, min(rounds, 5)) if self.short else (min(3, rounds), rounds)
        within_s = min(within_s, 3.0) if self.short else within_s * self.pace
        began = time.monotonic()
        for count in range(most):
            if count >= least and time.monotonic() - began > within_s:
                break
            names = list(ways) if count % 2 == 0 else list(reversed(ways))
            for name in names:
                found[name].append(_measure(ways[name], pids))
        return {name: Series.of(samples) for name, samples in found.items()}

    # ------------------------------------------------------------------ what is measured

    def memory(self, nbytes: int, *, fill: bool = True) -> memoryview:
        """Warm tmpfs memory, of the kind that slots have (a file of this part), with noise in it, or zeros."""
        path = self.directory / f"memory-{len(list(self.directory.glob('memory-*')))}"
        with path.open("w+b") as file:
            view = map_new_file(file.fileno(), nbytes)
        if fill:
            words = np.frombuffer(view, dtype=np.uint64, count=nbytes // 8)
            noise = np.random.default_rng(0).integers(1 << 63, size=min(len(words), 1 << 20), dtype=np.uint64)
            for begin in range(0, len(words), len(noise) or 1):
                part = words[begin : begin + len(noise)]
                np.add(noise[: len(part)], np.uint64(begin), out=part)
        return view

    def training(self, nbytes: float = STATE_BYTES, *, tensors: int = STATE_TENSORS, **more: Any) -> Training:
        """A GPT with AdamW whose whole state has about that many bytes, scaled (imports torch); see Training."""
        from .state import Training

        return Training(self.size(nbytes), tensors=tensors, **more)

    def cluster(self, nodes: int, **options: Any) -> Cluster:
        """A coordinator and that many daemons, serving; see Cluster for the options."""
        home = self.directory / f"cluster-{len(list(self.directory.glob('cluster-*')))}"
        return self._stack.enter_context(Cluster(home, nodes, **options))

    def start(self, name: str, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any) -> Child:
        """`python ARGUMENTS...` with its log in the part's directory; ended with the part."""
        child = Child(name, arguments, self.directory / f"{name}.log", env=os.environ if env is None else env, **more)
        self._stack.callback(child.end)
        return child

    def finally_do(self, undo: Callable[[], object]) -> None:
        """Call `undo` at the end of the part, last come first."""
        self._stack.callback(undo)


def _measure(way: Way, pids: Sequence[int]) -> Sample:
    cpu = cpu_seconds(pids[1:]) + time.process_time()
    began = time.perf_counter()
    found = way()
    elapsed = time.perf_counter() - began
    cpu = cpu_seconds(pids[1:]) + time.process_time() - cpu
    if isinstance(found, Sample):
        return found if found.cpu_s is not None else Sample(found.value, cpu)
    return Sample(elapsed if found is None else float(found), cpu)
