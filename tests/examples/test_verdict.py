"""The verdict of the demo: a difference of one bit must never be called equal."""

import json

import pytest

from examples.demo.records import Loss, Run, Start, Summary, Tail, parse_lines
from examples.demo.verdict import judge, world_change

STEPS = 4


def loss(step, bits="0x1.8p+1", world=4, time=0.0):
    return Loss(step=step, world=world, bits=bits, time=time)


def start(first, world=4, time=0.0):
    return Start(first=first, world=world, time=time)


def summary(**changes):
    tensors = {"model.w": "F32 [2] aa", "optimizer.w.exp_avg": "F32 [2] bb"}
    return Summary(tensors={**tensors, **changes}, values={"scheduler": {"last_epoch": 4}})


def run(lines=None, final=None, states=None):
    lines = lines if lines is not None else [start(0), *(loss(step) for step in range(STEPS))]
    return Run(lines=tuple(lines), final=final or summary(), states=states or {})


def failed(disturbed, undisturbed):
    return {check.name for check in judge(disturbed, undisturbed, steps=STEPS) if not check.equal}


def test_two_equal_runs_are_equal():
    assert failed(run(), run()) == set()


def test_a_run_with_steps_done_again_is_equal():
    again = run([start(0), loss(0), loss(1), start(1), loss(1), loss(2), loss(3)])
    assert failed(again, run()) == set()


@pytest.mark.parametrize(
    ("disturbed", "names"),
    [
        (run(final=summary(**{"model.w": "F32 [2] ab"})), {"parameters"}),
        (run(final=summary(**{"optimizer.w.exp_avg": "F32 [2] bc"})), {"optimizer"}),
        (run(final=summary(**{"optimizer.w.more": "F32 [2] bb"})), {"optimizer"}),
        (run(final=Summary(tensors=summary().tensors, values={})), {"scheduler"}),
        (run([start(0), loss(0), loss(1), loss(2), loss(3, "0x1.8000000000001p+1")]), {"losses"}),
        (run([start(0), loss(0), loss(1), loss(3)]), {"losses", "every step"}),
        (run([start(0), loss(0), loss(1, "0x1p+1"), start(1), loss(1), loss(2), loss(3)]), {"repeated steps"}),
    ],
)
def test_each_difference_is_found_and_named(disturbed, names):
    assert failed(disturbed, run()) == names


def test_nothing_to_compare_is_a_failure():
    """A run that died before it wrote anything must not pass because two empty records are equal."""
    nothing = Run(lines=(), final=None, states={})
    assert failed(nothing, nothing) == {"every step", "losses", "state"}
    empty = Summary(tensors={}, values={})
    assert {"parameters", "optimizer", "scheduler"} <= failed(run(final=empty), run(final=empty))


def test_another_world_size_compares_the_state_at_the_restored_step():
    lines = [start(0), loss(0), loss(1), start(2, world=3), loss(2, "0x1p+0", world=3), loss(3, "0x1p+0", world=3)]
    other = summary(**{"model.w": "F32 [2] zz"})
    disturbed = run(lines, final=other, states={2: summary()})
    assert world_change(disturbed) == start(2, world=3)
    assert failed(disturbed, run(states={2: summary()})) == set()
    assert failed(disturbed, run(states={2: other})) == {"parameters"}
    assert failed(disturbed, run()) == {"state"}


def test_a_line_that_is_still_being_written_is_read_later(tmp_path):
    path = tmp_path / "run.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    whole = json.dumps({"step": 0, "loss": (1.5).hex(), "world": 4, "time": 1.0}) + "\n"
    path.write_text(whole + whole[:9])
    assert tail.read() == [loss(0, (1.5).hex(), time=1.0)]
    with path.open("a") as file:
        file.write(whole[9:])
    assert tail.read() == [loss(0, (1.5).hex(), time=1.0)]


def test_a_line_that_is_none_is_refused():
    with pytest.raises(ValueError):
        list(parse_lines(["{"]))
