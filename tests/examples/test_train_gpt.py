"""The example's own promises: its data, and that it trains without any daemon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from examples.demo.records import Run, Summary
from examples.demo.verdict import judge
from examples.train_gpt import GPT, Sampler, corpus, parallelize

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"
DATA = torch.arange(1000).to(torch.uint8)


def sampler(rank=0, world=1, seed=0):
    return Sampler(DATA, seed=seed, batch=12, context=8, rank=rank, world=world)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 12])
def test_workers_share_one_global_batch(world):
    """A job that goes on with fewer workers must see the same samples, each exactly once."""
    whole = sampler()
    parts = [sampler(rank, world) for rank in range(world)]
    for _ in range(3):
        inputs, targets = whole.next()
        shares = [part.next() for part in parts]
        assert torch.equal(inputs, torch.cat([share[0] for share in shares]))
        assert torch.equal(targets, torch.cat([share[1] for share in shares]))


def test_batches_depend_on_the_position_alone():
    first = sampler()
    batches = [first.next()[0] for _ in range(4)]
    second = sampler()
    second.load_state_dict({"position": 2, "seed": 0})
    assert torch.equal(batches[2], second.next()[0])
    assert not torch.equal(batches[0], batches[1])


def test_a_snapshot_of_another_seed_is_refused():
    with pytest.raises(ValueError, match="--seed 1"):
        sampler().load_state_dict({"position": 2, "seed": 1})


def test_the_corpus_is_bounded_and_the_same_each_time():
    text = corpus(100_000)
    assert len(text) == 100_000
    assert torch.equal(text, corpus(100_000))


def test_ddp_sums_gradients_in_one_order_however_often_it_is_restarted(tmp_path):
    """A first step after a restart that groups them otherwise ends in other bits, with three workers or more."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        gpt = GPT(layers=1, width=32, heads=4, context=16, dropout=0.0)
        model = parallelize(gpt, "ddp", 1, torch.device("cpu"))
        for _ in range(3):
            model(torch.zeros(2, 16, dtype=torch.long)).sum().backward()
        facts = model._get_ddp_logging_data()
        assert facts["iteration"] >= 2
        assert not facts["has_rebuilt_buckets"]
    finally:
        dist.destroy_process_group()


def train(out, *arguments):
    environment = {
        **os.environ,
        "SNAPSHOTD_SOCKET": str(out / "nobody.sock"),
        "SNAPSHOTD_CONNECT_TIMEOUT_S": "0.1",
        "OMP_NUM_THREADS": "1",
    }
    small = ["--parallel", "none", "--layers", "1", "--width", "32", "--context", "16", "--corpus-bytes", "50000"]
    command = [sys.executable, str(SCRIPT), *small, "--steps", "4", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)


def test_trains_unprotected_without_a_daemon_and_twice_the_same(tmp_path):
    done = train(tmp_path / "a", "--digest", "2")
    assert "daemon" in done.stderr
    train(tmp_path / "b", "--digest", "2")
    first, second = Run.read(tmp_path / "a"), Run.read(tmp_path / "b")
    assert [check for check in judge(first, second, steps=4) if not check.equal] == []
    assert first.states[2] == second.states[2]
    assert first.states[2] != first.final
    tensors = safetensors.torch.load_file(tmp_path / "a" / "final.safetensors")
    assert set(tensors) == set(first.final.tensors)
    assert any(name.endswith(".exp_avg_sq") for name in tensors)
    assert isinstance(first.final, Summary)
    assert json.loads((tmp_path / "a" / "final.json").read_text())["values"]["steps"] == 4
