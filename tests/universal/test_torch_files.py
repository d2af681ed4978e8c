"""Files of torch.save: what trainers put into them, and hostile ones."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from snapshotd.errors import CorruptionError, FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers import read
from snapshotd.universal.readers.param_ids import names_of_ids
from snapshotd.universal.torchzip import load
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")


def raw(tensor: Any) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def same(value: Any, found: Any) -> bool:
    if isinstance(value, torch.Tensor):
        same_shape = isinstance(found, TensorRef) and found.shape == tuple(value.shape)
        return same_shape and raw(value) == read_all(found.view).tobytes()
    return bool(value == found)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_ranges_of_the_file(legacy: bool, tmp_path: Path) -> None:
    """Views, transposes and shared storages would be read as other numbers."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    value = {
        "base": base,
        "view": base[1:3, 2:5],
        "t": base.t(),
        "step": base[::2, ::3],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "bf": torch.randn(3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "n": [1, None, "x", (2.5, True)],
    }
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = load(str(tmp_path / "x.pt"))
    for key, item in value.items():
        expected = list(item) if key == "n" else item
        assert same(expected, found[key]), key
    assert found["base"].identity != found["view"].identity


def test_new_dtypes(tmp_path: Path) -> None:
    value = {"u": torch.tensor([1, 65535], dtype=torch.uint16), "f": torch.randn(3).to(torch.float8_e5m2)}
    torch.save(value, tmp_path / "x.pt")
    found = load(str(tmp_path / "x.pt"))
    assert {key: item.dtype for key, item in found.items()} == {"u": "uint16", "f": "float8_e5m2"}
    assert all(raw(value[key]) == read_all(found[key].view).tobytes() for key in value)


