"""Folders of trainers whose weights are files of torch.save, and trees that hold more than one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import detect, read
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")


def trained(optimizer: Any = torch.optim.AdamW, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    made = optimizer(net.parameters(), **options)

    def closure() -> Any:
        made.zero_grad()
        loss = net(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    made.step(closure)
    return net, made


def raw(tensor: Any) -> bytes:
    data: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def put_weights(kind: str, folder: Path, weights: dict[str, Any]) -> None:
    folder.mkdir()
    if kind != "sharded":
        torch.save(weights, folder / kind)
        return
    names = list(weights)
    places = {name: f"pytorch_model-0000{1 + (name in names[3:])}-of-00002.bin" for name in names}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("names", ["numbers", "names"])
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "pytorch_model_fsdp.bin", "sharded"])
def test_what_lies_beside_weights_of_torch_is_read(kind: str, names: str, tmp_path: Path) -> None:
    """Without the optimizer, training would begin anew, and nothing would have said so."""
    net, optimizer = trained()
    put_weights(kind, tmp_path / "c", net.state_dict())
    owners = {id(p): name for name, p in net.named_parameters()}
    saved = optimizer.state_dict()
    if names == "names":  # as FSDP gives it out
        order = list(owners.values())
        groups = [{**group, "params": [order[i] for i in group["params"]]} for group in saved["param_groups"]]
        saved = {"state": {order[i]: fields for i, fields in saved["state"].items()}, "param_groups": groups}
    torch.save(saved, tmp_path / "c" / "optimizer.bin")
    torch.save({"last_epoch": 7}, tmp_path / "c" / "scheduler.bin")
    torch.save({"torch_manual_seed": torch.get_rng_state()}, tmp_path / "c" / "random_states_0.pkl")
    (tmp_path / "c" / "trainer_state.json").write_text('{"global_step": 7}')
    assert "torch" == detect(tmp_path / "c")
    state = read(tmp_path / "c")
    state.check()
    for p, values in optimizer.state.items():
        for kind_, value in values.items():
            assert raw(value) == read_all(state.of_kind(kind_)[owners[id(p)]].view).tobytes(), kind_
    assert [list(owners.values())] == [group["names"] for group in state.param_groups]
    assert {"last_epoch": 7} == state.extra["lr_scheduler"]
    assert ["0"] == list(state.of_kind("rng"))
    assert 7 == state.step


@pytest.mark.parametrize("file", ["model_1.safetensors", "pytorch_model_1.bin", "optimizer_1.bin"])
def test_further_models_of_accelerate_are_told(file: str, tmp_path: Path) -> None:
    net, optimizer = trained()
    put_weights("pytorch_model.bin", tmp_path / "c", net.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "c" / "optimizer.bin")
    (tmp_path / "c" / file).write_bytes(b"another")
    assert any(line.startswith(f"{file} is of another") for line in read(tmp_path / "c", "torch").warnings)


def test_an_optimizer_without_state_for_each_parameter_is_kept(tmp_path: Path) -> None:
    """LBFGS has the whole model in one vector, under the first parameter's number."""
    net, optimizer = trained(torch.optim.LBFGS, max_iter=4, history_size=3)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    state = read(tmp_path / "c.pt")
    state.check()
    assert list(net.state_dict()) == list(state.of_kind("model"))
    (said,) = state.warnings
    assert "kept in extra.optimizer, without the model's names" in said
    found = {name: raw(value) for name, value in optimizer.state_dict()["state"][0].items() if torch.is_tensor(value)}
    assert found == {
        name: read_all(state.of_kind("extra")[f"optimizer.state.0.{name}"].view).tobytes() for name in found
    }
    for to in ("universal", "dcp", "torch"):
        convert(tmp_path / "c.pt", tmp_path / to, to=to)
        assert [] == diff(state, read(tmp_path / to))


