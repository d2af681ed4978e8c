"""
Real kills: every scenario of scenarios.py, with real launchers, daemons, coordinator and workers.

Scenarios spend much of their time waiting for leases, so three run at a time (FAULTS_JOBS), in the order of the tests.
FAULTS_KEEP=1 keeps their directories in /dev/shm.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster, Options
from tests.faults.notes import SCRIPTS, Notes, reference
from tests.faults.processes import Zygotes
from tests.faults.scenarios import SCENARIOS
from tests.faults.story import Player, Scenario

JOBS = int(os.environ.get("FAULTS_JOBS", "3"))


class Stage:
    """Runs scenarios ahead of their tests, a few at a time."""

    def __init__(self) -> None:
        self._zygotes = Zygotes()
        self._pool = ThreadPoolExecutor(JOBS, thread_name_prefix="scenario")
        self._futures: dict[str, Future[float]] = {}
        self._references: dict[tuple[str, ...], list[Notes]] = {}
        self._lock = threading.Lock()
        self._closing = False

    def announce(self, scenarios: list[Scenario]) -> None:
        for scenario in scenarios:
            self._futures[scenario.name] = self._pool.submit(self._run, scenario)

    def result(self, scenario: Scenario) -> float:
        """The seconds that the scenario took; raises what went wrong."""
        return self._futures[scenario.name].result()

    def close(self) -> None:
        self._closing = True
        self._pool.shutdown(cancel_futures=True)
        self._zygotes.close()

    def _run(self, scenario: Scenario) -> float:
        begin = time.monotonic()
        assert not self._closing
        cluster = Cluster(self._zygotes, scenario.options)
        player = Player(scenario, cluster)
        trouble: list[str] = []
        try:
            player.play()
            player.judge(self.reference)
            trouble = cluster.close(orderly=True)
            assert not trouble, "; ".join(trouble)
        except BaseException as error:
            logs = cluster.logs()
            cluster.close(orderly=False)
            raise AssertionError(f"{error}\n\n{_told(cluster.notes())}\n{logs}") from error
        finally:
            cluster.remove()
        return time.monotonic() - begin

    def reference(self, options: Options) -> list[Notes]:
        """The notes of an undisturbed run of these options, made once."""
        world = options.nodes * options.workers
        with self._lock:  # one at a time: a reference run is used by many scenarios
            key = (*options.script_argv, str(world))
            if key not in self._references:
                self._references[key] = reference(self._zygotes, options.script_argv, world)
            return self._references[key]


def _told(notes: list[Notes]) -> str:
    return "\n".join(
        f"{one.node}: rank {one.rank} of {one.world}, steps {one.first} to {one.last}{', the end' if one.end else ''}"
        for one in notes
    )


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage()
    stage.announce([item.callspec.params["scenario"] for item in request.session.items if "scenario" in _params(item)])
    yield stage
    stage.close()


def _params(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


@pytest.mark.timeout(400)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_fault(scenario: Scenario, stage: Stage, record_property: Callable[[str, object], None]) -> None:
    record_property("seconds", round(stage.result(scenario), 2))


def test_there_are_enough_distinct_scenarios() -> None:
    assert len(SCENARIOS) >= 60
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    assert len({(repr(scenario.options), scenario.story) for scenario in SCENARIOS}) == len(SCENARIOS)


def test_the_judge_sees_a_single_wrong_bit(stage: Stage) -> None:
    """The oracle itself: notes of an undisturbed run pass, and no longer do when one loss or one tensor differs."""
    scenario = SCENARIOS[0]
    undisturbed = stage.reference(scenario.options)
    player = Player(scenario, Cluster.__new__(Cluster))
    player.judge_numbers(undisturbed, undisturbed)
    wrong = copy.deepcopy(undisturbed)
    wrong[1].losses[5] = float.hex(math.nextafter(float.fromhex(wrong[1].losses[5]), 0.0))
    with pytest.raises(AssertionError, match="losses of rank 1 .* 1 of .* differ: 5"):
        player.judge_numbers(wrong, undisturbed)
    wrong = copy.deepcopy(undisturbed)
    wrong[2].end["local"]["gain"] = "0" * 16
    with pytest.raises(AssertionError, match="final state of rank 2: 1 of .* differ: gain"):
        player.judge_numbers(wrong, undisturbed)
    wrong = copy.deepcopy(undisturbed)
    wrong[0].first, wrong[0].restored = 6, {"full": {**undisturbed[0].traces[5], "gain": "0" * 16}}
    with pytest.raises(AssertionError, match="whole state restored at 6: 1 of .* differ: gain"):
        player.judge_numbers(wrong, undisturbed)


def test_scripts_use_the_four_lines_only() -> None:
    for script in ("fsdp2.py", "ddp.py", "tp_fsdp2.py"):
        lines = (SCRIPTS / script).read_text().splitlines()
        assert sum(line.endswith("# snapshotd") for line in lines) == 4, script


def test_a_zygote_whose_tests_have_died_already_does_not_stay(tmp_path: Path) -> None:
    """The kernel tells of a parent's death only those that asked before it: killed during its imports, one stayed."""
    command = [sys.executable, "-m", "tests.faults.zygote", "snapshotd", str(tmp_path / "z.sock"), str(os.getppid())]
    ended = subprocess.run(command, cwd=SCRIPTS.parent.parent, capture_output=True, timeout=60)
    assert (0, b"") == (ended.returncode, ended.stderr)
    assert [] == list(tmp_path.iterdir())
