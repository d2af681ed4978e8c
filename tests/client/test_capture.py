"""
The life of one capture: grants, fences, torn copies, daemons that come and go, forks, and the end of the process.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_daemon import FakeDaemon
from snapshotd_client import Snapshotter, copying
from snapshotd_client.settings import Settings
from torch import nn

from snapshotd import failpoints
from snapshotd.layout import CHUNK_BYTES, chunk_digests
from snapshotd.native import kernels
from snapshotd.v1 import worker_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


def job(seed=0, lr=0.1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, opt


def train(model, opt):
    model(torch.randn(4, 6)).square().sum().backward()
    opt.step()
    opt.zero_grad()


def reasons(daemon):
    return [pb.Skip.Reason.Name(skip.reason).removeprefix("REASON_") for skip in daemon.skips]


class Gate:
    """Holds the copy in its middle until ``open``."""

    def __init__(self, folder, site="client.mid_copy"):
        self.reached, self.go = folder / "reached", folder / "go"
        failpoints.configure(f"{site}=touch({self.reached})@1;{site}=wait({self.go})@1")

    def wait(self):
        while not self.reached.exists():
            threading.Event().wait(0.001)

    def open(self):
        self.go.touch()


def test_update_waits_for_the_copy(daemon, snapshotter, tmp_path, fence_waits):
    """Breaks: the optimizer changes parameters that are being copied, and the snapshot is half of each step."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    before = model[0].weight.detach().clone()
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    update = threading.Thread(target=train, args=(model, opt))
    update_waits = fence_waits(snap, update)
    update.start()
    assert update_waits.wait(20)
    gate.open()
    update.join()
    assert snap.wait(20)
    daemon.wait_for(lambda: 0 in daemon.sealed)
    assert not torch.equal(before, model[0].weight)
    assert before.numpy().tobytes() == daemon.sealed[0][0].tensor("model.0.weight").tobytes()
    assert snap.stats["stall_ns"] > 0


@pytest.mark.skipif(kernels() is None, reason="nothing was compiled; tests/native fails where it should be")
def test_the_daemon_is_told_the_digests_of_what_was_copied(daemon, snapshotter):
    """Breaks: each byte is read twice, by the hook and by the daemon; or the daemon records digests of other bytes."""
    model = nn.Linear(1000, 1000)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    snap = snapshotter(model, opt)
    for step in range(2):
        snap.capture(step)
        assert snap.wait(20)
        daemon.wait_for(lambda step=step: step in daemon.sealed)
        data = daemon.sealed[step][0].data
        (known,) = daemon.seals[step].digests
        count = len(known.digests) // 8
        assert known.first == 1
        assert count == 4_000_000 // CHUNK_BYTES - 1
        begin = CHUNK_BYTES
        assert known.digests == chunk_digests(data[begin : begin + count * CHUNK_BYTES], count * CHUNK_BYTES)
        with torch.no_grad():
            model.weight += 1


def test_without_compiled_code_the_daemon_is_told_no_digests(daemon, snapshotter, monkeypatch):
    """Breaks: where nothing could be compiled, or the processor is another, nothing is captured."""
    monkeypatch.setattr(copying, "kernels", lambda: None)
    model = nn.Linear(1000, 1000)
    snap = snapshotter(model, torch.optim.SGD(model.parameters(), lr=0.1))
    snap.capture(0)
    assert snap.wait(20)
    daemon.wait_for(lambda: 0 in daemon.sealed)
    assert not daemon.seals[0].digests
    assert model.weight.detach().numpy().tobytes() == daemon.sealed[0][0].tensor("model.weight").tobytes()


