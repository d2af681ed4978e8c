"""Our own durable snapshots as a source: what the hook captured, written as the daemon writes it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.cli import main
from snapshotd.durable import Marker, MarkerRank, RankRecord, RankWriter, write_marker
from snapshotd.durable.writer import make_directories, snapshot_path
from snapshotd.errors import CorruptionError, UsageError
from snapshotd.layout import chunk_digests, root_digest
from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import detect, read
from snapshotd.universal.views import read_all
from snapshotd.v1 import control_pb2 as control

torch = pytest.importorskip("torch")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.frozen = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.norm(self.frozen(self.embed(ids))))


def captured() -> tuple[Any, Any, Any, Any]:
    """(layout and bytes of the slot, model, optimizer, scheduler) as the hook makes them, without a daemon."""
    from snapshotd_client.inventory import Inventory

    net = Net()
    optimizer = torch.optim.AdamW(
        [{"params": [net.embed.weight]}, {"params": [net.norm.weight, net.norm.bias], "weight_decay": 0.0}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        net(torch.arange(50)).sum().backward()
        optimizer.step()
        scheduler.step()
    extra = {"data": {"epoch": 1, "seen": (3, 4.5), "order": torch.arange(2000)}}
    inventory = Inventory(model=net, optimizer=optimizer, scheduler=scheduler, scaler=None, extra=extra, world_size=1)
    reading = inventory.rescan()
    meta = b"".join(reading.meta(3, 0, 1, 1))
    plan = inventory.plan(reading, len(meta), 0, False)
    slot = np.zeros(plan.layout.file_bytes, np.uint8)
    slot[: plan.layout.data_begin] = np.frombuffer(plan.layout.header, np.uint8)
    for part in plan.parts:
        tensor = reading.leaves[part.index].tensor.detach()
        data = tensor[part.slices].contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.ndim else None
        if data is None:
            data = tensor.reshape(1).view(torch.uint8).numpy()
        slot[part.begin : part.end] = data
    begin, end = plan.layout.meta
    slot[begin:end] = 0x20
    slot[begin : begin + len(meta)] = np.frombuffer(meta, np.uint8)
    return (plan.layout, slot.tobytes()), net, optimizer, scheduler


def persisted(root: Path, layout: Any, data: bytes) -> Path:
    path = snapshot_path(root, "job", 1, 3)
    make_directories(path, below=root)
    digests = chunk_digests(data, len(data))
    slot = control.SlotRef(
        job="job",
        epoch=1,
        step=3,
        rank=0,
        world_size=1,
        file_bytes=len(data),
        root_digest=root_digest(digests),
        layout_hash=layout.hash,
    )
    with RankWriter(path, 0) as writer:
        writer.write(memoryview(data))
        writer.finish(RankRecord(slot=slot, chunk_digests=digests))
    entry = MarkerRank(file_bytes=len(data), root_digest=slot.root_digest, layout_hash=layout.hash)
    write_marker(path, Marker(job="job", epoch=1, step=3, ranks=(entry,)))
    return path


def raw(tensor: Any) -> bytes:
    found: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def test_durable_snapshot_is_a_source_like_any_other(tmp_path: Path) -> None:
    """Nobody could go on with a job's own snapshots in another framework."""
    random.seed(1)
    (layout, data), net, optimizer, scheduler = captured()
    path = persisted(tmp_path / "d", layout, data)
    assert detect(path) == "snapshot"
    convert(path, tmp_path / "u", to="universal")
    state = read(tmp_path / "u")
    assert diff(read(path), state) == []
    assert state.step == 3
    assert state.tied == {"head.weight": "embed.weight"}
    assert state.frozen == ["frozen.weight"]
    for name, p in net.named_parameters():
        assert raw(p) == read_all(state.of_kind("model")[name].view).tobytes()
    for name, b in net.named_buffers():
        assert raw(b) == read_all(state.of_kind("buffer")[name].view).tobytes()
    owners = {id(p): name for name, p in net.named_parameters()}
    for p, values in optimizer.state.items():
        for kind, value in values.items():
            assert raw(value) == read_all(state.of_kind(kind)[owners[id(p)]].view).tobytes()
    assert [group["names"] for group in state.param_groups] == [["embed.weight"], ["norm.weight", "norm.bias"]]
    assert [group["weight_decay"] for group in state.param_groups] == [0.01, 0.0]
    assert scheduler.last_epoch == state.extra["lr_scheduler"]["last_epoch"]
    assert raw(torch.get_rng_state()) == read_all(state.of_kind("rng")["0"].view).tobytes()
    assert state.extra["data"]["epoch"] == 1
    order = state.extra["data"]["order"]["$tensor"]
    assert raw(torch.arange(2000)) == read_all(state.of_kind("extra")[order].view).tobytes()
    for to in ("torch", "dcp"):
        target = tmp_path / f"{to}.pt"
        convert(tmp_path / "u", target, to=to)
        assert diff(state, read(target)) == []
        assert 4 == read(target).step


