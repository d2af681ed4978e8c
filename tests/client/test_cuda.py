"""
The hook on a real CUDA device. What can be tested without one is in test_device.py.
"""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from snapshotd_client.sums import content_sums
from test_device import Replacing
from test_roundtrip import OPTIMIZERS, SCHEDULERS, Job, assert_equal_run
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

LONG_CYCLES = 1_000_000_000
"""Half a second or more, of a device that does nothing else."""

ON_DEVICE = {
    **OPTIMIZERS,
    "adamw_capturable": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), capturable=True),
}


@pytest.fixture(autouse=True)
def _on_cuda():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device("cuda"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _slots_in_memory(daemon):
    """As those of the real daemon: files on a disk cannot be pinned."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fd-") as folder:
        daemon.slot_folder = Path(folder)
        yield


@pytest.mark.parametrize("optimizer", ON_DEVICE)
def test_optimizer_goes_on_bit_by_bit(optimizer, snapshotter, seed, monkeypatch):
    """Breaks: the recovered run drifts from the undisturbed one."""
    monkeypatch.setitem(OPTIMIZERS, optimizer, ON_DEVICE[optimizer])
    job = assert_equal_run(snapshotter, seed, lambda: Job(optimizer))
    assert job.model.scale.is_cuda


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "none"])
def test_scheduler_goes_on_bit_by_bit(scheduler, snapshotter, seed):
    """Breaks: the learning rate jumps after a recovery."""
    assert_equal_run(snapshotter, seed, lambda: Job("adamw_fused", scheduler))


class Amp(Job):
    """Half precision with a scaler, whose state lies on the device."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 4))
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** random.randrange(4, 9), growth_interval=2)
        self.sched, self.extra = None, {"seen": torch.zeros(())}

    def step(self):
        with torch.autocast("cuda", torch.float16):
            loss = self.model(torch.randn(5, 8)).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()
        self.extra["seen"] += 1
        return loss.item()

    def snapshotter(self, make):
        return make(self.model, self.opt, scaler=self.scaler, extra=self.extra)


def test_grad_scaler_and_amp(snapshotter, seed):
    """Breaks: mixed precision loses its scale, or how long it has been stable."""
    seed(1)
    straight = Amp()
    for _ in range(8):
        straight.step()
    job = assert_equal_run(snapshotter, seed, Amp)
    assert straight.scaler.state_dict() == job.scaler.state_dict()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_step_is_what_it_was_however_far_the_host_runs_ahead(daemon, snapshotter, pinned):
    """
    Breaks: an update overtakes the copies of the step before, or copies begin before the update has ended.

    Slots on a disk cannot be pinned, and CUDA's refusal must not be raised by whatever comes next.
    """
    if not pinned:
        daemon.slot_folder = daemon.folder
    compute = torch.cuda.Stream()
    kept = {}
    with torch.cuda.stream(compute):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        snap = snapshotter(model, opt)
        for step in range(24):
            torch.cuda._sleep(5_000_000)  # the device is behind
            model(torch.randn(16, 512)).square().sum().backward()
            opt.step()
            opt.zero_grad()
            snap.capture(step)
            kept[step] = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert snap.wait(60)
    torch.cuda.synchronize()
    stats = snap.stats
    daemon.wait_for(lambda: len(daemon.sealed) == stats["sealed"])
    assert (0, 0) == (stats["torn"], stats["errors"])
    assert len(daemon.sealed) >= 2
    assert {pinned} == {slot.pinned for slot in snap._pipeline._copier._slots.values()}
    for step, ranks in daemon.sealed.items():
        for name, value in kept[step].items():
            assert ranks[0].tensor(f"model.{name}").tobytes() == value.cpu().numpy().tobytes(), (step, name)


@pytest.mark.parametrize("side", [False, True])
def test_what_is_replaced_is_captured_and_its_memory_is_free_again(daemon, snapshotter, side):
    """Breaks: peak memory grows by the whole state; or what was let go of is overwritten before it is copied."""

    def run(snap, steps, kept=None):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = torch.cuda.memory_allocated()
        for step in steps:
            if kept is not None:
                torch.cuda._sleep(20_000_000)  # the device is behind
            opt.step()
            if snap is not None:
                snap.capture(step)
            if kept is not None:
                kept[step] = torch.stack([p.sum() for p in params] + [opt.state[p]["m"].sum() for p in params])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - begun

    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        params = [nn.Parameter(torch.randn(1 << 18)) for _ in range(8)]
        model = nn.ParameterList(params)
        opt = Replacing(model.parameters())
        run(None, range(2))
        alone = run(None, range(6))
        snap = snapshotter(model, opt)
        run(snap, range(4))
        assert run(snap, range(4, 16)) <= alone + (4 << 20)  # of 16
        kept = {}
        run(snap, range(16, 56), kept)
        assert snap.wait(60)
    daemon.wait_for(lambda: len(daemon.sealed) + len(daemon.skips) >= 56)
    sealed = [step for step in kept if step in daemon.sealed]
    assert len(sealed) >= 2
    for step in sealed:
        found = daemon.sealed[step][0]
        names = [f"model.{number}" for number in range(8)] + [f"optim.{number}.m" for number in range(8)]
        values = torch.stack([torch.from_numpy(found.tensor(n).view("float32").copy()).cuda().sum() for n in names])
        assert torch.equal(kept[step], values)


