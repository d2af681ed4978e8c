"""
The order of events between compute stream, side stream and host, against a fake accelerator.

Its copies happen only when somebody waits for them: as late as they may.
"""

from __future__ import annotations

import threading

import pytest
import torch
from snapshotd_client import binding
from snapshotd_client import snapshotter as module
from snapshotd_client.sums import content_sums
from torch import nn


class LazyStream:
    """Copies are done when their mark is waited for on the host, or held for by the compute stream."""

    def __init__(self, pins=True):
        self.log: list[str] = []
        self.pending: list[tuple] = []
        self.release = threading.Event()
        self.release.set()
        self.lock = threading.Lock()
        self.pins = pins
        self.pinned = 0
        self.records = False

    def recording(self):
        return self.records

    def mark_compute(self):
        self.log.append("mark_compute")
        return len(self.log)

    def begin(self, mark):
        self.log.append("begin")

    def copy(self, targets, sources, pinned):
        assert pinned == self.pins
        self.pending += zip(targets, sources, strict=True)

    def sums(self, sources):
        return content_sums(sources)

    def mark_copied(self):
        self.log.append("mark_copied")
        return len(self.pending)

    def hold_compute(self, mark):
        self.log.append("hold_compute")
        self._run(mark)

    def wait(self, mark):
        assert self.release.wait(20)
        self._run(mark)
        self.log.append("wait")

    def pin(self, memory):
        self.pinned += self.pins
        return self.pins

    def unpin(self, memory):
        self.pinned -= 1

    def _run(self, mark):
        with self.lock:
            for number in range(mark):
                if self.pending[number] is not None:
                    target, source = self.pending[number]
                    target.copy_(source)
                    self.pending[number] = None


@pytest.fixture(params=[True, False], ids=["pinned", "bounced"])
def stream(request, monkeypatch):
    fake = LazyStream(request.param)

    def device_view(self, index, tensor):
        whole = binding._device_view(tensor)
        for number in self._parts_of[index]:
            self.sources[number] = whole[self.plan.parts[number].slices]

    monkeypatch.setattr(binding.Binding, "_view", device_view)
    return fake


def job(snapshotter, stream):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    snap = snapshotter(model, opt)
    snap._streams["cpu"] = stream
    return model, opt, snap


def train(model, opt):
    model(torch.randn(5, 4)).square().sum().backward()
    opt.step()
    opt.zero_grad()


class Replacing(torch.optim.Optimizer):
    """Gives parameters and state other memory in each step."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["m"] = self.state[p].get("m", 0.0) * 0.5 + p
            p.data = p.data * 0.75 + 1


def test_what_is_replaced_while_the_device_is_behind_is_captured_as_it_was(daemon, snapshotter, stream):
    """Breaks: what is let go of at the fence is not there any more for the copies, or a step counts as torn."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = Replacing(model.parameters())
    snap = snapshotter(model, opt)
    snap._streams["cpu"] = stream
    kept = {}
    for step in range(8):
        opt.step()
        tensors = [tensor for p in model.parameters() for tensor in (p.detach(), opt.state[p]["m"])]
        kept[step] = [tensor.numpy().tobytes() for tensor in tensors]
        count = stream.log.count("mark_copied")
        stream.release.clear()
        snap.capture(step)
        with snap._pipeline._changed:
            assert snap._pipeline._changed.wait_for(lambda count=count: stream.log.count("mark_copied") > count, 20)
        snap.fence()
        assert not snap._pipeline.idle()
        stream.release.set()
        assert snap.wait(20)
    daemon.wait_for(lambda: len(daemon.sealed) == 8)
    names = [f"{key}.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias") for key in ("model", "optim")]
    for step, expected in kept.items():
        found = daemon.sealed[step][0]
        assert expected == [found.tensor(n if n[0] == "m" else f"{n}.m").tobytes() for n in names]
    assert (0, 0) == (snap.stats["torn"], snap.stats["errors"])


def test_host_waits_for_no_copy_and_compute_for_each(daemon, snapshotter, stream):
    """Breaks: the training thread stalls for the transfer, or the next update overtakes it."""
    model, opt, snap = job(snapshotter, stream)
    train(model, opt)
    before = model[0].weight.detach().clone()
    running = model[1].running_mean.clone()
    stream.release.clear()  # the device is busy: no copy is done
    snap.capture(0)
    with snap._pipeline._changed:
        assert snap._pipeline._changed.wait_for(lambda: "mark_copied" in stream.log, 20)
    train(model, opt)  # the host goes on; the update comes after the copies on the device
    assert stream.log == ["mark_compute", "begin", "mark_copied", "hold_compute"]
    assert not snap._pipeline.idle()
    assert daemon.sealed == {}
    stream.release.set()
    assert snap.wait(20)
    snapshotter.sealed(0)
    sealed = daemon.sealed[0][0]
    assert sealed.tensor("model.0.weight").tobytes() == before.numpy().tobytes()
    assert sealed.tensor("model.1.running_mean").tobytes() == running.numpy().tobytes()
    assert not torch.equal(before, model[0].weight)
    assert snap.stats["torn"] == 0
    snap.close()
    assert stream.pinned == 0


def test_change_before_the_fence_is_torn(daemon, snapshotter, stream):
    """Breaks: on an accelerator, in-place changes in the forward pass go unnoticed."""
    model, opt, snap = job(snapshotter, stream)
    train(model, opt)
    stream.release.clear()
    snap.capture(0)
    with snap._pipeline._changed:
        assert snap._pipeline._changed.wait_for(lambda: "mark_copied" in stream.log, 20)
    with torch.no_grad():
        model[0].weight.mul_(2)
    stream.release.set()
    assert snap.wait(20)
    assert snap.stats["torn"] == 1


