"""Memory that training counts on between two phases: after ``release`` nothing of ours holds a tensor."""

from __future__ import annotations

import gc
import threading

import pytest
from test_capture import Gate, job, train
from torch.multiprocessing.reductions import StorageWeakRef


def offload(model, opt):
    """As between two phases: the values go elsewhere. Returns references to the memory that is to be free by that."""
    moved = []
    for parameter in model.parameters():
        buffer = opt.state[parameter]["momentum_buffer"]
        moved += [StorageWeakRef(tensor.untyped_storage()) for tensor in (parameter, buffer)]
        parameter.data = parameter.data.clone()
        opt.state[parameter]["momentum_buffer"] = buffer.clone()
    return moved


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_what_is_moved_elsewhere_gives_its_memory_back(daemon, snapshotter, threads, with_optimizer):
    """Breaks: a model that makes room for another one between two phases does not: out of memory."""
    model, opt = job()
    snap = snapshotter(model, opt if with_optimizer else None, settings={"copy_threads": threads})
    train(model, opt)
    snap.capture(0)
    snap.release()
    snapshotter.sealed(0)
    moved = offload(model, opt)
    gc.collect()
    assert all(memory.expired() for memory in moved)
    train(model, opt)
    snap.capture(1)
    assert snap.wait(20)
    snapshotter.sealed(1)
    assert daemon.sealed[1][0].tensor("model.0.weight").tobytes() == model[0].weight.detach().numpy().tobytes()
    assert len({layout.header for layout in daemon.registered}) == 1
    assert snap.stats["skipped"] == 0


def test_release_waits_for_the_copy_and_may_come_at_any_time(daemon, snapshotter, tmp_path):
    """Breaks: memory that is given back is still being copied."""
    model, opt = job()
    snap = snapshotter(model, opt)
    snap.release()  # before the first capture
    train(model, opt)
    gate = Gate(tmp_path)
    snap.capture(0)
    gate.wait()
    released = threading.Event()
    releases = threading.Thread(target=lambda: (snap.release(), released.set()))
    releases.start()
    assert not released.wait(0.05)
    gate.open()
    releases.join()
    snap.release()
    train(model, opt)
    snap.capture(1)
    snapshotter.sealed(1)
    assert sorted(daemon.sealed) == [0, 1]
    snap.close()
    snap.release()