def test_the_host_does_not_wait_for_the_device(daemon, snapshotter):
    """Breaks: the host cannot run ahead; the device idles at each step."""
    job = Amp()
    snap = job.snapshotter(snapshotter)
    for step in range(3):  # layouts, slots, pinned memory
        job.step()
        snap.capture(step)
        assert snap.wait(20)
    job.step()
    torch.cuda._sleep(LONG_CYCLES)
    behind = torch.cuda.Event()
    behind.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        snap.capture(3)
        with snap._pipeline._changed:  # forward and backward would be here: what has not begun by now is given up
            assert snap._pipeline._changed.wait_for(lambda: snap._pipeline._job.state.name != "WAITING", 20)
        snap.fence()
        assert not behind.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert snap.wait(20)
    assert (0, 4) == (snap.stats["errors"], snap.stats["sealed"])
    daemon.wait_for(lambda: 3 in daemon.sealed)


def test_slots_are_pinned_until_the_end(daemon, snapshotter):
    """Breaks: each copy goes by way of the driver's own memory, at a third of the speed, or pages stay locked."""
    job = Job()
    snap = job.snapshotter(snapshotter)
    for step in range(2):
        job.step()
        snap.capture(step)
        assert snap.wait(20)
        snapshotter.sealed(step)
    slots = [*snap._pipeline._copier._slots.values()]
    assert [True] * 2 == [slot.pinned for slot in slots]
    memory = [torch.from_numpy(slot.mapping.bytes) for slot in slots]
    assert all(one.is_pinned() for one in memory)
    del slots
    snap._pipeline._copier._forget("")
    assert not any(one.is_pinned() for one in memory)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_sums_are_those_of_the_host(dtype):
    """Breaks: replicas on a device are said to differ, or a difference is not seen."""
    tensor = torch.randn(3, 5_000_001, device="cpu").to(dtype).t()
    there = tensor.cuda()
    assert not there.is_contiguous()
    expected = content_sums([tensor, tensor[:7]])
    assert torch.equal(expected, content_sums([there, there[:7]]).cpu())
    there[4_999_999, 1] += 1
    assert not torch.equal(expected, content_sums([there, there[:7]]).cpu())


def test_large_state_comes_back_to_the_device(daemon, snapshotter, seed):
    """Breaks: boxes larger than what is read at once."""
    seed(1)
    model = nn.Linear(8192, 4096)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 8192)).sum().backward()
    opt.step()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(60)
    snapshotter.sealed(0)
    expected = [value.clone() for value in model.parameters()]
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    other = snapshotter(model, opt)
    assert other.restore() == 1
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


@pytest.mark.parametrize("fences", [True, False])
def test_an_update_inside_a_cuda_graph(daemon, snapshotter, fences):
    """Breaks: a replay changes what is being copied, unseen; or the copy thread makes the recording fail."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    opt = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), capturable=True)
    inputs = torch.randn(16, 1024)

    def step():
        opt.zero_grad(set_to_none=False)
        model(inputs).square().mean().backward()
        opt.step()

    snap = snapshotter(model, opt)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            step()
            snap.capture(number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kept = {}
    for number in range(3, 24):
        if fences:
            snap.fence()
        graph.replay()
        snap.capture(number)
        kept[number] = [value.detach().clone() for value in model.parameters()]
    assert snap.wait(60)
    stats = snap.stats
    daemon.wait_for(lambda: len(daemon.sealed) == stats["sealed"])
    assert (0, 0) == (stats["torn"], stats["errors"])
    steps = [number for number in daemon.sealed if number in kept]
    assert steps
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    for number in steps:
        found = [daemon.sealed[number][0].tensor(name).tobytes() for name in names]
        assert found == [value.cpu().numpy().tobytes() for value in kept[number]]
