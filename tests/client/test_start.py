"""
A job begins with a universal checkpoint: one of its own snapshots, converted, gives each bit back.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snapshotd_client import Snapshotter
from snapshotd_client.settings import Settings
from test_roundtrip import CUT, OPTIMIZERS, SCHEDULERS, TOTAL, Job, state_of
from torch import nn

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.universal import convert
from snapshotd.universal.readers.snapshot import assemble
from snapshotd.universal.sources import BytesSource
from snapshotd.universal.stream import Settings as StreamSettings
from snapshotd.universal.writers import writer_for

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
INEXPRESSIBLE = {"averaging", "odd"}
"""State of the same parameter in two optimizers; None, tuples and strings as keys in it: the format has no place."""


def universal_of(daemon, step, path):
    """Convert what the daemon holds of a step, as `snapshotd convert` does with a live job."""
    ranks = [
        (sealed.layout.shards, BytesSource(sealed.data.tobytes()), dict(sealed.layout.ties), sealed.meta)
        for _, sealed in sorted(daemon.sealed[step].items())
    ]
    state = assemble(ranks)
    state.check()
    writer_for("universal").write(state, path, StreamSettings(), identity="test", options={"layout": {}, "rules": None})
    daemon.sealed.clear()
    return path


def captured(daemon, make, job, path, steps=CUT):
    """Train ``job``, capture it, and convert the last step; return its losses."""
    snap = job.snapshotter(make)
    losses = []
    for step in range(steps):
        losses.append(job.step())
        snap.capture(step)
        assert snap.wait(20)
        make.sealed(step)
    assert steps == snap.stats["sealed"], snap.stats
    snap.close()
    universal_of(daemon, steps - 1, path)
    return losses


def assert_start_is_equal(daemon, make, seed, path, new_job, *, warm):
    """Train straight on, or convert in the middle and start another job from that: the same, bit by bit."""
    seed(1)
    straight = new_job()
    expected = [straight.step() for _ in range(TOTAL)]
    seed(1)
    losses = captured(daemon, make, new_job(), path)
    seed(99)
    job = new_job()
    if warm:
        job.step()  # state that is in the way
    snap = job.snapshotter(make)
    assert CUT == snap.restore(path)
    assert [] == snap.last_restore["kept"] == snap.last_restore["cast"] == snap.last_restore["unused"]
    losses += [job.step() for _ in range(CUT, TOTAL)]
    assert all(map(math.isfinite, expected))
    assert expected == losses
    assert state_of(straight) == state_of(job)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in INEXPRESSIBLE])
def test_own_snapshot_comes_back_with_each_optimizer(optimizer, daemon, snapshotter, seed, tmp_path):
    """Breaks: a job that was exported drifts, because a state, a hyperparameter or a generator was left behind."""
    assert_start_is_equal(daemon, snapshotter, seed, tmp_path / "u", lambda: Job(optimizer), warm=False)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "none"])
def test_own_snapshot_comes_back_with_each_scheduler(scheduler, daemon, snapshotter, seed, tmp_path):
    """Breaks: the learning rate jumps."""
    new_job = lambda: Job("sgd_momentum", scheduler)  # noqa: E731
    assert_start_is_equal(daemon, snapshotter, seed, tmp_path / "u", new_job, warm=True)


@pytest.mark.parametrize("framework", ["deepspeed", "dcp", "torch"])
def test_the_way_over_a_framework_loses_no_step(framework, daemon, snapshotter, seed, tmp_path):
    """Breaks: a step is made twice, because a snapshot is named by its last step, and frameworks count those made."""
    seed(1)
    job = Job()
    captured(daemon, snapshotter, job, tmp_path / "u")
    convert(tmp_path / "u", tmp_path / "theirs", to=framework)
    convert(tmp_path / "theirs", tmp_path / "again", to="universal")
    for place in ("u", "again"):
        fresh = Job()
        snap = fresh.snapshotter(snapshotter)
        assert CUT == snap.restore(tmp_path / place)
        snap.close()
        assert state_of(job) == state_of(fresh)


def test_optimizers_in_each_other_are_refused(daemon, snapshotter, seed, tmp_path):
    """Breaks: the inner optimizer's moments are given to the outer one."""
    seed(1)
    captured(daemon, snapshotter, Job("averaging"), tmp_path / "u", steps=1)
    with pytest.raises(UsageError, match=r"optim and optim\.inner have the same parameters.*--only model"):
        Job("averaging").snapshotter(snapshotter).restore(tmp_path / "u")