@pytest.mark.parametrize("what", ["param", "momentum"])
def test_change_under_the_copy_is_found_and_the_slot_reused(daemon, snapshotter, tmp_path, what):
    """Breaks: weights clipped in place during the forward pass end up torn in a snapshot that counts as good."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    with torch.no_grad():
        (model[1].weight if what == "param" else opt.state[model[1].weight]["momentum_buffer"]).mul_(2)
    gate.open()
    assert snap.wait(20)
    daemon.wait_for(lambda: daemon.skips)
    assert reasons(daemon) == ["TORN"]
    assert "1.weight" in daemon.skips[0].detail
    assert 1 == snap.stats["torn"] == snap.stats["skipped"]
    snap.capture(1)
    assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)


def test_no_slot_means_skip_and_not_wait(daemon, snapshotter):
    """Breaks: a slow daemon stops the training."""
    daemon.grant = False
    model, opt = job()
    snap = snapshotter(model, opt)
    for step in range(3):
        train(model, opt)
        snap.capture(step)
    train(model, opt)
    daemon.wait_for(lambda: len(daemon.skips) == 3)
    assert reasons(daemon) == ["NO_SLOT"] * 3
    assert [skip.step for skip in daemon.skips] == [0, 1, 2]
    assert snap.stats["skipped_no_slot"] == 3
    snap.capture(3)
    daemon.grant_all()
    assert snap.wait(20)
    daemon.wait_for(lambda: 3 in daemon.sealed)


def niceness(thread):
    return os.getpriority(os.PRIO_PROCESS, thread.native_id)


def test_copying_goes_before_training_where_it_may(daemon, snapshotter):
    """Breaks: a step can be lost for twice as long, because its copy gets half of the cores that training wants."""
    allowed = []

    def ask():
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness(threading.main_thread()) - 1)
        except OSError:
            return
        allowed.append(True)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    model, opt = job()
    snap = snapshotter(model, opt, settings={"copy_threads": 3})
    train(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    mine = niceness(threading.main_thread())
    copying = [thread for thread in threading.enumerate() if thread.name.startswith("snapshotd-copy")]
    assert [max(-20, mine - 10) if allowed else mine] * 3 == [niceness(thread) for thread in copying]


@pytest.mark.parametrize(("training", "copying"), [(1, 1), (3, 3), (9, 4)])
def test_as_many_threads_copy_as_train_unless_somebody_says_how_many(
    daemon, snapshotter, monkeypatch, training, copying
):
    """Breaks: one thread copies while training waits at its barriers for the one whose core it has, or torch has more
    threads of its own copy."""
    real, of_torch = torch._foreach_copy_, []

    def copy(targets, sources):
        of_torch.append(torch.get_num_threads())
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    before = torch.get_num_threads()
    torch.set_num_threads(training)
    try:
        model, opt = job()
        snap = snapshotter(model, opt)
        train(model, opt)
        snap.capture(0)
        assert snap.wait(20)
    finally:
        torch.set_num_threads(before)
    assert copying == sum(thread.name.startswith("snapshotd-copy") for thread in threading.enumerate())
    assert {1} == set(of_torch)


def test_wait_returns_when_the_daemon_has_the_seal_and_not_before(daemon, snapshotter):
    """Breaks: a worker that is killed after wait() takes the step with it, which it was told was kept."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    daemon.wait_for(lambda: 0 in daemon.sealed)
    with daemon.changed:  # it reads nothing
        for _ in range(4):  # more than the socket takes
            snap._link.post(pb.Frame(skip=pb.Skip(step=1, detail="x" * (1 << 20))), snap._link.session)
        train(model, opt)
        snap.capture(2)
        assert not snap.wait(0.5)
    assert snap.wait(20)
    daemon.wait_for(lambda: 2 in daemon.sealed)


