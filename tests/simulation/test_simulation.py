"""
Thousands of schedules of faults through the production cores.

If one of these fails, somebody would have lost training state, or got wrong bytes, or hung. To look at a seed:
`python -m tests.simulation.run --seeds 1 --start SEED --log`. A seed that found a bug goes to known_bugs.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.checks import InvariantBroken
from tests.simulation.faults import FAULTS_MIN
from tests.simulation.world import World

SEEDS = int(os.environ.get("SNAPSHOTD_SIM_SEEDS", "240"))
START = int(os.environ.get("SNAPSHOTD_SIM_START", "0"))
CHUNK = 40

# Situations that a run of all the default seeds must have reached; else the simulator has lost its teeth.
PROBES = (
    "abandon",
    "coordinator_crash",
    "crash_between_persist_and_send",
    "decoded",
    "doubled",
    "durable",
    "fallback_kept",
    "fault_bit_rot",
    "fault_daemon_crash",
    "fault_new_node",
    "fault_node_loss",
    "fault_parity_rot",
    "fault_partition",
    "fault_slow_node",
    "fault_worker_crash",
    "forgotten",
    "fresh",
    "memory",
    "node_overwritten_uncommitted",
    "node_parity_failures",
    "node_rebuild_failures",
    "node_slots_beside_held",
    "node_stale_messages",
    "persisted",
    "rebuilt_parity",
    "rebuilt_slot",
    "refused",
    "reordered",
    "restore_retried",
    "resume",
    "uncommitted_preferred",
)
_REACHED: Counter[str] = Counter()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(START, START + SEEDS, CHUNK))
def test_no_schedule_breaks_an_invariant(first: int) -> None:
    for seed in range(first, min(first + CHUNK, START + SEEDS)):
        world = World(seed).run()
        assert len(world.faults.done) >= FAULTS_MIN
        _REACHED.update(world.probes)


def test_rare_situations_are_reached() -> None:
    if not _REACHED or SEEDS < 240:
        pytest.skip("needs the default seeds in the same run")
    assert [name for name in PROBES if not _REACHED[name]] == []


def test_a_seed_replays_exactly() -> None:
    """A failing seed that does not fail again cannot be debugged."""
    for seed in (3, 25, 101):
        assert World(seed).run().clock.trace == World(seed).run().clock.trace


def test_a_seed_replays_whatever_the_hash_seed() -> None:
    traces = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.simulation.run", "--seeds", "1", "--start", "28"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
        traces.add(re.findall(r"^trace (\w+)$", output, re.MULTILINE)[0])
    assert len(traces) == 1


def test_known_bugs_stay_fixed() -> None:
    text = (Path(__file__).parent / "known_bugs.md").read_text()
    seeds = [int(seed) for seed in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert seeds
    for seed in seeds:
        try:
            World(seed).run()
        except InvariantBroken as error:
            pytest.fail(f"a known bug is back: {error}")