def archive(
    pickled: bytes, storages: dict[str, bytes], *, method: int = zipfile.ZIP_STORED, order: bytes = b"little"
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/byteorder", order)
        for key, data in storages.items():
            file.writestr(f"a/data/{key}", data)
        file.writestr("a/version", "3\n")
    return out.getvalue()


def tensor_pickle(*, numel: int = 4, offset: int = 0, size: int = 4, stride: int = 1, key: str = "0") -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key.encode()
    storage += b"X\x03\x00\x00\x00cpu" + number(numel) + b"tQ"
    args = storage + number(offset) + b"(" + number(size) + b"t(" + number(stride) + b"t\x89}"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR."


HOSTILE = {
    "too large for its storage": archive(tensor_pickle(size=5), {"0": bytes(16)}),
    "far offset": archive(tensor_pickle(offset=1 << 60), {"0": bytes(16)}),
    "negative offset": archive(tensor_pickle(offset=-4), {"0": bytes(16)}),
    "long stride": archive(tensor_pickle(stride=1 << 40), {"0": bytes(16)}),
    "negative stride": archive(tensor_pickle(stride=-1), {"0": bytes(16)}),
    "negative size": archive(tensor_pickle(size=-1), {"0": bytes(16)}),
    "lying numel": archive(tensor_pickle(numel=1 << 40), {"0": bytes(16)}),
    "missing storage": archive(tensor_pickle(key="7"), {"0": bytes(16)}),
    "bomb": archive(tensor_pickle(numel=1 << 22, size=1 << 22), {"0": bytes(1 << 24)}, method=zipfile.ZIP_DEFLATED),
    "big-endian": archive(tensor_pickle(), {"0": bytes(16)}, order=b"big"),
    "no pickle": archive(b"", {}).replace(b"data.pkl", b"data.abc"),
    "os.system": archive(b"cos\nsystem\n(S'id'\ntR.", {}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(name: str, tmp_path: Path) -> None:
    """A file from somewhere would read other memory, fill it, or run."""
    (tmp_path / "x.pt").write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match=r"x\.pt"):
        load(str(tmp_path / "x.pt"))


def test_the_good_one_of_that_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(archive(tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    found = load(str(tmp_path / "x.pt"))
    assert struct.pack("<4f", 1, 2, 3, 4) == read_all(found.view).tobytes()


def test_directory_that_lies(tmp_path: Path) -> None:
    """Sizes and offsets in the zip's directory that point elsewhere."""
    good = archive(tensor_pickle(), {"0": bytes(16)})
    central = good.index(b"PK\x01\x02")
    for at, value in ((20, 1 << 31), (24, 1 << 31), (42, 1 << 31), (42, 5)):
        data = bytearray(good)
        data[central + at : central + at + 4] = struct.pack("<I", value)
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(FormatError):
            load(str(tmp_path / "x.pt"))


def test_every_truncation_and_many_flips_end_in_our_errors(tmp_path: Path) -> None:
    """A torn copy would end in an error that nobody understands, or in wrong numbers without one."""
    torch.save({"a": torch.arange(300), "b": [1, {"c": torch.ones(3)}]}, tmp_path / "x.pt")
    torch.save({"a": torch.arange(9)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    dice = random.Random(3)
    for name in ("x.pt", "old.pt"):
        good = (tmp_path / name).read_bytes()
        for size in range(0, len(good), max(1, len(good) // 60)):
            (tmp_path / "t.pt").write_bytes(good[:size])
            with pytest.raises(CorruptionError):
                load(str(tmp_path / "t.pt"))
        for _ in range(200):
            data = bytearray(good)
            data[dice.randrange(len(data))] = dice.randrange(256)
            (tmp_path / "t.pt").write_bytes(data)
            with contextlib.suppress(CorruptionError):
                load(str(tmp_path / "t.pt"))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.a = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Any) -> Any:
        return self.head(self.norm(self.a(self.embed(ids))))


def trained(*, named: bool = False) -> tuple[Any, Any]:
    net = Net()
    pairs = list(net.named_parameters())
    decay = [(n, p) if named else p for n, p in pairs if p.ndim > 1]
    plain = [(n, p) if named else p for n, p in pairs if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0}], lr=0.1)
    net(torch.arange(7)).sum().backward()
    optimizer.step()
    return net, optimizer


SHAPES = {
    "usual": lambda m, o: {"model": m, "optimizer": o, "epoch": 3, "step": 1},
    "pytorch docs": lambda m, o: {"model_state_dict": m, "optimizer_state_dict": o, "loss": 0.5, "global_step": 1},
    "lightning": lambda m, o: {"state_dict": m, "optimizer_states": [o], "lr_schedulers": [], "global_step": 1},
    "nested": lambda m, o: {"state": {"net": m, "opt": o}, "iteration": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_become_names_and_shared_storages_ties(shape: str, tmp_path: Path) -> None:
    """Moments would go to other parameters than they belong to."""
    net, optimizer = trained()
    torch.save(SHAPES[shape](net.state_dict(), optimizer.state_dict()), tmp_path / "x.pt")
    state = read(tmp_path / "x.pt")
    state.check()
    assert state.tied == {"head.weight": "embed.weight"}
    assert list(state.of_kind("buffer")) == ["count"]
    assert state.step == 1
    owners = {id(p): name for name, p in net.named_parameters()}
    for p, values in optimizer.state.items():
        for kind, value in values.items():
            assert raw(value) == read_all(state.of_kind(kind)[owners[id(p)]].view).tobytes()
    expected = [[owners[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert expected == [group["names"] for group in state.param_groups]


def test_recorded_names_are_used(tmp_path: Path) -> None:
    if not hasattr(torch.optim.Optimizer, "_process_value_according_to_param_policy"):
        pytest.skip("an older torch")
    try:
        net, optimizer = trained(named=True)
    except (TypeError, ValueError):
        pytest.skip("torch before 2.6 takes no names")
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    state = read(tmp_path / "x.pt")
    assert state.warnings == []
    assert [
        group["names"] for group in state.param_groups
    ] == [["embed.weight", "a.weight"], ["a.bias", "norm.weight", "norm.bias"]]


def test_a_module_saved_whole_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read(tmp_path / "x.pt")


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="does not fit"):
        names_of_ids([{"params": [0, 1]}], {0: (3,), 1: (4,)}, {"a": (4,), "b": (3,)})


def test_ids_that_fit_in_two_ways_are_said_to_be_guessed() -> None:
    groups = [{"params": [0], "weight_decay": 0.1}, {"params": [1], "weight_decay": 0.0}]
    names, warning = names_of_ids(groups, {0: (4,), 1: (4,)}, {"proj": (4,), "norm": (4,)})
    assert warning is not None
    assert {0, 1} == set(names)


def test_target_inside_of_the_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must not be the source"):
        convert(tmp_path, tmp_path / "x", to="universal")
