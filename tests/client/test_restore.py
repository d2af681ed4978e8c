"""
Decisions that are no snapshot, snapshots that do not fit, and daemons that answer late, wrong or not at all.
"""

from __future__ import annotations

import gc
import json
import sys
import threading

import pytest
import torch
from snapshotd_client import RestoreError, Snapshotter, StateLost
from snapshotd_client.direct import _spots
from snapshotd_client.fetch import Entry, Fetcher, Want, _Filling
from snapshotd_client.placement import place_plain
from snapshotd_client.settings import Settings
from torch import nn

from snapshotd.v1 import worker_pb2 as pb

KIND = pb.RestoreDecision


def captured(snapshotter, model, optimizer=None, **kwargs):
    snap = snapshotter(model, optimizer, **kwargs)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    return snap


def test_undecided_is_asked_again(daemon, snapshotter):
    """Breaks: a worker that starts before its peers starts at zero."""
    daemon.decision = KIND(kind=KIND.KIND_UNDECIDED, reason="waiting for rank 1")
    snap = snapshotter(nn.Linear(2, 2))
    results = []
    thread = threading.Thread(target=lambda: results.append(snap.restore()))
    thread.start()
    daemon.wait_for(lambda: daemon.hellos)
    daemon.decision = KIND(kind=KIND.KIND_FRESH)
    thread.join(20)
    assert results == [0]
    assert snap.last_restore["kind"] == "fresh"


def test_undecided_for_too_long_is_an_error_with_its_reason(daemon, snapshotter):
    """Breaks: training starts at zero because the coordinator was slow, and overwrites what there was."""
    daemon.decision = KIND(kind=KIND.KIND_UNDECIDED, reason="waiting for rank 1")
    snap = snapshotter(nn.Linear(2, 2), settings={"restore_timeout_s": 0.3})
    with pytest.raises(RestoreError, match="waiting for rank 1"):
        snap.restore()


def test_a_launcher_with_an_epoch_but_no_daemon_is_an_error():
    """Breaks: a node whose daemon did not start trains from zero beside nodes that resume."""
    settings = Settings(socket="/nonexistent/d.sock", job="t", epoch=3, restore_timeout_s=0.3)
    with Snapshotter(nn.Linear(2, 2), settings=settings) as snap, pytest.raises(RestoreError, match="nobody listens"):
        snap.restore()


def test_refused_is_exit_code_6(daemon, snapshotter, capsys):
    daemon.decision = KIND(kind=KIND.KIND_REFUSED, reason="three nodes were lost, two can be rebuilt")
    with pytest.raises(StateLost) as caught:
        snapshotter(nn.Linear(2, 2)).restore()
    assert caught.value.code == 6
    assert "three nodes were lost" in capsys.readouterr().err


def test_stale_worker_is_told_so(daemon):
    daemon.fatal = "epoch 3 is over"
    with (
        Snapshotter(nn.Linear(2, 2), settings=Settings(socket=daemon.path, job="t")) as snap,
        pytest.raises(RestoreError, match="epoch 3 is over"),
    ):
        snap.restore()


def test_models_that_do_not_fit_are_refused_by_name_and_left_untouched(daemon, snapshotter):
    """Breaks: half of another model's weights in this one."""
    captured(snapshotter, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3, dtype=torch.float64))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(RestoreError, match="0.weight has shape") as caught:
        snapshotter(other).restore()
    assert "model.2.bias is not in the snapshot" in str(caught.value)
    assert "SNAPSHOTD_JOB" in str(caught.value)
    assert all(map(torch.equal, before, other.parameters()))
    daemon.wait_for(lambda: daemon.dones)
    assert not daemon.dones[-1].ok
    wide = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.float64))
    with pytest.raises(RestoreError, match="float64 here, float32"):
        snapshotter(wide).restore()


