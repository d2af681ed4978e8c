"""The demo's plan and its table."""

import pytest

from examples.demo.cluster import clean_environment
from examples.demo.faults import Outcome, plan
from examples.demo.records import Loss, Start, Tail
from examples.demo.report import PHASES, row
from examples.demo.watch import Picture, Watcher


def test_all_needs_one_spare():
    wanted = plan("all")
    assert wanted.faults == ("worker", "daemon", "coordinator", "node")
    assert (wanted.nodes, wanted.spares, wanted.nnodes, wanted.parity) == (4, 1, "4:4", 1)
    assert not wanted.changes_world


def test_none_is_a_run_without_faults():
    assert plan("none").faults == ()


def test_two_nodes_at_once_need_two_spares_and_two_parities():
    wanted = plan("worker,nodes2")
    assert (wanted.spares, wanted.parity) == (2, 2)


def test_shrink_and_grow_change_the_world():
    assert plan("worker,shrink").nnodes == "1:4"
    assert (plan("grow").nodes, plan("grow").nnodes) == (3, "3:4")
    assert plan("grow").changes_world


REFUSED = ["", "nodes", "worker,,x", "shrink,worker", "node,shrink", "node,grow", "shrink,shrink"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused(text):
    with pytest.raises(ValueError):
        plan(text)


def test_a_row_has_a_cell_for_each_column():
    outcome = Outcome(name="node", at_step=9)
    columns = 4 + len(PHASES)
    assert row(outcome)[1] == "never"
    assert len(row(outcome)) == columns
    outcome.struck_step = 9
    assert row(outcome)[2] == "all"
    assert len(row(outcome)) == columns
    outcome.survived, outcome.went_on_at, outcome.steps_lost, outcome.total_s = True, 9, 1, 4.25
    outcome.phases = {"detect": 2.0, "decode": 0.125}
    cells = row(outcome)
    assert len(cells) == columns
    assert cells[:4] == ["node", "9", "1", "2.00"]
    assert cells[-1] == "4.2"
    outcome.phases = {}
    assert set(row(outcome)[3:-1]) == {"-"}


def test_settings_of_the_surroundings_do_not_reach_the_demo():
    """A developer's SNAPSHOTD_SOCKET must not make all nodes of the demo share one daemon."""
    environ = {"PATH": "/bin", "SNAPSHOTD_SOCKET": "/x", "RANK": "3", "TORCHELASTIC_RUN_ID": "y"}
    assert set(clean_environment(environ)) == {"PATH", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"}


def test_the_step_after_a_restart_is_the_one_restored():
    """A fault must not be struck by the step count of the run that has just died."""
    picture = Picture()
    assert picture.step == -1
    picture.starts.append(Start(first=0, world=4, time=1.0))
    picture.losses.append(Loss(step=7, world=4, bits="0x1p+0", time=2.0))
    assert picture.step == 7
    picture.starts.append(Start(first=6, world=4, time=3.0))
    assert picture.step == 5


def test_a_commit_of_an_old_epoch_is_no_protection():
    committed = {"epoch": 1, "step": 4, "level": "protected"}
    picture = Picture(status={}, job={"epoch": 2, "margin": 1, "committed": committed})
    assert not picture.protected()
    picture.job["committed"]["epoch"] = 2
    assert picture.protected()
    picture.status = None
    assert not picture.protected()


def test_the_watcher_keeps_what_it_knew_while_nobody_answers(tmp_path):
    watcher = Watcher(lambda: "127.0.0.1:1", "gpt", Tail(tmp_path / "run.jsonl"))
    watcher.picture.job = {"epoch": 3}
    watcher.tell("killed it")
    watcher.look()
    assert watcher.picture.status is None
    assert watcher.picture.epoch == 3
    assert [event.text for event in watcher.picture.events] == ["killed it"]
