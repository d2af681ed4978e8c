"""
DDP, FSDP2 and other DTensors on two real processes: each byte captured once, and every way from one layout to another.

All scenarios run in one pair of processes, for starting them is what takes time.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import dist_jobs
import numpy as np
import pytest
import torch
from fake_daemon import FakeDaemon, wanted_boxes
from safetensors.torch import load_file, save_file
from snapshotd_client import Snapshotter
from snapshotd_client.settings import Settings
from test_start import universal_of
from torch import multiprocessing as mp

from snapshotd.universal import convert

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RUNS = {
    "ddp": ("same_world", {"kind": "ddp", "opt": "adamw"}),
    "fsdp": ("same_world", {"kind": "fsdp", "opt": "adamw", "eval": True}),
    "hsdp": ("same_world", {"kind": "hsdp", "opt": "muon"}),
    "plain": ("same_world", {"kind": "plain", "opt": "muon"}),
    "one_to_fsdp": ("from_one", {"kind": "fsdp"}),
    "one_to_ddp": ("from_one", {"kind": "ddp"}),
    "start_fsdp": ("from_one", {"kind": "fsdp"}),
    "start_hsdp": ("from_one", {"kind": "hsdp"}),
    "start_ddp": ("from_one", {"kind": "ddp"}),
    "start_dcp": ("from_fixture", {"truth": str(FIXTURES / "dcp_fsdp2_w2" / "truth.json")}),
    "start_rot": ("from_rot", {}),
    "odd": ("odd_placements", {}),
    "disagree": ("disagree", {}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run everything once; return the daemons by name, and the folder of the whole states."""
    folder = tmp_path_factory.mktemp("dist")
    with ExitStack() as stack:
        daemons = {name: stack.enter_context(FakeDaemon()) for name in RUNS}
        for name, (scenario, _) in RUNS.items():
            if scenario in ("from_one", "from_rot"):
                capture_alone(daemons[name], folder / f"{name}.safetensors")
            else:
                daemons[name].world_size = 2
        jobs = []
        for name, (scenario, job) in RUNS.items():
            jobs.append((scenario, {**job, "socket": daemons[name].path, "full": str(folder / f"{name}.safetensors")}))
            if name.startswith("start_"):
                jobs[-1][1]["start"] = str(make_start(daemons[name], folder / name))
        flip_last_bit(folder / "start_rot" / "optimizer.exp_avg.safetensors")
        mp.spawn(dist_jobs.run_rank, args=(str(folder), json.dumps(jobs)), nprocs=2)
        assert all((folder / f"done-{rank}").exists() for rank in range(2))
        yield daemons, folder


def capture_alone(daemon, path):
    model = dist_jobs.Net(1)
    opt = dist_jobs.adamw(model.parameters())
    for _ in range(2):
        dist_jobs.train(model, opt)
    with Snapshotter(model, opt, settings=Settings(socket=daemon.path, job="t")) as snap:
        assert snap._link.wait_session(10)
        snap.capture(0)
        assert snap.wait(20)
        daemon.wait_for(lambda: 0 in daemon.sealed)
    save_file(dist_jobs.full_state(model, opt), path)


def make_start(daemon, path):
    """Return a universal checkpoint: of what the daemon holds, which then is forgotten, or of a foreign one."""
    if daemon.sealed:
        universal_of(daemon, 0, path)
    else:
        convert(FIXTURES / "dcp_fsdp2_w2" / "ckpt", path, to="universal")
    daemon.world_size = 2
    return path


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def coverage(daemon, step):
    """How often each element of each global tensor was captured."""
    counts = {}
    for sealed in daemon.sealed[step].values():
        for shard in sealed.layout.shards:
            tensor = shard.tensor
            if tensor.scope == "global":
                seen = counts.setdefault(tensor.name, np.zeros(tensor.global_shape, dtype=int))
                seen[tuple(slice(o, o + n) for o, n in zip(tensor.box.offsets, tensor.box.lengths, strict=True))] += 1
    return counts


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "odd"])
def test_each_byte_is_captured_once(runs, name):
    """Breaks: replicas waste memory on copies, or a part that nobody has captured is lost with the first failure."""
    daemon = runs[0][name]
    counts = coverage(daemon, min(daemon.sealed))
    assert counts
    for tensor, seen in counts.items():
        assert (seen == 1).all(), tensor


def test_replicas_share_the_work_evenly_and_agree(runs):
    """Breaks: rank 0 captures everything; differing replicas are not noticed."""
    daemon = runs[0]["ddp"]
    sizes = [
        sum(s.nbytes for s in sealed.layout.shards if s.tensor.scope == "global")
        for sealed in daemon.sealed[2].values()
    ]
    assert max(sizes) <= sum(sizes) / 2 + 24
    assert {"0,1"} == {layout.replica_group for layout in daemon.registered}
    seals = [seal for seal in daemon.seals if seal.step == 2]
    assert len({(seal.replica_hash, seal.replica_digest) for seal in seals}) == 1
    assert all(seal.replica_digest for seal in seals)


def test_plain_ranks_keep_their_own(runs):
    """Breaks: ranks that train different models overwrite each other's."""
    daemon = runs[0]["plain"]
    assert coverage(daemon, 2) == {}
    first, second = (daemon.sealed[2][rank].tensor("model.first.weight").tobytes() for rank in range(2))
    assert first != second


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_to_one_plain_process(runs, name):
    """Breaks: the job can't go on with fewer ranks."""
    daemon, folder = runs[0][name], runs[1]
    daemon.newest = 2
    model = dist_jobs.Net(9)
    opt = dist_jobs.adamw(model.parameters())
    with Snapshotter(model, opt, settings=Settings(socket=daemon.path, job="t", restore_timeout_s=20)) as snap:
        assert snap.restore() == 3
        assert snap.last_restore["source_world_size"] == 2
    expected = load_file(folder / f"{name}.safetensors")
    state = dist_jobs.full_state(model, opt)
    assert expected.keys() == state.keys()
    for tensor, value in expected.items():
        assert torch.equal(value, state[tensor]), tensor
    dist_jobs.train(model, opt)


def test_wants_are_only_what_a_rank_needs(runs):
    """Breaks: each rank pulls the whole model through the network."""
    daemon = runs[0]["one_to_fsdp"]
    per_request = [
        sum(int(np.prod(w.box.lengths)) for w in wanted_boxes(request.boxes) if w.name == "model.embed.weight")
        for request in daemon.wants
    ]
    assert sum(per_request) == 11 * 6
    assert len(per_request) == 2
