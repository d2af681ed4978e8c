"""Files of tensor-parallel ranks: put together by rules, and cut by them; a DeepSpeed run that records nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal import open as open_checkpoint
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import detect, read
from snapshotd.universal.rules import load_rules
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")

from tests.fixtures import model as tiny  # noqa: E402
from tests.universal.test_deepspeed_make import Run, zero12  # noqa: E402
from tests.universal.test_deepspeed_tp import CUTS, SHAPES, shards_of  # noqa: E402

RULES = """
version = 1
[sizes]
q = 4
kv = 2
[[rule]]
names = "**.attn.qkv.{weight,bias}"
how = "sharded"
parts = ["q", "kv", "kv"]
[[rule]]
names = "**.mlp.gate_up.weight"
how = "sharded"
parts = 2
[[rule]]
names = ["**.attn.out.weight", "**.mlp.down.weight"]
how = "sharded"
dim = 1
[[rule]]
names = ["embed.weight", "lm_head.weight", "logit_bias"]
how = "sharded"
vocabulary = 97
multiple = 4
[[rule]]
names = ["pos.weight", "**.norm1.weight", "**.norm2.weight", "final_norm.weight", "**.gain"]
how = "replicated"
[[rule]]
names = "odd_in"
how = "flattened"
shape = [37]
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    (tmp_path / "rules.toml").write_text(RULES)
    return str(tmp_path / "rules.toml")