def test_wait_does_not_wait_for_a_daemon_that_is_gone(daemon, snapshotter):
    """Breaks: a script that waits after each step hangs with its daemon."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    with daemon.changed:
        snap._link.post(pb.Frame(skip=pb.Skip(step=0, detail="x" * (4 << 20))), snap._link.session)
        snap.capture(1)
        daemon.stop()
    assert not snap.wait(20)
    stats = snap.stats
    assert (0, 1, 1) == (stats["sealed"], stats["skipped"], stats["skipped_away"])
    train(model, opt)
    snap.capture(2)
    assert not snap.wait(20)
    daemon.wait_for(lambda: not daemon.peers)
    daemon.layouts.clear()  # it may have heard of the first one before it ended
    daemon.start()
    daemon.wait_for(lambda: daemon.layouts)
    train(model, opt)
    snap.capture(3)
    assert snap.wait(20)
    assert (1, 2) == (snap.stats["sealed"], snap.stats["skipped_away"])


def test_steps_below_the_common_start_are_left_out(daemon, snapshotter):
    """Breaks: ranks fill their slots with different steps, and no snapshot is ever whole."""
    daemon.min_step = 2
    model, opt = job()
    snap = snapshotter(model, opt)
    for step in range(4):
        train(model, opt)
        snap.capture(step)
        assert snap.wait(20)
    daemon.wait_for(lambda: 3 in daemon.sealed)
    assert sorted(daemon.sealed) == [2, 3]
    assert reasons(daemon) == ["ALIGNING", "ALIGNING"]


def test_refused_layout_is_said_once_with_the_numbers(daemon, snapshotter, caplog):
    """Breaks: the user never learns why nothing is protected."""
    daemon.accept_layout = False
    model, opt = job()
    snap = snapshotter(model, opt)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        for step in range(3):
            snap.capture(step)
            assert snap.wait(20)
    daemon.wait_for(lambda: len(daemon.skips) == 3)
    assert reasons(daemon) == ["REFUSED"] * 3
    assert sum("budget is 1 GiB" in record.getMessage() for record in caplog.records) == 1


def test_a_refused_layout_is_captured_when_there_is_room(daemon, snapshotter, caplog):
    """Breaks: another process had the memory for a minute, and the job is unprotected for the rest of its life."""
    daemon.accept_layout = False
    model, opt = job()
    snap = snapshotter(model, opt)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        snap.capture(0)
        assert snap.wait(20)
        daemon.wait_for(lambda: daemon.skips)
        daemon.make_room()
        while not snap._pipeline._grants:
            threading.Event().wait(0.001)
        snap.capture(1)
        assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)
    assert ["refuses", "there is room"] == [
        word for record in caplog.records for word in ("refuses", "there is room") if word in record.getMessage()
    ]


def test_only_every_nth_step_is_captured(daemon, snapshotter):
    """Breaks: the daemon's setting has no effect."""
    daemon.capture_every = 3
    model, opt = job()
    snap = snapshotter(model, opt)
    for step in range(7):
        train(model, opt)
        snap.capture(step)
        assert snap.wait(20)
    daemon.wait_for(lambda: 6 in daemon.sealed)
    assert sorted(daemon.sealed) == [0, 3, 6]


def test_daemon_goes_away_and_comes_back(daemon, snapshotter, caplog):
    """Breaks: a daemon's restart stops the training, or its protection for ever."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    daemon.wait_for(lambda: 0 in daemon.sealed)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        daemon.stop()
        daemon.wait_for(lambda: not daemon.peers)
        while snap._link.session:
            threading.Event().wait(0.001)
        for step in (1, 2):
            train(model, opt)
            snap.capture(step)
        daemon.start()
        daemon.wait_for(lambda: len(daemon.layouts) == 2)
    train(model, opt)
    snap.capture(3)
    assert snap.wait(20)
    daemon.wait_for(lambda: 3 in daemon.sealed)
    assert daemon.hellos[0].nonce == daemon.hellos[-1].nonce
    assert daemon.layouts[0].hash == daemon.layouts[1].hash
    stats = snap.stats
    assert (stats["reconnects"], stats["outages"], stats["skipped_away"]) == (1, 1, 2)
    assert sum("no daemon" in record.getMessage() for record in caplog.records) == 1


def test_daemon_dies_while_a_copy_runs(daemon, snapshotter, tmp_path):
    """Breaks: a seal for a slot of a daemon that is gone is sent to its successor."""
    model, opt = job()
    snap = snapshotter(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    daemon.stop()
    while snap._link.session:
        threading.Event().wait(0.001)
    gate.open()
    assert not snap.wait(20)
    assert 1 == snap.stats["skipped_away"] == snap.stats["skipped"]
    daemon.start()
    daemon.wait_for(lambda: len(daemon.layouts) == 2)
    snap.capture(1)
    assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)
    assert sorted(daemon.sealed) == [1]


def test_fatal_error_ends_the_connection_for_good(daemon):
    """Breaks: a worker of an old epoch hammers the daemon."""
    daemon.fatal = "epoch 3 is over"
    model, opt = job()
    with Snapshotter(model, opt, settings=Settings(socket=daemon.path, job="t")) as snap:
        assert not snap._link.wait_session(10)
        assert snap._link.refused.code == "STALE_EPOCH"
        snap._link._thread.join(10)
        assert len(daemon.hellos) == 1
        snap.capture(0)
        assert snap.stats["skipped_away"] == 1


@pytest.mark.parametrize("step", [-1, "3", 2.0, True, None])
def test_bad_steps_are_counted_and_never_raise(snapshotter, step):
    """Breaks: a typo in the loop kills a job after days."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(step)
    snap.capture(5)
    snap.capture(5)
    snap.capture(4)
    assert snap.stats["bad_step"] == 3
    assert snap.stats["captured"] == 1


