"""DCP checkpoints of every key convention, written by torch on the spot; and broken ones."""

from __future__ import annotations

import enum
import io
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.errors import CorruptionError, FormatError
from snapshotd.universal.readers import detect, read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


class Net(torch.nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)])
        self.frozen = torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.register_buffer("table", torch.randn(5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.layers[1](self.layers[0](self.embed(ids))))


def trained(*, groups: bool = False, tied: bool = False, kind: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(3)
    net = Net(tied=tied)
    params = [p for p in net.parameters() if p.requires_grad]
    if groups:
        matrices = [p for p in params if p.ndim > 1]
        params = [{"params": matrices}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = (kind or torch.optim.AdamW)(params, lr=0.01)
    for _ in range(2):
        net(torch.arange(11)).sum().backward()
        optimizer.step()
    return net, optimizer


def dicts(net: Any, optimizer: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    found: tuple[dict[str, Any], dict[str, Any]] = get_state_dict(net, optimizer, options=StateDictOptions(**options))
    return found


def save(state: dict[str, Any], path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)
    return path


def check(state: State, net: Any, optimizer: Any) -> None:
    """The state has what the live objects have, under the model's names."""
    state.check()
    named = dict(net.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    assert frozen == state.frozen
    assert [name for name, _ in net.named_buffers()] == [t.name for t in state.tensors if t.kind == "buffer"] or {
        name for name, _ in net.named_buffers()
    } == set(state.of_kind("buffer"))
    for name, p in named.items():
        assert p.detach().numpy().tobytes() == read_all(state.of_kind("model")[name].view).tobytes(), name
    owners = {id(p): name for name, p in named.items()}
    for p, values in optimizer.state.items():
        for kind, value in values.items():
            if value is not None:
                found = state.of_kind(kind)[owners[id(p)]]
                assert value.numpy().tobytes() == read_all(found.view).tobytes(), (kind, owners[id(p)])
    expected = [[owners[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert [set(names) for names in expected] == [set(group["names"]) for group in state.param_groups]
    for group, there in zip(optimizer.param_groups, state.param_groups, strict=True):
        for key, value in group.items():
            if key != "params":
                assert there[key] == (list(value) if isinstance(value, tuple) else value), key


def test_metadata_that_names_its_enums_is_read(tmp_path: Path) -> None:
    """Under Python 3.11.0 to 3.11.3 (Debian 12) each checkpoint of DCP has an enum that is saved by its name."""

    class ByName(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented

    net, optimizer = trained()
    model, optim = dicts(net, optimizer)
    path = save({"model": model, "optim": optim, "step": 2}, tmp_path / "c") / ".metadata"
    found = io.BytesIO()
    ByName(found).dump(dcp.FileSystemReader(path.parent).read_metadata())
    path.write_bytes(found.getvalue())
    assert b"getattr" in found.getvalue()
    check(read(tmp_path / "c"), net, optimizer)


CONVENTIONS = {
    "plain": lambda m, o: {"model": m, "optim": o, "step": 2},
    "optimizer": lambda m, o: {"model": m, "optimizer": o, "trainer": {"global_step": 2}},
    "lightning": lambda m, o: {"model": m, "optimizer_0": o, "global_step": 2},
    "app": lambda m, o: {"app": {"model": m, "optim": o}, "train_state": {"step": 2}},
    "state_dict": lambda m, o: {"state_dict": m, "opt": o, "iteration": 2},
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention: str, flat: bool, tmp_path: Path) -> None:
    """A trainer's own choice of keys would make its checkpoint unreadable."""
    net, optimizer = trained(groups=True)
    model, optim = dicts(net, optimizer, flatten_optimizer_state_dict=flat)
    state = read(save(CONVENTIONS[convention](model, optim), tmp_path / "c"))
    check(state, net, optimizer)
    assert state.step == 2


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "Adafactor", "NAdam"])
def test_any_optimizer(kind: str, tmp_path: Path) -> None:
    """Whoever does not use Adam would lose the optimizer's state."""
    make = getattr(torch.optim, kind)
    net, optimizer = trained(kind=(lambda p, lr: make(p, lr=lr, momentum=0.9)) if kind == "SGD" else make)
    model, optim = dicts(net, optimizer)
    check(read(save({"model": model, "optim": optim}, tmp_path / "c")), net, optimizer)


def test_torchtitan_has_everything_at_the_top(tmp_path: Path) -> None:
    """The names of weights and the trainer's own sections stand side by side."""
    net, optimizer = trained(groups=True)
    model, optim = dicts(net, optimizer, flatten_optimizer_state_dict=True)
    other = {"lr_scheduler": {"last_epoch": 2}, "dataloader": {"dp_rank_0": b"abc"}, "train_state": {"step": 2}}
    state = read(save({**model, **optim, **other}, tmp_path / "c"))
    check(state, net, optimizer)
    assert state.step == 2
    assert {"lr_scheduler", "dataloader", "train_state"} == set(state.extra)


def twins(seed: int) -> tuple[Any, Any]:
    """A model whose names begin with numbers, and an optimizer with two groups of equal hyperparameters."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    groups = [{"params": list(net[0].parameters())}, {"params": [*net[1].parameters(), *net[2].parameters()]}]
    return net, torch.optim.AdamW(groups, lr=0.01)


def stepped(net: Any, optimizer: Any) -> list[float]:
    losses = []
    for i in range(3):
        loss = net(torch.linspace(-1, 1 + i, 20).reshape(5, 4)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["theirs", "dcp", "dcp again", "universal", "dcp by StorageReader"])
def test_equal_groups_of_a_flattened_optimizer_find_their_way_back(way: str, tmp_path: Path) -> None:
    """Nothing tells such groups apart; each parameter's hyperparameters are known, and that is what is asked for."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    from snapshotd.universal import convert
    from snapshotd.universal.storage import StorageReader

    net, optimizer = twins(1)
    stepped(net, optimizer)
    model, optim = dicts(net, optimizer, flatten_optimizer_state_dict=True)
    save({"model": model, "optim": optim}, tmp_path / "theirs")
    expected = stepped(net, optimizer)
    report = convert(tmp_path / "theirs", tmp_path / "universal", to="universal")
    assert ["groups that were equal are one now"] == [line[-34:] for line in report.warnings]
    convert(tmp_path / "universal", tmp_path / "dcp", to="dcp", layout={"dp": 2})
    convert(tmp_path / "dcp", tmp_path / "dcp again", to="dcp")
    place = tmp_path / way.removesuffix(" by StorageReader")
    reader = dcp.FileSystemReader(place) if way in ("theirs", "dcp", "dcp again") else StorageReader(place)
    net, optimizer = twins(2)
    model, optim = dicts(net, optimizer, flatten_optimizer_state_dict=True)
    state = {"model": model, "optim": optim}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state["optim"], options=flat)
    assert [2, 4] == [len(group["params"]) for group in optimizer.param_groups]
    assert expected == stepped(net, optimizer)


def test_groups_that_are_known_are_not_warned_of(tmp_path: Path) -> None:
    """A warning that is always there is read by nobody."""
    net, optimizer = trained(groups=True)
    for flat in (False, True):
        model, optim = dicts(net, optimizer, flatten_optimizer_state_dict=flat)
        state = read(save({"model": model, "optim": optim}, tmp_path / f"{flat}"))
        assert flat == any("groups are not recorded" in line for line in state.warnings)
    each = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(p for p in net.parameters() if p.requires_grad)]
    model, optim = dicts(net, torch.optim.AdamW(each), flatten_optimizer_state_dict=True)
    state = read(save({"model": model, "optim": optim}, tmp_path / "each"))
    assert (len(each), []) == (len(state.param_groups), state.warnings)


def test_accelerate_has_two_folders(tmp_path: Path) -> None:
    """The optimizer lies in a second checkpoint beside the model's."""
    net, optimizer = trained()
    model, optim = dicts(net, optimizer)
    save({"model": model}, tmp_path / "c" / "pytorch_model_fsdp_0")
    save({"optimizer": optim}, tmp_path / "c" / "optimizer_0")
    assert detect(tmp_path / "c") == "dcp"
    check(read(tmp_path / "c"), net, optimizer)


def test_numbers_instead_of_names(tmp_path: Path) -> None:
    """accelerate's optimizers may have torch's own numbers."""
    net, optimizer = trained(groups=True)
    state = read(save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c"))
    check(state, net, optimizer)


def test_tied_weights_are_found(tmp_path: Path) -> None:
    """Stored twice, trained once: an untied copy would stay behind after the next step."""
    net, optimizer = trained(tied=True)
    model, optim = dicts(net, optimizer)
    assert "head.weight" in model
    state = read(save({"model": model, "optim": optim}, tmp_path / "c"))
    check(state, net, optimizer)
    assert state.tied == {"head.weight": "embed.weight"}


def test_model_alone(tmp_path: Path) -> None:
    net, _ = trained()
    for state_dict in ({"model": net.state_dict()}, net.state_dict()):
        state = read(save(state_dict, tmp_path / f"c{len(state_dict)}"))
        found = state.of_kind("model") | state.of_kind("buffer")
        assert list(net.state_dict()) == list(found) or set(net.state_dict()) == set(found)


@pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"thread_count": 3}])
def test_several_files_per_rank(options: dict[str, Any], tmp_path: Path) -> None:
    net, optimizer = trained()
    model, optim = dicts(net, optimizer)
    check(read(save({"model": model, "optim": optim}, tmp_path / "c", **options)), net, optimizer)


def test_values_and_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    """A NaN's payload, a -0.0, or a type that is new would be another after the conversion."""
    weird = torch.tensor([0x7F800001, 0x80000000, 0xFFC12345], dtype=torch.int64).to(torch.int32).view(torch.float32)
    tensors = {
        "weird": weird,
        "b": torch.tensor([True, False]),
        "h": torch.randn(3, dtype=torch.float16),
        "bf": torch.randn(2, 3).bfloat16(),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "c": torch.randn(2, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
        "zero": torch.tensor(7),
    }
    state = read(save({"model": tensors, "rng": {"a": (1, 2.5)}, "n": None}, tmp_path / "c"))
    found = state.of_kind("model") | state.of_kind("buffer")
    for name, tensor in tensors.items():
        assert str(tensor.dtype).removeprefix("torch.") == found[name].dtype
        assert tuple(tensor.shape) == found[name].shape
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw == read_all(found[name].view).tobytes(), name
    assert {key: state.extra[key] for key in ("rng", "n")} == {"rng": {"a": [1, 2.5]}, "n": None}


def test_old_metadata_without_paths(tmp_path: Path) -> None:
    """Older versions did not record the paths, nor a version."""
    net, optimizer = trained()
    model, optim = dicts(net, optimizer)
    path = save({"model": model, "optim": optim}, tmp_path / "c")
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 written above
    for name in ("planner_data", "storage_meta", "version"):
        metadata.__dict__.pop(name, None)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    check(read(path), net, optimizer)


def test_hf_storage_of_dcp(tmp_path: Path) -> None:
    """Safetensors shards whose whole shapes stand nowhere."""
    from safetensors.numpy import save_file

    whole = np.arange(35, dtype=np.float32).reshape(7, 5)
    for rank, (begin, end) in enumerate(((0, 4), (4, 7)), start=1):
        info = f'{{"w": {{"saved_offsets": [{begin}, 0]}}}}'
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": info}
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file({"w": whole[begin:end].copy()}, tmp_path / name, metadata)
    assert detect(tmp_path) == "dcp"
    state = read(tmp_path)
    state.check()
    assert whole.tobytes() == read_all(state.of_kind("model")["w"].view).tobytes()
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FormatError, match="shard 1"):
        read(tmp_path)


@pytest.fixture()
def broken(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "dcp_fsdp2_w2" / "ckpt", tmp_path / "c")
    return tmp_path / "c"


def test_missing_metadata_is_an_unfinished_save(broken: Path) -> None:
    (broken / ".metadata").unlink()
    with pytest.raises(FormatError, match=r"\.metadata is missing: the checkpoint was not finished"):
        read(broken)


def test_missing_rank_file_is_named(broken: Path) -> None:
    (broken / "__1_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__1_0\.distcp is missing"):
        read(broken)


def test_truncated_rank_file_is_named(broken: Path) -> None:
    file = broken / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptionError, match=r"__1_0\.distcp has .* cut\s+short"):
        read(broken)


def test_truncated_metadata(broken: Path) -> None:
    file = broken / ".metadata"
    data = file.read_bytes()
    for size in (0, 10, 1000, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(FormatError, match="metadata"):
            read(broken)


def rewrite(path: Path, change: Any) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 a fixture of ours
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_gap_names_tensor_and_region(broken: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["model.embed.weight"].chunks.pop()

    rewrite(broken, change)
    with pytest.raises(FormatError, match=r"model of embed\.weight: the region \[49:97, 0:32\]"):
        read(broken).check()


def test_overlap_names_tensor_region_and_files(broken: Path) -> None:
    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["model.embed.weight"].chunks[1]
        old = torch.Size(chunk.offsets)
        chunk.offsets = torch.Size([48, 0])
        for index in list(metadata.storage_data):
            if index.fqn == "model.embed.weight" and index.offset == old:
                info = metadata.storage_data.pop(index)
                metadata.storage_data[type(index)(index.fqn, chunk.offsets, index.index)] = info

    rewrite(broken, change)
    with pytest.raises(FormatError, match=r"\[48:49, 0:32\] is there twice, in .*__0_0.* and in .*__1_0"):
        read(broken).check()


def test_unknown_version(broken: Path) -> None:
    rewrite(broken, lambda metadata: setattr(metadata, "version", "9.0"))
    with pytest.raises(FormatError, match="9.0"):
        read(broken)


def test_chunk_of_another_shape_is_found_when_read(broken: Path) -> None:
    """Metadata of one save, files of another."""

    def change(metadata: Any) -> None:
        places = metadata.storage_data
        by_name = {index.fqn: index for index in places if index.offset is not None and index.offset[:1] == (0,)}
        one, other = by_name["model.odd_in"], by_name["model.logit_bias"]
        places[one], places[other] = places[other], places[one]

    rewrite(broken, change)
    state = read(broken)
    with pytest.raises(FormatError, match="should be"):
        read_all(state.of_kind("model")["odd_in"].view)


def test_path_outside_of_the_checkpoint_is_refused(broken: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../c/" + info.relative_path

    rewrite(broken, change)
    with pytest.raises(FormatError, match="not a file inside"):
        read(broken)