def in_a_graph(model, opt):
    """What a replay does: an update that calls no Python of ours and leaves the tensors' versions as they were."""
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def issued(snap, stream, count):
    with snap._pipeline._changed:
        assert snap._pipeline._changed.wait_for(lambda: stream.log.count("mark_copied") == count, 20)


def test_an_update_that_calls_nobody_comes_after_the_copies(daemon, snapshotter, stream, caplog):
    """Breaks: a CUDA graph with the optimizer's step in it changes what is being copied, and nobody sees it."""
    model, opt, snap = job(snapshotter, stream)
    train(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    in_a_graph(model, opt)
    expected = model[0].weight.detach().clone()
    stream.log.clear()
    stream.release.clear()
    snap.capture(1)
    assert ["mark_compute", "begin", "mark_copied", "hold_compute"] == stream.log
    in_a_graph(model, opt)
    stream.release.set()
    assert snap.wait(20)
    snapshotter.sealed(1)
    assert daemon.sealed[1][0].tensor("model.0.weight").tobytes() == expected.numpy().tobytes()
    assert not [text for text in caplog.messages if "fence()" in text]  # may be a GradScaler's
    snap.capture(2)
    assert snap.wait(20)
    snapshotter.sealed(2)
    assert 1 == len([text for text in caplog.messages if "fence()" in text])
    in_a_graph(model, opt)
    snap.fence()  # as the warning asks for
    stream.log.clear()
    stream.release.clear()
    snap.capture(3)
    issued(snap, stream, 1)
    assert ["mark_compute", "begin", "mark_copied"] == stream.log
    stream.release.set()
    assert snap.wait(20)
    assert (4, 0, 0) == tuple(snap.stats[key] for key in ("sealed", "skipped", "torn"))


def test_nothing_of_ours_is_recorded(daemon, snapshotter, stream):
    """Breaks: recording a CUDA graph with the optimizer's step in it fails, since it would wait for our stream."""
    model, opt, snap = job(snapshotter, stream)
    train(model, opt)
    stream.release.clear()
    snap.capture(0)
    issued(snap, stream, 1)
    stream.records = True
    fence = threading.Thread(target=snap.fence)
    fence.start()
    stream.release.set()
    fence.join(20)
    stream.records = False
    assert "hold_compute" not in stream.log
    assert "wait" in stream.log  # all is copied before the first replay
    assert snap.wait(20)
    stream.release.clear()
    snap.capture(1)
    assert "hold_compute" in stream.log  # and no replay is a call of the fence
    stream.release.set()
    assert snap.wait(20)
    assert (2, 0, 0) == tuple(snap.stats[key] for key in ("sealed", "skipped", "torn"))


def test_real_accelerators_get_streams(monkeypatch):
    """Breaks: tensors on a device without streams (MPS) are never captured."""
    from snapshotd_client import device

    monkeypatch.setattr(torch, "get_device_module", lambda _: object())
    assert isinstance(module.stream_for(torch.device("mps")), device.HostStream)


class FakeModule:
    """What ``torch.cuda`` is to a DeviceStream: streams and events that write down what happens, in order."""

    def __init__(self):
        self.log: list[str] = []
        self.inside: object = None
        module = self

        class Event:
            def __init__(self, blocking=False):
                self.blocking = blocking

            def record(self, stream):
                module.log.append(f"record {stream}")

            def synchronize(self):
                module.log.append("host waits")

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_event(self, event):
                module.log.append("side waits")

            def synchronize(self):
                module.log.append("side is done")

            def __str__(self):
                return "side"

        class Compute(Stream):
            def wait_event(self, event):
                module.log.append("compute waits")

            def __str__(self):
                return "compute"

        self.Event, self.Stream, self._compute = Event, Stream, Compute()

    def current_stream(self, device):
        return self._compute

    def stream(self, stream):
        module = self

        class Inside:
            def __enter__(self):
                module.log.append(f"in {stream}")

            def __exit__(self, *error):
                module.log.append(f"out of {stream}")

        return Inside()


@pytest.fixture
def device_stream(monkeypatch):
    from snapshotd_client import device

    fake = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    made = module.stream_for(torch.device("cpu"))
    assert isinstance(made, device.DeviceStream)
    return fake, made


def test_all_copies_are_issued_on_the_side_stream_and_no_host_waits(device_stream):
    """Breaks: copies are ordered behind the next step's kernels, or the training thread waits for a transfer."""
    fake, stream = device_stream
    sources = [torch.randn(3, 4).t(), torch.arange(5), torch.tensor(2.0), torch.empty(0)]
    targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    stream.begin(stream.mark_compute())
    stream.copy(targets, sources, pinned=True)
    stream.hold_compute(stream.mark_copied())
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert [
        *("record compute", "side waits", "in side", "out of side", "record side", "compute waits"),
    ] == fake.log


def test_the_copy_thread_sleeps_until_the_copies_are_there(monkeypatch):
    """Breaks: it spins on a core of training's for as long as the transfer takes."""
    fake = FakeModule()
    fake.cudart = None
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    stream = module.stream_for(torch.device("cpu"))
    assert (False, True) == (stream.mark_compute().blocking, stream.mark_copied().blocking)


def test_memory_that_cannot_be_pinned_is_reached_by_a_bounce_buffer(device_stream):
    """Breaks: tensors larger than the buffer, or laid out otherwise, arrive in part."""
    _, stream = device_stream
    stream._bounce = torch.empty(64, dtype=torch.uint8)
    sources = [torch.randn(10, 7).t(), torch.arange(100, dtype=torch.int16), torch.tensor(3.0), torch.empty(0)]
    targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    stream.copy(targets, sources, pinned=False)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