def trained() -> tuple[Any, Any, dict[str, Any]]:
    """A model after two steps, its optimizer, and what a single process saves."""
    cfg = tiny.Cfg()
    model = tiny.build(cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = tiny.groups_of(model, "decay")
    optimizer = torch.optim.AdamW([{**g, "params": [(names[id(p)], p) for p in g["params"]]} for g in groups])
    for step in range(2):
        tiny.loss_of(model, cfg, *tiny.batch(cfg, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2, "rng": torch.get_rng_state()}
    return model, optimizer, saved


def cut(name: str, whole: Any, rank: int, ranks: int) -> Any:
    """A tensor as rank ``rank`` has it, by hand."""

    def piece(part: Any, dim: int = 0) -> Any:
        return part.tensor_split(ranks, dim)[rank]

    if whole.dim() == 0:
        return whole
    if "attn.qkv" in name:
        rows = whole.shape[0] // 8
        return torch.cat([piece(part) for part in whole.split([4 * rows, 2 * rows, 2 * rows])])
    if "gate_up" in name:
        return torch.cat([piece(part) for part in whole.chunk(2)])
    if "attn.out" in name or "mlp.down" in name:
        return piece(whole, 1).contiguous()
    if name in ("embed.weight", "lm_head.weight", "logit_bias"):
        rows = -(-97 // (4 * ranks)) * 4 * ranks
        padding = torch.full((rows - 97, *whole.shape[1:]), 7.0)  # padding is trained, too
        return piece(torch.cat([whole, padding]))
    if name == "odd_in":
        return piece(torch.cat([whole, torch.zeros(-37 % ranks)]))
    return whole


def save_ranks(folder: Path, saved: dict[str, Any], ranks: int, pattern: str) -> None:
    optimizer = saved["optimizer"]
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    for rank in range(ranks):
        mine = dict(saved)
        mine["model"] = {name: cut(name, tensor, rank, ranks).clone() for name, tensor in saved["model"].items()}
        states = {
            i: {kind: cut(names[i], value, rank, ranks).clone() for kind, value in state.items()}
            for i, state in optimizer["state"].items()
        }
        mine["optimizer"] = {"state": states, "param_groups": copy.deepcopy(optimizer["param_groups"])}
        mine["rng"] = torch.full((16,), rank, dtype=torch.uint8)
        path = folder / pattern.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(mine, path)


@pytest.mark.parametrize("pattern", ["model_rank_{}.pt", "consolidated.{:02d}.pth", "mp_rank_{:02d}/model.pt"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_the_whole_bit_for_bit(pattern: str, ranks: int, tmp_path: Path, rules: str) -> None:
    """Somebody has a model of tensor-parallel ranks from a trainer of their own, and wants to go on elsewhere."""
    _, _, saved = trained()
    torch.save(saved, tmp_path / "whole.pt")
    save_ranks(tmp_path / "ranks", saved, ranks, pattern)
    assert "torch" == detect(tmp_path / "ranks")
    report = convert(tmp_path / "ranks", tmp_path / "u", to="universal", rules=rules)
    assert report.warnings == []
    found, expected = read(tmp_path / "u"), read(tmp_path / "whole.pt")
    generators = found.of_kind("rng")
    assert [str(rank) for rank in range(ranks)] == list(generators)
    assert [ranks - 1] * 16 == read_all(generators[str(ranks - 1)].view).tolist()
    found.tensors = [tensor for tensor in found.tensors if tensor.kind != "rng"]
    expected.tensors = [tensor for tensor in expected.tensors if tensor.kind != "rng"]
    assert [] == diff(expected, found)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_is_cut_for_ranks_and_comes_back_without_rules(ranks: int, tmp_path: Path, rules: str) -> None:
    """What we cut must be what the trainer would have cut, and we must know it again ourselves."""
    _, _, saved = trained()
    torch.save(saved, tmp_path / "whole.pt")
    convert(tmp_path / "whole.pt", tmp_path / "ranks", to="torch", layout={"tp": ranks}, rules=rules)
    names = [name for group in saved["optimizer"]["param_groups"] for name in group["param_names"]]
    assert [f"model_rank_{rank}.pt" for rank in range(ranks)] == sorted(p.name for p in (tmp_path / "ranks").iterdir())
    for rank in range(ranks):
        mine = torch.load(tmp_path / "ranks" / f"model_rank_{rank}.pt", weights_only=True)
        for name, tensor in saved["model"].items():
            expected = cut(name, tensor, rank, ranks)
            expected = torch.where(expected == 7.0, 0.0, expected) if expected.is_floating_point() else expected
            assert torch.equal(expected, mine["model"][name]), name
        for i, state in saved["optimizer"]["state"].items():
            shape = cut(names[i], state["exp_avg"], rank, ranks).shape
            assert shape == mine["optimizer"]["state"][i]["exp_avg"].shape
    assert [] == diff(read(tmp_path / "whole.pt"), read(tmp_path / "ranks"))


def test_what_is_missing_or_does_not_belong_is_refused_by_name(tmp_path: Path, rules: str) -> None:
    _, _, saved = trained()
    folder = tmp_path / "ranks"
    save_ranks(folder, saved, 4, "model_rank_{}.pt")
    with pytest.raises(UsageError, match=r"layers.0.attn.qkv.weight.*give --rules"):
        read(folder)
    (tmp_path / "few.toml").write_text('version = 1\n[[rule]]\nnames = "**.{weight,bias}"\nhow = "replicated"')
    with pytest.raises(UsageError, match="no rule covers odd_in, logit_bias, layers.0.gain, .*layers.3.gain, and one"):
        read(folder, rules=load_rules(str(tmp_path / "few.toml")))
    (tmp_path / "idle.toml").write_text(RULES + '[[rule]]\nnames = "nobody.*"\nhow = "replicated"')
    with pytest.raises(UsageError, match="nothing is matched by nobody"):
        convert(folder, tmp_path / "u", to="universal", rules=str(tmp_path / "idle.toml"))
    (folder / "model_rank_2.pt").rename(tmp_path / "gone.pt")
    with pytest.raises(FormatError, match="model_rank_2.pt is missing: there are files of the ranks 0, 1, 3"):
        read(folder, rules=load_rules(rules))
    torch.save({**saved, "step": 5}, folder / "model_rank_2.pt")
    with pytest.raises(FormatError, match="model_rank_2.pt is of step 5, .*model_rank_0.pt of step 2"):
        read(folder, rules=load_rules(rules))
    mine = torch.load(tmp_path / "gone.pt", weights_only=True)
    del mine["model"]["pos.weight"]
    torch.save(mine, folder / "model_rank_2.pt")
    with pytest.raises(FormatError, match="model_rank_2.pt has no model of pos.weight"):
        read(folder, rules=load_rules(rules))


def test_layouts_that_torch_files_do_not_have(tmp_path: Path, rules: str) -> None:
    _, _, saved = trained()
    torch.save(saved, tmp_path / "whole.pt")
    with pytest.raises(UsageError, match="--layout tp=N"):
        convert(tmp_path / "whole.pt", tmp_path / "x", to="torch", layout={"pp": 2}, rules=rules)
    with pytest.raises(UsageError, match="nothing says how to cut these for tp=2: odd_in, .*lm_head.weight;"):
        convert(tmp_path / "whole.pt", tmp_path / "x", to="torch", layout={"tp": 2})
    with pytest.raises(UsageError, match="of layers.0.attn.qkv.weight cannot be divided over 3 ranks"):
        convert(tmp_path / "whole.pt", tmp_path / "x", to="torch", layout={"tp": 3}, rules=rules)
    assert ["rules.toml", "whole.pt"] == sorted(path.name for path in tmp_path.iterdir())


def test_steps_in_numbered_files_are_no_ranks(tmp_path: Path) -> None:
    for step in range(3):
        torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / f"checkpoint_{step}.pt")
    with pytest.raises(UsageError, match="not a checkpoint"):
        detect(tmp_path)


def test_deepspeed_ranks_that_record_nothing_take_rules(tmp_path: Path) -> None:
    """HF Trainer and accelerate write no patterns: their tensor-parallel runs could not be read at all."""
    run = Run(shapes=SHAPES)
    for t, part in enumerate(shards_of(run, CUTS, 2)):
        more = {"mp_world_size": 2, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}
        zero12(tmp_path / "ds", part, 2, mp=t, more=more)
    with pytest.raises(UsageError, match=r"no universal_checkpoint_info.*attn.qkv.bias.*give --rules"):
        read(tmp_path / "ds")
    (tmp_path / "r.toml").write_text(
        """
        version = 1
        [[rule]]
        names = "attn.qkv.{weight,bias}"
        how = "sharded"
        parts = [8, 4, 4]
        ranks = [3, 1]
        [[rule]]
        names = "mlp.gate_up.weight"
        how = "sharded"
        parts = 2
        uneven = true
        [[rule]]
        names = "pos.*"
        how = "replicated"
        [[rule]]
        names = ["attn.out.weight", "mlp.down.weight"]
        how = "sharded"
        dim = 1
        uneven = true
        [[rule]]
        names = "embed.weight"
        how = "sharded"
        vocabulary = 13
        [[rule]]
        names = "norm.weight"
        how = "replicated"
        """
    )
    opened = open_checkpoint(tmp_path / "ds", rules=str(tmp_path / "r.toml"))
    truth = run.truth()
    for lazy in opened:
        if lazy.kind not in ("step", "rng"):
            assert torch.equal(truth[f"{lazy.kind}/{lazy.name}"], lazy.torch()), lazy
