"""
Wrong arguments and wrong settings raise when the Snapshotter is made, and the message names the fix.
"""

from __future__ import annotations

import os
import struct

import pytest
import torch
from snapshotd_client import Snapshotter
from snapshotd_client.settings import Settings
from snapshotd_client.wire import FrameReader, pack
from torch import nn

from snapshotd.errors import RemoteProtocolError
from snapshotd.v1 import worker_pb2 as pb


def make(*args, **kwargs):
    return Snapshotter(*args, settings=Settings(socket="/nonexistent/daemon.sock", job="t"), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"model": 3}, TypeError, "torch.nn.Module"),
        ({"model": []}, ValueError, "empty"),
        ({"model": [nn.Linear(1, 1), "x"]}, TypeError, r"model\[1\]"),
        ({"optimizer": 3}, TypeError, "param_groups"),
        ({"optimizer": ["adam"]}, TypeError, "optim.0"),
        ({"scheduler": 3}, TypeError, "state_dict"),
        ({"scheduler": [3]}, TypeError, r"scheduler\[0\]"),
        ({"scaler": 3}, TypeError, "scaler"),
        ({"extra": [1]}, TypeError, "extra must be a dict"),
        ({"extra": {1: 2}}, TypeError, "must be strings"),
        ({"extra": {"x": {"y": [open]}}}, TypeError, r"extra\.x\.y\[0\]"),
        ({"model": {"a": nn.ModuleDict({"b": nn.Linear(1, 1)}), "a.b": nn.Linear(1, 1)}}, ValueError, "a.b.weight: "),
        ({"model": nn.LazyLinear(3)}, ValueError, "forward pass"),
        ({"model": nn.Linear(2, 2, device="meta")}, ValueError, "materialize"),
    ],
)
def test_wrong_arguments_raise_at_construction(kwargs, error, words):
    """Breaks: a job runs for days and finds at its first failure that nothing was kept."""
    with pytest.raises(error, match=words):
        make(**{"model": nn.Linear(1, 1), **kwargs})


def test_a_second_snapshotter_of_the_same_rank_is_refused_until_the_first_is_closed():
    """Breaks: two that take each other's place at the daemon; the job cannot start again with what one of them kept."""
    first = make(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"job t, rank 0, already: give one of them all models .* close\(\) first"):
        make(nn.Linear(2, 2))
    Snapshotter(nn.Linear(2, 2), settings=Settings(socket="/nonexistent/daemon.sock", job="another")).close()
    first.close()
    make(nn.Linear(2, 2)).close()


def test_stray_optimizer_parameters_and_views_are_fine():
    stray = nn.Parameter(torch.ones(3))
    snap = make(nn.Linear(1, 1), torch.optim.SGD([stray], lr=1))
    names = [item.name for item in snap._inventory.plan(snap._inventory.rescan(), 10, 0, True).planned]
    snap.close()
    assert names == ["model.weight", "model.bias", "optim.group0.param0"]


def test_settings_come_from_the_environment(tmp_path):
    plain = Settings.from_environment({})
    assert (
        *(plain.rank, plain.world_size, plain.job, plain.epoch),
        *(plain.connect_timeout_s, plain.restore_timeout_s),
    ) == (0, 1, "default", None, 5.0, 120.0)
    assert f"/tmp/snapshotd-{os.getuid()}/daemon.sock" == plain.socket
    assert plain.formation != Settings.from_environment({}).formation
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "29",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_RUN_ID": "run",
        "SNAPSHOTD_EPOCH": "7",
        "XDG_RUNTIME_DIR": str(tmp_path),
        "SNAPSHOTD_COPY_THREADS": "3",
        "SNAPSHOTD_DEBUG_COPY": "1",
    }
    full = Settings.from_environment(env)
    assert (
        *(full.rank, full.world_size, full.job, full.epoch),
        *(full.formation, full.copy_threads, full.debug_copy),
    ) == (3, 4, "run", 7, "h:29", 3, True)
    assert f"{tmp_path}/snapshotd/daemon.sock" == full.socket
    assert Settings.from_environment({**env, "SNAPSHOTD_JOB": "mine"}).job == "mine"


def test_settings_come_from_a_file_that_variables_override(tmp_path):
    file = tmp_path / "snapshotd.toml"
    file.write_text('[client]\ncopy_threads = 2\nrestore_timeout_s = 9.5\ndebug_copy = true\njob = "filed"\n[daemon]\n')
    env = {"SNAPSHOTD_CONFIG": str(file), "SNAPSHOTD_COPY_THREADS": "3"}
    found = Settings.from_environment(env)
    assert (3, 9.5, True, "filed") == (found.copy_threads, found.restore_timeout_s, found.debug_copy, found.job)
    wrong = {"[client]\ncopies = 1": "copies; known: socket", "client = 3": "a table", "=": "not TOML"}
    for text, words in wrong.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            Settings.from_environment(env)
    with pytest.raises(ValueError, match="cannot read"):
        Settings.from_environment({"SNAPSHOTD_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "x"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"SNAPSHOTD_COPY_THREADS": "17"}, "SNAPSHOTD_COPY_THREADS"),
        ({"SNAPSHOTD_CONNECT_TIMEOUT_S": "soon"}, "SNAPSHOTD_CONNECT_TIMEOUT_S"),
        ({"SNAPSHOTD_RESTORE_TIMEOUT_S": "-1"}, "SNAPSHOTD_RESTORE_TIMEOUT_S"),
    ],
)
def test_wrong_settings_name_the_variable(env, words):
    with pytest.raises(ValueError, match=words):
        Settings.from_environment(env)


def test_frames_survive_any_cut_and_nonsense_is_refused():
    """Breaks: a frame that arrives in two parts is lost; a length of 4 GiB is waited for."""
    frames = [pb.Frame(request_id=i, skip=pb.Skip(step=i)) for i in range(1, 4)]
    data = b"".join(map(pack, frames))
    for cut in range(len(data)):
        reader = FrameReader()
        assert frames == [*reader.feed(data[:cut]), *reader.feed(data[cut:])]
    with pytest.raises(RemoteProtocolError, match="limit"):
        list(FrameReader().feed(struct.pack("<I", 1 << 31)))
    with pytest.raises(RemoteProtocolError, match="no frame"):
        list(FrameReader().feed(struct.pack("<I", 3) + b"\xff\xff\xff"))