def test_state_that_turns_inexpressible_is_counted(daemon, snapshotter, caplog):
    """Breaks: an exception out of capture()."""
    model, opt = job()
    extra = {"thing": 1}
    snap = snapshotter(model, opt, extra=extra)
    extra["thing"] = object()
    with caplog.at_level(logging.WARNING, "snapshotd"):
        snap.capture(0)
        snap.capture(1)
    daemon.wait_for(lambda: len(daemon.skips) == 2)
    assert reasons(daemon) == ["ERROR", "ERROR"]
    assert snap.stats["errors"] == 2
    assert len([r for r in caplog.records if "extra.thing" in r.getMessage()]) == 1
    extra["thing"] = 2
    snap.capture(2)
    assert snap.wait(20)
    assert snap.stats["sealed"] == 1


@pytest.mark.parametrize("site", ["client.capture", "client.mid_copy", "client.before_seal"])
def test_unforeseen_errors_cost_a_step_and_not_the_job(daemon, snapshotter, site):
    """Breaks: a bug of ours ends the user's training."""
    model, opt = job()
    snap = snapshotter(model, opt)
    failpoints.configure(f"{site}=raise@1")
    snap.capture(0)
    assert snap.wait(20)
    train(model, opt)
    snap.capture(1)
    assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)
    assert reasons(daemon) == ["ERROR"]
    assert sorted(daemon.sealed) == [1]


def test_layout_is_registered_once_and_again_when_state_appears(daemon, snapshotter):
    """Breaks: slots are made anew at each step, or the late optimizer state is missing."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    for step in range(1, 5):
        train(model, opt)
        snap.capture(step)
        assert snap.wait(20)
    daemon.wait_for(lambda: 4 in daemon.sealed)
    assert 2 == len(daemon.layouts) == snap.stats["layouts"]
    assert "optim.0.weight.momentum_buffer" not in {shard.key for shard in daemon.sealed[0][0].layout.shards}
    assert "optim.0.weight.momentum_buffer" in {shard.key for shard in daemon.sealed[1][0].layout.shards}


def test_registering_twice_loses_no_slot(daemon, snapshotter):
    """Breaks: after a reconnection both threads register; the grants of the first are dropped and never come again."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    daemon.grant = False
    snap._pipeline.register(snap._plan, snap._link.session)
    snap.capture(1)
    assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)
    assert len(daemon.layouts) == 1


def test_growing_json_gets_more_room(daemon, snapshotter):
    """Breaks: a history in extra overflows into nothing, or over other bytes."""
    model, opt = job()
    extra = {"history": []}
    snap = snapshotter(model, opt, extra=extra)
    for step in range(4):
        extra["history"] += ["x" * 100] * 500
        snap.capture(step)
        assert snap.wait(20)
        daemon.wait_for(lambda step=step: step in daemon.sealed)
        assert extra["history"] == daemon.sealed[step][0].meta["rest"]["extra"]["history"]
    assert snap.stats["layouts"] in (2, 3)


def test_parameter_replaced_or_moved_is_seen(daemon, snapshotter):
    """Breaks: stale weights are captured for ever after somebody assigns .data or a new Parameter."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    model[0].weight.data = torch.full((5, 6), 7.0)
    snap.capture(1)
    assert snap.wait(20)
    model[1].bias = nn.Parameter(torch.full((3,), 9.0))
    snap.capture(2)
    assert snap.wait(20)
    daemon.wait_for(lambda: 2 in daemon.sealed)
    assert daemon.sealed[1][0].tensor("model.0.weight").tobytes() == b"\x00\x00\xe0\x40" * 30
    assert daemon.sealed[2][0].tensor("model.1.bias").tobytes() == b"\x00\x00\x10\x41" * 3


def test_buffers_and_extra_are_those_of_the_call(daemon, snapshotter, tmp_path):
    """Breaks: batch-norm statistics of the next forward pass in this step's snapshot."""
    model, opt = job()
    model.register_buffer("running", torch.zeros(300))
    extra = {"table": np.zeros(300), "t": torch.zeros(300)}
    snap = snapshotter(model, opt, extra=extra)
    gate = Gate(tmp_path, "client.mid_copy")
    snap.capture(0)
    gate.wait()
    model.running.add_(1)
    extra["table"] += 1
    extra["t"] += 1
    gate.open()
    assert snap.wait(20)
    daemon.wait_for(lambda: 0 in daemon.sealed)
    for name in ("model.running", "extra.table", "extra.t"):
        assert not np.any(daemon.sealed[0][0].tensor(name).view(np.uint8)), name