def test_optimizers_that_do_not_fit_are_refused(snapshotter):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    captured(snapshotter, model, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(RestoreError, match="has 4 groups"):
        snapshotter(model, torch.optim.SGD(groups, lr=0.1)).restore()
    with pytest.raises(RestoreError, match="other parameters"):
        snapshotter(model, torch.optim.SGD([model[0].weight], lr=0.1)).restore()
    with pytest.raises(RestoreError, match="optim.1 .not in the snapshot"):
        snapshotter(model, [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]).restore()


@pytest.mark.parametrize("what", ["missing", "short", "link", "error", "few"])
def test_wrong_answers_are_errors_and_not_weights(daemon, snapshotter, what, monkeypatch):
    """Breaks: a confused daemon's bytes end up in the model."""
    captured(snapshotter, nn.Linear(3, 3))
    give = daemon._give

    def wrong(peer, request):
        ready = give(peer, request)
        path = daemon.folder / ready.paths[0]
        if what == "missing":
            path.unlink()
        elif what == "short":
            path.write_bytes(path.read_bytes()[:-1])
        elif what == "link":
            path.rename(f"{path}.real")
            path.symlink_to(f"{path}.real")
        elif what == "error":
            ready.error = "rank 2's slot is rotten"
        else:
            del ready.offsets[-1]
        return ready

    monkeypatch.setattr(daemon, "_give", wrong)
    with pytest.raises(RestoreError):
        snapshotter(nn.Linear(3, 3)).restore()


def test_snapshot_of_another_step_than_announced_is_refused(daemon, snapshotter, tmp_path, monkeypatch):
    """Breaks: a cached manifest gives stale state."""
    captured(snapshotter, nn.Linear(3, 3))
    monkeypatch.setattr(daemon, "_manifest", lambda step, rank, old=daemon._manifest: _other_step(old(step, rank)))
    with pytest.raises(RestoreError, match="says step 41"):
        snapshotter(nn.Linear(3, 3)).restore()


def _other_step(manifest):
    manifest["meta"] = json.dumps({**json.loads(manifest["meta"]), "step": 41})
    return manifest


def test_restore_survives_a_lost_connection(daemon, snapshotter, monkeypatch):
    """Breaks: a daemon that restarts in the middle of a restore ends the job."""
    model = nn.Linear(3, 3)
    captured(snapshotter, model)
    give, lost = daemon._give, []

    def cut(peer, request):
        if not lost:
            lost.append(1)
            peer.sock.shutdown(2)
        return give(peer, request)

    monkeypatch.setattr(daemon, "_give", cut)
    other = nn.Linear(3, 3)
    snap = snapshotter(other)
    assert snap.restore() == 1
    assert torch.equal(model.weight, other.weight)
    daemon.wait_for(lambda: daemon.dones and daemon.dones[-1].ok)


def test_a_daemon_that_was_started_anew_is_asked_first(daemon, snapshotter, monkeypatch):
    """Breaks: it learns the epoch's plan from the coordinator, and has nothing for a worker that is faster."""
    model = nn.Linear(3, 3)
    captured(snapshotter, model)
    give, decide = daemon._give, daemon._decide
    asked, refused = [], []

    def remember(peer):
        asked.append(peer)
        return decide(peer)

    def cut(peer, request):
        if len(asked) == 1:
            if peer in asked:
                peer.sock.shutdown(2)
            else:
                refused.append(request)
                return pb.RestoreReady(error="ask which state to restore first (RestoreQuery)")
        return give(peer, request)

    monkeypatch.setattr(daemon, "_decide", remember)
    monkeypatch.setattr(daemon, "_give", cut)
    other = nn.Linear(3, 3)
    assert snapshotter(other).restore() == 1
    assert torch.equal(model.weight, other.weight)
    assert [] == refused


def test_a_daemon_that_was_started_anew_and_decides_otherwise_is_an_error(daemon, snapshotter, monkeypatch):
    """Breaks: half of the weights are of one step, half of another."""
    captured(snapshotter, nn.Linear(3, 3))
    give = daemon._give

    def cut(peer, request):
        daemon.decision = pb.RestoreDecision(kind=pb.RestoreDecision.KIND_FRESH, reason="it has forgotten")
        peer.sock.shutdown(2)
        return give(peer, request)

    monkeypatch.setattr(daemon, "_give", cut)
    with pytest.raises(RestoreError, match=r"step 0 was being restored, .* FRESH: it has forgotten"):
        snapshotter(nn.Linear(3, 3)).restore()


def test_a_batch_is_given_back_when_its_last_copy_is_done():
    """Breaks: the daemon fills the next batch into memory that is still being copied from."""
    told = []

    class Link:
        session = 1

        def post(self, frame, session):
            told.append((frame.restore_release.batch_id, session))

    class Copy:
        def result(self):
            told.append("copied")

    fetcher = Fetcher(Link(), 0.0, 2, lambda: None)
    fetcher._end(_Filling(pb.RestoreReady(batch_id=7, local_bytes=5), 1, [Copy(), Copy()]))
    assert told == ["copied", "copied", (7, 1)]
    assert fetcher.local_bytes == 5


def test_immutable_extra_is_written_back_and_missing_ones_stay(snapshotter):
    captured(snapshotter, nn.Linear(2, 2), extra={"epoch": 7, "best": (1, 2.5)})
    extra = {"epoch": 0, "best": None, "new": [3]}
    snap = snapshotter(nn.Linear(2, 2), extra=extra)
    assert snap.restore() == 1
    assert {"epoch": 7, "best": (1, 2.5), "new": [3]} == extra == snap.extra


class Watching:
    """Says whether the garbage collector was on while it was loaded, and how soon threads took turns."""

    def __init__(self):
        self.enabled = None
        self.switch_s = None

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        self.enabled = gc.isenabled()
        self.switch_s = sys.getswitchinterval()


def test_a_default_device_is_not_that_of_our_own_tensors(daemon, snapshotter):
    """Breaks: a script with torch.set_default_device("cuda") trains, and cannot start again."""

    def extra(value):
        return {"small": torch.full((3,), value), "none": torch.zeros(0), "strided": torch.full((40, 30), value).t()}

    model, other, mine, theirs = nn.Linear(6, 5), nn.Linear(6, 5), extra(1.0), extra(2.0)
    strided = torch.zeros(2, 3).t()
    with torch.device("meta"):
        captured(snapshotter, model, extra=mine)
        assert 1 == snapshotter(other, extra=theirs).restore()
        piece = place_plain((3, 2), "rank").pieces[0]
        (spot,) = _spots([Want(Entry("w", "float32", (3, 2), "rank", "param"), piece, strided)], [])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "cpu" == spot.filled.device.type


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection_interrupts_a_restore_and_the_collector_is_as_before(snapshotter, enabled):
    """Breaks: each restore waits for a look at all objects of the training; or, afterwards, memory only grows."""
    captured(snapshotter, nn.Linear(2, 2), extra={"watching": Watching()})
    watching = Watching()
    snap = snapshotter(nn.Linear(2, 2), extra={"watching": watching})
    if not enabled:
        gc.disable()
    try:
        assert snap.restore() == 1
        assert (False, enabled) == (watching.enabled, gc.isenabled())
    finally:
        gc.enable()


@pytest.mark.parametrize("usual_s", [0.005, 0.0001])
def test_threads_take_turns_soon_in_a_restore_and_afterwards_as_before(snapshotter, usual_s):
    """Breaks: who has bytes to receive waits 5 ms for who asks for the next; or training's threads wake for nothing."""
    captured(snapshotter, nn.Linear(2, 2), extra={"watching": Watching()})
    watching = Watching()
    snap = snapshotter(nn.Linear(2, 2), extra={"watching": watching})
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(usual_s)
        assert snap.restore() == 1
        assert (min(usual_s, 0.0002), usual_s) == pytest.approx((watching.switch_s, sys.getswitchinterval()))
    finally:
        sys.setswitchinterval(before)


def test_layout_is_registered_right_after_a_restore(daemon, snapshotter):
    """Breaks: the first step after each recovery is not protected, because slots are made only then."""
    model = nn.Linear(2, 2)
    opt = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    captured(snapshotter, model, opt)
    count = len(daemon.layouts)
    other = nn.Linear(2, 2)
    snap = snapshotter(other, torch.optim.Adam(other.parameters()))
    assert snap.restore() == 1
    daemon.wait_for(lambda: len(daemon.layouts) == count + 1)
    assert daemon.layouts[count - 1].hash == daemon.layouts[count].hash
    snap.capture(1)
    assert snap.wait(20)
    snapshotter.sealed(1)
    assert count + 1 == len(daemon.layouts)
