"""The frame of the benchmarks: figures, verdicts, and parts that fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import Row, Run, Sample, Series
from benchmarks import bench as runner
from benchmarks.figures import ratio_of
from benchmarks.rows import MET, MISSED, WITHIN

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snapshotd", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def left_in_tmpfs() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("snapshotd-bench-*")}


def steady(value: float) -> Series:
    return Series((value,) * 5)


def noisy(value: float) -> Series:
    return Series((value * 0.8, value * 0.9, value, value * 1.1, value * 1.3))


def test_series_of_the_same_rounds_are_subtracted_round_by_round() -> None:
    """Breaks: the noise of the machine, which met both, counts as ours."""
    without = Series((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    added = Series((1.25, 2.25, 3.25), (1.5, 1.5, 1.5)) - without
    assert Series((0.25, 0.25, 0.25), (0.5, 0.5, 0.5)) == added
    assert (2.0, 0.25) == (without.median, added.high)


def test_a_ratio_has_an_interval_that_holds_it() -> None:
    found = ratio_of(noisy(2.0), noisy(1.0))
    assert found.low <= found.value == 2.0 <= found.high
    again = ratio_of(noisy(2.0), noisy(1.0))
    assert found == again


def test_what_meets_both_sides_of_a_round_does_not_count() -> None:
    """Breaks: on a machine that becomes slower one's beginning is compared with the other's end."""
    slower = Series((1.0, 2.0, 4.0, 8.0, 16.0))
    found = ratio_of(slower * 3, slower)
    assert (3.0, 3.0, 3.0) == (found.value, found.low, found.high)
    found = ratio_of(Series((1.0, 3.0, 2.0)), Series((1.0, 1.5, 4.0)))
    assert (1.0, 0.5, 2.0) == (found.value, found.low, found.high)


@pytest.mark.parametrize("below", [(1.0, -1.0, 4.0), (0.0, 1.0, 1.0), (1.0, 1.0)])
def test_differences_and_other_rounds_are_compared_by_their_medians(below: tuple[float, ...]) -> None:
    """Breaks: one round whose difference noise has made zero or negative turns the ratio around."""
    assert ratio_of(Series((3.0, 2.0, 5.0)), Series(below)).value == 3.0


@pytest.mark.parametrize(
    ("row", "short", "verdict"),
    [
        (Row.speed("x", steady(1.0), steady(0.95), at_least=0.9, against="y"), False, MET),
        (Row.speed("x", steady(1.0), steady(0.88), at_least=0.9, against="y"), False, MISSED),
        (Row.speed("x", steady(1.0), Series((0.8, 0.88, 0.95)), at_least=0.9, against="y"), False, WITHIN),
        (Row.speed("x", steady(1.0), Series((0.2, 0.5, 0.95)), at_least=0.9, against="y"), False, MISSED),
        (Row.speed("x", steady(1.0), steady(0.7), at_least=0.9, against="y"), True, WITHIN),
        (Row.speed("x", steady(1.0), steady(0.5), at_least=0.9, against="y"), True, MISSED),
        (Row.cost("x", steady(1.2), steady(1.0), at_most=1.2, against="y"), False, MET),
        (Row.cost("x", steady(1.3), steady(1.0), at_most=1.2, against="y"), False, MISSED),
        (Row.cost("x", Series((1.15, 1.25, 1.3)), steady(1.0), at_most=1.2, against="y"), False, WITHIN),
        (Row.cost("x", steady(1.3), steady(1.0), at_most=None, against="y"), False, ""),
        (Row.limit("x", steady(0.003), at_most=0.002, unit="s"), False, MISSED),
        # A difference of steps that noise has made negative is nothing to be better than.
        (Row.cost("x", steady(0.2), steady(-0.1), at_most=1.0, against="y"), False, MISSED),
        (Row.cost("x", steady(0.2), steady(0.0), at_most=1.0, against="y"), False, MISSED),
        (Row.cost("x", steady(-0.2), steady(-0.1), at_most=1.0, against="y"), False, MET),
        (Row.cost("x", steady(-0.2), steady(0.1), at_most=1.0, against="y"), False, MET),
        (Row.limit("x", steady(0.003), at_most=0.002, unit="s"), True, ""),
        # The floor differs from itself by as much.
        (Row.speed("x", steady(1.0), steady(0.98), at_least=1.0, against="y", noise=0.03), False, WITHIN),
        (Row.speed("x", steady(1.0), steady(0.95), at_least=1.0, against="y", noise=0.03), False, MISSED),
        (Row.cost("x", steady(1.02), steady(1.0), at_most=1.0, against="y", noise=0.03), False, WITHIN),
        (Row.shown("x", steady(1.0), unit="s"), False, ""),
    ],
)
def test_a_goal_is_missed_beyond_the_spread_only(row: Row, short: bool, verdict: str) -> None:
    assert verdict == row.judged("part", short=short).verdict


@pytest.mark.parametrize(
    ("slowness", "left", "pace"),
    [
        (1.0, 1.0, 1.0),  # as in a quiet hour
        (0.5, 1.0, 1.0),  # a faster machine needs no more rounds
        (1.2, 0.5, (840 - 1.2 * 420) / (1.2 * 420)),
        (1.9, 0.3, 0.4),  # so late that it does not matter any more
    ],
)
def test_a_run_that_is_late_gives_its_rounds_less_time(
    monkeypatch: pytest.MonkeyPatch, slowness: float, left: float, pace: float
) -> None:
    seconds = {"first": round(840 * (1 - left)), "then": round(840 * left)}
    monkeypatch.setattr(runner, "_number", lambda name, constant, default: seconds[name])
    done = {"first": slowness * seconds["first"]} if left < 1 else {}
    assert runner._pace(done, ["then"]) == pytest.approx(pace, abs=0.005)


def test_each_part_of_a_whole_run_says_how_long_it_takes() -> None:
    assert [name for name in runner.whole_run() if runner._number(name, "SECONDS", -1) < 0] == []
    assert sum(runner._number(name, "SECONDS", 0) for name in runner.whole_run()) <= runner.WHOLE_S


def test_rounds_go_in_turns_there_and_back(tmp_path: Path) -> None:
    """Breaks: the second way always finds the caches warm, and wins."""
    order: list[str] = []

    def way(name: str, sample: Sample):
        return lambda: order.append(name) or sample

    with Run(tmp_path) as run:
        found = run.rounds({"a": way("a", Sample(1.0, 0.5)), "b": way("b", Sample(2.0, 0.5))}, rounds=3)
    assert ["a", "b", "a", "b", "b", "a", "a", "b"] == order
    assert Series((1.0,) * 3, (0.5,) * 3) == found["a"]
    assert (2.0,) * 3 == found["b"].values


def test_memory_is_whole_and_not_all_alike(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        memory = run.memory(10_000_001)
        assert 10_000_001 == memory.nbytes
        assert len({bytes(memory[i : i + 8]) for i in range(0, 10_000_000, 1_000_000)}) > 5
        memory.release()


def test_a_part_that_fails_or_is_killed_hides_no_other(tmp_path: Path) -> None:
    """Breaks: one bad part costs a quarter of an hour of figures, or leaves daemons and memory behind."""
    before = left_in_tmpfs()
    program = f"""