def test_inference_mode_of_one_capture_is_not_that_of_the_next(daemon, snapshotter):
    """Breaks: one capture inside an evaluation, and no step is kept any more for the rest of the job."""
    model, opt = job()
    model.register_buffer("running", torch.zeros(300))
    snap = snapshotter(model, opt, extra={"t": torch.zeros(300)})
    for step in range(4):
        train(model, opt)
        with torch.inference_mode(step % 2 == 0):
            snap.capture(step)
        assert snap.wait(20)
        daemon.wait_for(lambda step=step: step in daemon.sealed)
    assert (0, 4) == (snap.stats["errors"], snap.stats["sealed"])


@pytest.mark.parametrize("what", ["state", "memory"])
def test_what_is_replaced_is_not_kept_alive_twice(what, snapshotter):
    """Breaks: peak memory grows by a whole optimizer state, or by a whole model where parameters get other memory."""
    model, _ = job()

    class Replacing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                memory = np.ones(p.shape, np.float32)
                refs.append(weakref.ref(memory))
                tensor = torch.from_numpy(memory)
                if what == "state":
                    self.state[p] = {"m": tensor}
                else:
                    p.data = tensor
                del memory, tensor
            alive.append(sum(ref() is not None for ref in refs))

    refs, alive = [], []
    opt = Replacing(model.parameters())
    snap = snapshotter(model, opt)
    for step in range(6):
        opt.step()
        snap.capture(step)
        assert snap.wait(20)
    assert snap.stats["sealed"] == 6
    assert alive == [4, 8, 4, 4, 4, 4]  # that it is replaced shows at the second capture


def test_debug_copy_compares(daemon, snapshotter):
    """Breaks: the switch for doubts does nothing."""
    model, opt = job()
    snap = snapshotter(model, opt, settings={"debug_copy": True, "copy_threads": 3})
    for step in range(3):
        train(model, opt)
        snap.capture(step)
    assert snap.stats["sealed"] == 3


def test_foreign_or_open_slots_are_not_written(daemon, snapshotter):
    """Breaks: a symlink or a shared folder leads the copy somewhere else."""
    model, opt = job()
    snap = snapshotter(model, opt)
    daemon.folder.chmod(0o777)
    snap.capture(0)
    assert snap.wait(20)
    daemon.folder.chmod(0o700)
    daemon.wait_for(lambda: daemon.skips)
    assert reasons(daemon) == ["ERROR"]
    assert "written by others" in daemon.skips[0].detail


def test_object_without_hooks_is_fenced_by_its_step(daemon, snapshotter, tmp_path):
    """Breaks: optimizers of other libraries update under the copy."""

    class Plain:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.1}]
            self.state = {}

        def step(self):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1)

    model, _ = job()
    opt = Plain(model.parameters())
    snap = snapshotter(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    update = threading.Thread(target=opt.step)
    update.start()
    gate.open()
    update.join()
    assert snap.wait(20)
    assert snap.stats["sealed"] == 1
    assert snap.stats["torn"] == 0
    snap.close()
    assert "step" not in vars(opt)


def test_replica_mode_frame_makes_a_new_layout(daemon, snapshotter, caplog):
    """Breaks: ranks that turn out to differ lose what only one of them has captured."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        daemon.broadcast(pb.Frame(replica_mode=pb.ReplicaMode(split=False, reason="rank 1 differs")))
        while snap._split:
            threading.Event().wait(0.001)
    snap.capture(1)
    assert snap.wait(20)
    assert snap.stats["layouts"] == 2
    assert any("rank 1 differs" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- processes


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((6,), float(index))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_data_loader_workers(daemon, snapshotter):
    """Breaks: DataLoader workers hang, or speak on the parent's connection."""
    model, opt = job()
    snap = snapshotter(model, opt)
    step = 0
    for _ in range(2):
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        for x in loader:
            model(x).sum().backward()
            opt.step()
            snap.capture(step)
            assert snap.wait(20)
            step += 1
    daemon.wait_for(lambda: len(daemon.sealed) == 8)
    assert len(daemon.hellos) == 1


def _in_child(snap, model, opt, queue):
    snap.capture(100)
    for parameter in model.parameters():  # by hand: in a forked child torch may refuse to go backward
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    snap.close()
    queue.put((snap._inert, snap.wait(0)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_is_inert(daemon, snapshotter):
    """Breaks: a child's copy of the hook seals steps, or blocks for ever on a lock whose holder is not there."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.capture(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(snap, model, opt, queue))
    child.start()
    assert queue.get(timeout=20) == (True, True)
    child.join(20)
    assert child.exitcode == 0
    assert snap.wait(20)
    snap.capture(1)
    assert snap.wait(20)
    daemon.wait_for(lambda: 1 in daemon.sealed)
    assert daemon.goodbyes == []


def test_no_thread_or_descriptor_is_left(daemon):
    """Breaks: notebooks and sweeps that make many Snapshotters run out of descriptors."""

    def cycle():
        model, opt = job()
        with Snapshotter(model, opt, settings=Settings(socket=daemon.path, job="t", copy_threads=3)) as snap:
            assert snap._link.wait_session(10)
            snap.capture(0)
            assert snap.wait(20)
            assert snap.stats["sealed"] == 1
        daemon.wait_for(lambda: not daemon.peers)

    def ours():
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(str(daemon.folder))
        names = [t.name for t in threading.enumerate() if t.name.startswith("snapshotd")]
        return names, len(os.listdir("/proc/self/fd")), maps

    cycle()
    before = ours()
    for _ in range(3):
        cycle()
    assert before == ours()
    assert (before[0], before[2]) == ([], 0)


SCRIPT = """
import sys, torch
from snapshotd_client import Snapshotter
model = torch.nn.Linear(3, 3)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
snap = Snapshotter(model=model, optimizer=opt)
first = snap.restore()
for step in range(first, first + 2):
    model(torch.ones(1, 3)).sum().backward(); opt.step(); opt.zero_grad()
    snap.capture(step)
    snap.wait(20)
{end}
"""


def run_script(daemon, end="", **env):
    script = textwrap.dedent(SCRIPT).format(end=end)
    environment = {**os.environ, "SNAPSHOTD_SOCKET": daemon.path, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}", **env}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=110, check=False
    )


def test_plain_script_ends_by_itself_and_says_goodbye(daemon):
    """Breaks: `python train.py` hangs at its end, or its last step is lost; gRPC in the worker breaks forks."""
    done = run_script(daemon, "assert 'grpc' not in sys.modules")
    assert (
        done.returncode,
        done.stderr.replace("snapshotd: job default starts at step 0: nothing was captured before\n", ""),
    ) == (0, "")
    daemon.wait_for(lambda: daemon.goodbyes)
    assert [bye.finished for bye in daemon.goodbyes] == [True]
    assert sorted(daemon.sealed) == [0, 1]
    hello = daemon.hellos[0]
    assert (hello.job, hello.rank, hello.world_size, hello.epoch) == ("default", 0, 1, 0)


def test_exception_is_no_finish_and_lost_state_is_exit_code_6(daemon):
    """Breaks: a crashed job counts as done; a lost state restarts at zero in silence."""
    done = run_script(daemon, "raise RuntimeError('boom')")
    assert done.returncode == 1
    daemon.wait_for(lambda: daemon.goodbyes)
    assert [bye.finished for bye in daemon.goodbyes] == [False]
    daemon.decision = pb.RestoreDecision(kind=pb.RestoreDecision.KIND_REFUSED, reason="two of two nodes were lost")
    done = run_script(daemon)
    assert done.returncode == 6
    assert "two of two nodes were lost" in done.stderr
    daemon.wait_for(lambda: len(daemon.goodbyes) == 2)
    assert not daemon.goodbyes[1].finished


def test_training_goes_on_without_any_daemon(tmp_path):
    """Breaks: a laptop without a daemon can't run the script."""
    fake = FakeDaemon()
    done = run_script(
        fake, "print(snap.stats['skipped_away'], snap.last_restore['kind'])", SNAPSHOTD_CONNECT_TIMEOUT_S="0.2"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2 none"), done.stderr
    assert done.stderr.count("no daemon answers") == 1