def test_a_job_with_a_snapshot_of_its_own_never_looks_at_the_start(daemon, snapshotter, seed, tmp_path):
    """Breaks: after a crash the job begins again with the checkpoint that it began with, and all its work is lost."""
    seed(1)
    captured(daemon, snapshotter, Job(), tmp_path / "u")
    job = Job()
    snap = job.snapshotter(snapshotter, settings={"start": str(tmp_path / "u")})
    assert CUT == snap.restore()
    assert "start" == snap.last_restore["kind"]
    job.step()
    snap.capture(CUT)
    assert snap.wait(20)
    snapshotter.sealed(CUT)
    expected = state_of(job)
    snap.close()

    again = Job()
    snap = again.snapshotter(snapshotter, settings={"start": "/nonexistent"})
    assert CUT + 1 == snap.restore("/neither")
    assert "snapshot" == snap.last_restore["kind"]
    assert expected == state_of(again)


def test_the_setting_stands_in_environment_and_file(tmp_path):
    """Breaks: an unchanged script could not begin with a checkpoint."""
    (tmp_path / "s.toml").write_text('[client]\nstart = "/file/u"\n')
    assert "/file/u" == Settings.from_environment({"SNAPSHOTD_CONFIG": str(tmp_path / "s.toml")}).start
    assert "/env/u" == Settings.from_environment({"SNAPSHOTD_START": "/env/u"}).start
    assert "" == Settings.from_environment({}).start


# ---------------------------------------------------------------- what does not fit, or is not there


def test_missing_parameters_are_refused_by_name(daemon, snapshotter, seed, tmp_path):
    """Breaks: a renamed layer trains on from its random initialisation, and nobody notices for a week."""
    seed(1)
    captured(daemon, snapshotter, Job(), tmp_path / "u", steps=1)

    class Renamed(Job):
        def __init__(self):
            super().__init__()
            self.model.other = nn.Linear(3, 3)

    with pytest.raises(UsageError, match=r"lacks 2 of the model's parameters: other\.weight, other\.bias"):
        Renamed().snapshotter(snapshotter).restore(tmp_path / "u")
    daemon.wait_for(lambda: [done for done in daemon.dones if not done.ok])


def test_another_shape_is_refused_by_name(daemon, snapshotter, seed, tmp_path):
    seed(1)
    captured(daemon, snapshotter, Job(), tmp_path / "u", steps=1)
    job = Job()
    job.model.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    with pytest.raises(UsageError, match=r"frozen has shape \(4, 4\) here, \(4, 3\) there"):
        job.snapshotter(snapshotter).restore(tmp_path / "u")