def test_two_models_with_their_optimizers_are_kept(tmp_path: Path) -> None:
    """A GAN's: one of them is the model, nothing of the other is lost."""
    small, its_optimizer = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    torch.manual_seed(4)
    large = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 5))
    optimizer = torch.optim.Adam(large.parameters())
    large(torch.ones(1, 9)).sum().backward()
    optimizer.step()
    tree = {
        "G": large.state_dict(),
        "D": small.state_dict(),
        "opt_G": optimizer.state_dict(),
        "opt_D": its_optimizer.state_dict(),
    }
    torch.save(tree, tmp_path / "c.pt")
    state = read(tmp_path / "c.pt")
    state.check()
    assert list(large.state_dict()) == list(state.of_kind("model"))
    extra = state.of_kind("extra")
    for name, value in small.state_dict().items():
        assert raw(value) == read_all(extra[f"D.{name}"].view).tobytes()
    assert raw(optimizer.state_dict()["state"][1]["exp_avg"]) == read_all(extra["opt_G.state.1.exp_avg"].view).tobytes()
    convert(tmp_path / "c.pt", tmp_path / "u", to="universal")
    assert [] == diff(state, read(tmp_path / "u"))


def test_two_models_in_dcp_are_kept_apart(tmp_path: Path) -> None:
    """A GAN's nets of one class have the same names in all that is theirs."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    net, optimizer = trained()
    order = [name for name, _ in net.named_parameters()]
    groups = [{**group, "params": order} for group in optimizer.state_dict()["param_groups"]]
    states = {order[i]: fields for i, fields in optimizer.state_dict()["state"].items()}
    ones = {name: {"exp_avg": torch.ones(2)} for name in order}
    tree = {
        "generator": net.state_dict(),
        "discriminator": {name: value + 1 for name, value in net.state_dict().items()},
        "opt_g": {"state": states, "param_groups": groups},
        "opt_d": {"state": ones, "param_groups": [{"params": order, "lr": 0.5}]},
    }
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    state = read(tmp_path / "c")
    state.check()
    for name, value in net.state_dict().items():
        assert raw(value) == read_all(state.of_kind("model")[name].view).tobytes()
        assert raw(value + 1) == read_all(state.of_kind("extra")[f"discriminator.{name}"].view).tobytes()
        assert raw(states[name]["exp_avg"]) == read_all(state.of_kind("exp_avg")[name].view).tobytes()
        assert raw(torch.ones(2)) == read_all(state.of_kind("extra")[f"opt_d.state.{name}.exp_avg"].view).tobytes()
    assert [order] == [group["names"] for group in state.param_groups]
    assert 0.5 == state.extra["opt_d"]["param_groups"][0]["lr"]
    assert ["opt_d.state"] == [line.split()[0] for line in state.warnings]
    for to in ("universal", "dcp", "torch"):
        convert(tmp_path / "c", tmp_path / to, to=to)
        assert [] == diff(state, read(tmp_path / to))


def test_two_optimizers_of_accelerate_in_dcp_keep_their_groups(tmp_path: Path) -> None:
    """Both folders have the key optimizer.param_groups.0.lr."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    weights = {"a": torch.ones(2), "b": torch.ones(3)}
    parts = {
        "pytorch_model_fsdp_0": {"model": weights},
        "optimizer_0": {"optimizer": _optimizer_of("a", weights["a"], 0.1)},
        "optimizer_1": {"optimizer": _optimizer_of("b", weights["b"], 0.2)},
    }
    for folder, tree in parts.items():
        dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c" / folder), no_dist=True)
    state = read(tmp_path / "c")
    state.check()
    assert [(["a"], 0.1), (["b"], 0.2)] == [(group["names"], group["lr"]) for group in state.param_groups]
    assert ["a", "b"] == sorted(state.of_kind("exp_avg"))


def _optimizer_of(name: str, weight: Any, lr: float) -> dict[str, Any]:
    return {"state": {name: {"exp_avg": torch.zeros_like(weight)}}, "param_groups": [{"params": [name], "lr": lr}]}