def test_frameworks_are_told_how_many_steps_were_made(tmp_path: Path) -> None:
    """DeepSpeed or Megatron-LM would make the last step a second time, with the learning rate of the one before."""
    (layout, data), *_ = captured()
    durable = persisted(tmp_path / "d", layout, data)
    convert(durable, tmp_path / "u", to="universal")
    for i, source in enumerate((durable, tmp_path / "u")):
        convert(source, tmp_path / f"ds{i}", to="deepspeed")
        folder = tmp_path / f"ds{i}" / "global_step4_universal"
        saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
        assert 4 == saved["global_steps"]
        assert 4 == read(tmp_path / f"ds{i}").step
        assert [] == diff(read(durable), read(tmp_path / f"ds{i}"))
        convert(source, tmp_path / f"t{i}.pt", to="torch")
        assert 4 == torch.load(tmp_path / f"t{i}.pt", weights_only=True)["step"]
    convert(tmp_path / "ds1", tmp_path / "again", to="universal")
    assert (3, 4) == (read(tmp_path / "u").step, read(tmp_path / "again").step)
    assert 4 == read(tmp_path / "u").steps_made == read(tmp_path / "again").steps_made


def test_megatron_is_told_how_many_steps_were_made(tmp_path: Path) -> None:
    convert(FIXTURES / "megatron_tp2_pp2" / "ckpt", tmp_path / "u", to="universal")
    marker = tmp_path / "u" / "universal.json"
    manifest = json.loads(marker.read_text())
    assert ("megatron", 4) == (manifest["source"]["format"], manifest["step"])
    for origin, count in (("megatron", 4), ("snapshot", 5)):
        marker.write_text(json.dumps({**manifest, "source": {"format": origin}}))
        target = tmp_path / origin
        convert(tmp_path / "u", target, to="megatron", layout={"tp": 2})
        assert str(count) == (target / "latest_checkpointed_iteration.txt").read_text()
        assert (count, True) == (read(target).step, (target / f"iter_{count:07d}").is_dir())
        assert [] == diff(read(tmp_path / "u"), read(target))


def test_rotten_rank_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    (layout, data), *_ = captured()
    path = persisted(tmp_path / "d", layout, data)
    file = path / "rank-000000.safetensors"
    broken = bytearray(file.read_bytes())
    broken[layout.data_begin + 3] ^= 1
    file.chmod(0o600)
    file.write_bytes(broken)
    with pytest.raises(CorruptionError, match="rank-000000"):
        convert(path, tmp_path / "u", to="universal")
    assert not (tmp_path / "u" / "universal.json").exists()


def test_a_snapshot_beside_another_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect`` looks for snapshots itself, before any other format."""
    (layout, data), *_ = captured()
    path = persisted(tmp_path / "d", layout, data)
    convert(path, tmp_path / "dcp", to="dcp")
    shutil.copytree(tmp_path / "dcp", path, dirs_exist_ok=True)
    for words in ("inspect", "verify"):
        assert UsageError.exit_code == main([words, str(path)])
        assert "several formats: snapshot (snapshot.json), dcp (.metadata)" in capsys.readouterr().err
        assert 0 == main([words, str(path), "--from", "snapshot"])
        capsys.readouterr()
