"""A job whose ranks all live and end no step: nothing dies, so only its own pace tells."""

from __future__ import annotations

from dataclasses import replace

from tests.coordinator.bench import SETTINGS, Bench, running

HANGS = replace(SETTINGS, hang_factor=10.0, hang_least_s=3.0, node_lease_s=1e6, agent_lease_s=1e6)


def training(settings: object = HANGS) -> Bench:
    """Six steps of half a second."""
    bench = running(settings)  # type: ignore[arg-type]
    for step in range(6):
        bench.commit(step)
        bench.tick(0.5)
    return bench


def test_a_rank_that_hangs_is_named_and_the_workers_are_left_alone() -> None:
    bench = training()
    bench.sealed("n0", 6, 0)
    bench.tick(4.9)
    assert "" == bench.job["hung"]
    bench.tick(0.2)
    assert "no step has ended for 5 s, where one takes 0.5 s" in bench.job["hung"]
    assert bench.job["hung"].endswith("the last is 6, behind are rank 1")
    assert bench.to_agent("a0", "restart") is None
    bench.tick(60.0)
    assert 1 == sum("no step has ended" in note for note in bench.notes)
    bench.sealed("n1", 6, 1)
    bench.sealed("n1", 7, 1)
    assert "" == bench.job["hung"]
    assert "goes on: step 7 is done" in bench.notes


def test_the_workers_of_a_hung_job_are_restarted_where_that_is_asked_for() -> None:
    bench = training(replace(HANGS, hang_restart=True))
    bench.tick(5.1)
    assert "no step has ended for 6 s" in bench.to_agent("a0", "restart").reason
    assert bench.to_agent("a1", "restart") is not None


def test_what_never_hangs() -> None:
    short = training(replace(HANGS, hang_least_s=300.0))
    off = training(replace(HANGS, hang_factor=0.0))
    new = running(HANGS)
    new.commit(0)
    for bench in (short, off, new):
        bench.tick(100.0)
        assert "" == bench.job["hung"]