@pytest.mark.parametrize(
    ("before", "after", "lacking"),
    [
        ("adamw", "sgd_momentum", "momentum"),
        ("sgd_momentum", "adamw", "betas, eps"),
        ("adamw", "rmsprop_centered", "momentum, alpha"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(before, after, lacking, daemon, snapshotter, seed, tmp_path):
    """Breaks: momentum is taken for a first moment; or the first step ends in a KeyError."""
    seed(1)
    captured(daemon, snapshotter, Job(before), tmp_path / "u", steps=1)
    with pytest.raises(UsageError, match=rf"is of another optimizer than \w+: it has no {lacking}.*--only model"):
        Job(after).snapshotter(snapshotter).restore(tmp_path / "u")


def test_weights_alone_start_at_step_0_and_say_so(daemon, snapshotter, seed, tmp_path, caplog):
    """Breaks: fine-tuning from weights is impossible; or begins with a half-filled optimizer."""
    seed(1)
    job = Job()
    captured(daemon, snapshotter, job, tmp_path / "all")
    convert(tmp_path / "all", tmp_path / "u", to="universal", only="model")
    seed(5)
    fresh = Job("sgd_momentum")
    groups = [dict(group) for group in fresh.opt.param_groups]
    snap = fresh.snapshotter(snapshotter)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        assert 0 == snap.restore(tmp_path / "u")
    assert "has no optimizer state: the optimizer starts fresh" in caplog.text
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, fresh.model.state_dict()[name]), name
    assert groups == fresh.opt.param_groups
    assert {} == fresh.opt.state
    assert fresh.extra["data"].position != job.extra["data"].position
    fresh.step()


def test_what_is_left_over_and_what_is_missing_is_told(daemon, snapshotter, seed, tmp_path, caplog):
    """Breaks: an extra that was renamed starts from nothing in silence."""
    seed(1)
    captured(daemon, snapshotter, Job(scheduler="lambda"), tmp_path / "u")
    job = Job(scheduler="plateau")
    job.extra["renamed"] = job.extra.pop("data")
    job.model.register_buffer("late", torch.full((3,), 7.0))
    snap = job.snapshotter(snapshotter)
    with caplog.at_level(logging.WARNING, "snapshotd"):
        assert CUT == snap.restore(tmp_path / "u")
    kept = ["the buffer late", "scheduler (that of the checkpoint is of another kind)", "extra renamed"]
    assert kept == snap.last_restore["kept"]
    assert {"extra.data", "extra.lr_scheduler"} == set(snap.last_restore["unused"])
    assert all(words in caplog.text for words in ("the buffer late", "extra.data"))
    assert [7.0] * 3 == job.model.late.tolist()


def test_rot_is_found_before_a_byte_is_used(daemon, snapshotter, seed, tmp_path):
    """Breaks: a flipped bit on the file server becomes a weight."""
    seed(1)
    captured(daemon, snapshotter, Job(), tmp_path / "u", steps=1)
    file = tmp_path / "u" / "optimizer.exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    job = Job()
    before = state_of(job)
    with pytest.raises(CorruptionError, match=r"optimizer\.exp_avg\.safetensors: exp_avg of .* has the digest"):
        job.snapshotter(snapshotter).restore(tmp_path / "u")
    assert before == state_of(job)


def test_what_is_no_universal_checkpoint_is_refused_with_the_remedy(snapshotter):
    """Breaks: a user points at the DeepSpeed folder itself, and learns nothing from a stack of KeyErrors."""
    with pytest.raises(UsageError, match="snapshotd convert SRC DST --to universal"):
        Job().snapshotter(snapshotter).restore(FIXTURES / "ds_z1_fp32_w2" / "ckpt")


def test_without_a_daemon_it_starts_too(daemon, snapshotter, seed, tmp_path):
    seed(1)
    captured(daemon, snapshotter, Job(), tmp_path / "u")
    job = Job()
    settings = Settings(socket=str(tmp_path / "nobody"), job="j", connect_timeout_s=0.0)
    with Snapshotter(job.model, job.opt, job.sched, extra=job.extra, settings=settings) as snap:
        assert CUT == snap.restore(tmp_path / "u")
        assert "no daemon" == snap.last_restore["reason"]


# ---------------------------------------------------------------- foreign checkpoints, converted


class Tree(nn.Module):
    """Parameters of any dotted names."""

    def __init__(self, parameters):
        super().__init__()
        for name, parameter in parameters.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(parameter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hugging_face_weights_start_a_model(dtype, snapshotter, tmp_path):
    """Breaks: 16-bit weights cannot begin a run with float32 parameters."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    convert(FIXTURES / "hf_llama_sharded" / "ckpt", tmp_path / "u", to="universal")
    found = load_file(FIXTURES / "hf_llama_sharded" / "truth.safetensors")
    truth = {name.removeprefix("model/"): tensor for name, tensor in found.items()}
    model = Tree({name: torch.zeros(t.shape, dtype=dtype) for name, t in truth.items()})
    snap = snapshotter(model, torch.optim.AdamW(model.parameters()))
    assert 0 == snap.restore(tmp_path / "u")
    assert (0 if dtype is torch.bfloat16 else len(truth)) == len(snap.last_restore["cast"])
    for name, parameter in model.named_parameters():
        assert torch.equal(truth[name].to(dtype), parameter), name


def test_float32_parameters_take_the_master_copy(snapshotter, tmp_path):
    """Breaks: a run that was trained in bf16 goes on from rounded weights, though the exact ones are there."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    convert(FIXTURES / "ds_z2_bf16_w2" / "ckpt", tmp_path / "u", to="universal")
    truth = load_file(FIXTURES / "ds_z2_bf16_w2" / "truth.safetensors")
    masters = {name.removeprefix("fp32/"): t for name, t in truth.items() if name.startswith("fp32/")}
    weights = {name.removeprefix("model/"): t for name, t in truth.items() if name.startswith("model/")}
    for wanted in (masters, weights):
        model = Tree({name: torch.zeros_like(t) for name, t in wanted.items()})
        opt = torch.optim.AdamW(p for p in model.parameters())
        snap = snapshotter(model, opt)
        assert 4 == snap.restore(tmp_path / "u")
        assert [] == snap.last_restore["cast"]
        for name, parameter in model.named_parameters():
            assert torch.equal(wanted[name], parameter), name
            if f"exp_avg/{name}" in truth:
                assert torch.equal(truth[f"exp_avg/{name}"], opt.state[parameter]["exp_avg"]), name
        snap.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_holds_no_second_copy(dtype, tmp_path):
    """Breaks: a model that just fits onto the machine cannot be started from a checkpoint, also where it is cast."""
    torch.save({"weight": torch.randn(8192, 4096)}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "u", to="universal")
    program = f"""
import re, torch
from snapshotd_client import Snapshotter, start
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
model = torch.nn.Linear(4096, 8192, bias=False, dtype=torch.{dtype})
before = peak()
with Snapshotter(model) as snap:
    assert snap.restore({str(tmp_path / "u")!r}) == 0
grown = peak() - before
assert grown < 64 << 20, grown
"""
    run_alone(program, tmp_path)


def run_alone(program, folder):
    """Run a program in a process of its own, with no daemon."""
    root = FIXTURES.parent.parent
    env = {
        "SNAPSHOTD_SOCKET": str(folder / "nobody"),
        "SNAPSHOTD_CONNECT_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin",
        "PYTHONPATH": str(root),
    }
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=root, env=env)


def test_no_pickle_reader_is_loaded_by_a_start(tmp_path):
    """Breaks: a worker can be made to read a pickle, however closed the list of names."""
    convert(FIXTURES / "dcp_fsdp2_w2" / "ckpt", tmp_path / "u", to="universal")
    program = f"""
import sys, torch
from snapshotd_client import Snapshotter
assert not [name for name in sys.modules if name.startswith("snapshotd.universal")]
from tests.fixtures import model as tiny
import json
model = tiny.build(tiny.Cfg(**json.load(open({str(FIXTURES / "dcp_fsdp2_w2" / "truth.json")!r}))["model"]))
with Snapshotter(model, torch.optim.AdamW(tiny.groups_of(model))) as snap:
    assert snap.restore({str(tmp_path / "u")!r}) == 4
loaded = {{name.rpartition(".")[2] for name in sys.modules if name.startswith("snapshotd.universal")}}
assert "universal" in loaded
banned = {{"unpickle", "pickling", "globals", "torchzip", "torchfile", "plain", "snapshot", "dcp", "hf", "torch_save"}}
assert not loaded & banned, loaded & banned
assert "grpc" not in sys.modules
"""
    run_alone(program, tmp_path)