import json
from benchmarks import bench, parts
parts.__path__.append({str(tmp_path)!r})
plan = bench.Plan(only=["digest", "breaks", "dies"], scale=0.01, short=True)
results = bench.run_parts(plan, lambda name: None)
print(json.dumps(results["rows"]))
"""
    (tmp_path / "breaks.py").write_text(
        "from .. import Row, Series\n"
        "def rows(run):\n"
        "    run.memory(1 << 20)\n"
        "    run.start('sleeper', ['-c', 'import time; time.sleep(1000)'])\n"
        "    yield Row.shown('first', Series((1.0,)), unit='s')\n"
        "    raise ValueError('no more')\n"
    )
    (tmp_path / "dies.py").write_text(
        "import os, signal\n"
        "def rows(run):\n"
        "    run.start('sleeper', ['-c', 'import time; time.sleep(1000)'])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "    yield\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    rows = json.loads(done.stdout)
    digest = [row for row in rows if row["part"] == "digest"]
    assert digest == rows[: len(digest)] != []
    first, broken, died = rows[len(digest) :]
    assert ("breaks", "first", None) == (first["part"], first["what"], first.get("verdict"))
    assert ("breaks", "failed") == (broken["part"], broken["verdict"])
    assert "no more" in broken["text"]
    assert ("dies", "failed", "ended with code -9: (it said nothing)") == tuple(
        died[key] for key in ("part", "verdict", "text")
    )
    assert before == left_in_tmpfs()


def test_the_parts_are_known_and_a_wrong_name_is_said() -> None:
    listed = bench("--list").stdout.split()
    on_disk = {path.stem for path in (ROOT / "benchmarks" / "parts").glob("*.py")} - {"__init__"}
    assert on_disk == set(listed)
    wrong = bench("--only", "nothing")
    assert 2 == wrong.returncode
    assert "there is no part 'nothing'" in wrong.stderr


def test_who_interrupts_a_run_gets_what_was_done() -> None:
    before = left_in_tmpfs()
    command = [sys.executable, "-m", "snapshotd", "bench", "--json", "--scale", "0.01", "--only", "digest,latency"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        while (line := run.stderr.readline()) and line != "bench: latency\n":
            pass
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate()
    assert 130 == run.returncode
    assert "interrupted in latency" in err
    results = json.loads(out)
    assert ("latency", {"digest"}) == (results["interrupted"], {row["part"] for row in results["rows"]})
    assert before == left_in_tmpfs()


def test_results_are_json_with_all_rounds() -> None:
    done = bench("--only", "digest", "--short", "--scale", "0.01", "--json")
    results = json.loads(done.stdout)
    assert (0.01, True) == (results["scale"], results["short"])
    (row,) = [row for row in results["rows"] if row["what"] == "digests of a slot, one core"]
    assert len(row["ours"]["rounds"]) >= 3
    assert {"value", "low", "high"} == set(row["ratio"])


def test_the_command_does_not_import_torch() -> None:
    program = "import sys; from snapshotd.cli import main; main(['bench', '--list']); sys.exit('torch' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode
