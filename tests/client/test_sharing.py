"""Memory that training gives away while a capture reads it: what torch moves into shared memory, it unmaps at once."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from test_capture import Gate, job, reasons, train


@pytest.mark.parametrize("what", ["model", "momentum"])
def test_memory_moves_after_the_copy(daemon, snapshotter, tmp_path, fence_waits, what):
    """Breaks: a model that is shared with another process right after a capture ends the training with SIGSEGV."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    shared = [*model.parameters()] if what == "model" else [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    before = model[1].weight.detach().clone()
    places = [tensor.data_ptr() for tensor in shared]
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    moves = threading.Thread(target=lambda: [tensor.share_memory_() for tensor in shared])
    waits = fence_waits(snap, moves)
    moves.start()
    assert waits.wait(20)
    assert [tensor.data_ptr() for tensor in shared] == places
    gate.open()
    moves.join()
    assert all(tensor.is_shared() for tensor in shared)
    assert not {tensor.data_ptr() for tensor in shared} & set(places)
    assert snap.wait(20)
    snapshotter.sealed(0)
    assert daemon.sealed[0][0].tensor("model.1.weight").tobytes() == before.numpy().tobytes()
    train(model, opt)
    snap.capture(1)
    assert snap.wait(20)
    snapshotter.sealed(1)
    now = model[1].weight.detach()
    assert daemon.sealed[1][0].tensor("model.1.weight").tobytes() == now.numpy().tobytes()
    assert not torch.equal(before, now)
    assert snap.stats["skipped"] == 0


def test_a_tensor_sent_to_another_process_moves_after_the_copy(daemon, snapshotter, tmp_path, fence_waits, monkeypatch):
    """Breaks: actors that are sent new weights kill their learner."""
    monkeypatch.setattr(multiprocessing.reduction, "DupFd", lambda fd: fd)  # nobody is there to be sent it
    model, opt = job()
    snap = snapshotter(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    pickler = multiprocessing.reduction.ForkingPickler
    sends = threading.Thread(target=pickler.dumps, args=(model[1].weight.detach(),))
    waits = fence_waits(snap, sends)
    sends.start()
    assert waits.wait(20)
    gate.open()
    sends.join()
    assert model[1].weight.is_shared()
    assert snap.wait(20)
    snapshotter.sealed(0)


def test_memory_moves_after_the_last_copy(daemon, snapshotter, tmp_path, fence_waits):
    """Breaks: a thread that sends weights while the training ends makes it end with SIGSEGV."""
    model, opt = job()
    snap = snapshotter(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    closes = threading.Thread(target=snap.close)
    closing = fence_waits(snap, closes)
    closes.start()
    assert closing.wait(20)
    moves = threading.Thread(target=model.share_memory)
    waits = fence_waits(snap, moves)
    moves.start()
    assert waits.wait(20)
    gate.open()
    moves.join()
    closes.join()
    snapshotter.sealed(0)
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_a_capture_that_has_not_begun_is_given_up(daemon, snapshotter):
    """Breaks: the copy begins when the memory is gone."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    with snap._pipeline._changed:  # that of step 0 is granted again behind its seal
        assert snap._pipeline._changed.wait_for(lambda: len(snap._pipeline._grants) == daemon.num_slots, 20)
        snap._pipeline._grants.clear()
    daemon.grant = False
    snap.capture(1)
    model.share_memory()
    daemon.wait_for(lambda: daemon.skips)
    assert reasons(daemon) == ["NO_SLOT"]
    daemon.grant_all()
    snap.capture(2)
    assert snap.wait(20)
    snapshotter.sealed(2)
    assert daemon.sealed[2][0].tensor("model.0.weight").tobytes() == model[0].weight.detach().numpy().tobytes()


def test_no_capture_begins_while_memory_moves(daemon, snapshotter, monkeypatch):
    """Breaks: a capture takes an address on one thread, while another moves what lies there."""
    model, opt = job()
    snap = snapshotter(model, opt)
    train(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    begin = model[0].weight.data_ptr()
    captured = threading.Event()
    captures = threading.Thread(target=lambda: (snap.capture(1), captured.set()))
    reading = threading.Event()
    finish = snap._finish_reading
    monkeypatch.setattr(snap, "_finish_reading", lambda: (reading.set(), finish())[1])
    with snap._memory_moves(begin, begin + 1):
        captures.start()
        assert reading.wait(20)
        assert not captured.wait(0.05)
    captures.join()
    assert snap.wait(20)
    snapshotter.sealed(1)


def test_other_memory_moves_at_once(daemon, snapshotter, tmp_path):
    """Breaks: a trainer that sends data to its workers waits for each copy."""
    model, opt = job()
    snap = snapshotter(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    assert torch.ones(1000).share_memory_().is_shared()
    assert not snap._pipeline._job.fenced
    gate.open()
    assert snap.wait(20)
    snapshotter.sealed(0)


def test_torch_is_left_as_it_was(snapshotter):
    """Breaks: a job that has closed its Snapshotters goes on with methods of ours."""
    names = ("_share_fd_cpu_", "_share_filename_cpu_")
    before = [getattr(torch.UntypedStorage, name) for name in names]
    first = snapshotter(*job(), settings={"rank": 0, "world_size": 2})
    second = snapshotter(*job(), settings={"rank": 1, "world_size": 2})
    during = [getattr(torch.UntypedStorage, name) for name in names]
    assert not set(before) & set(during)
    first.close()
    assert during == [getattr(torch.UntypedStorage, name) for name in names]
    second.close()
    assert before == [getattr(torch.UntypedStorage, name) for name in names]
