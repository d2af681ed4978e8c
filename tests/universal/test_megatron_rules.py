"""Megatron checkpoints with modules that Megatron-core does not know: how ranks share these, the user's rules say."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd import cli
from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal import open as open_checkpoint
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from snapshotd.universal.readers.megatron_names import in_list_order, order_of
from snapshotd.universal.readers.megatron_padding import padding_of
from snapshotd.universal.rules import load_rules
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.stream import Settings
from snapshotd.universal.views import read_all, stored_bytes
from snapshotd.universal.words import from_float
from snapshotd.universal.writers import universal

torch = pytest.importorskip("torch")

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASE = FIXTURES / "megatron_tp2_pp2" / "ckpt"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
STAGES = (0, 1)
RULES = """
version = 1
[sizes]
words = 21
[[rule]]
names = "**.adapter.out.weight"
how = "sharded"
dim = 1
[[rule]]
names = "**.adapter.scale"
how = "replicated"
[[rule]]
names = "**.adapter.fused.weight"
how = "sharded"
parts = [3, 1]
[[rule]]
names = "decoder.word_table.weight"
how = "sharded"
vocabulary = "words"
multiple = 8
"""


def wholes() -> dict[str, Any]:
    """The custom parameters of the undivided model, two of which are in each stage's first layer."""
    shapes = {"decoder.word_table.weight": (21, 6)}
    for layer in (0, 2):
        shapes[f"decoder.layers.{layer}.adapter.out.weight"] = (8, 32)
        shapes[f"decoder.layers.{layer}.adapter.fused.weight"] = (16, 5)
        shapes[f"decoder.layers.{layer}.adapter.scale"] = (32,)
    dice = torch.Generator().manual_seed(7)
    return {
        name: {kind: torch.randn(shape, generator=dice) for kind in KINDS} for name, shape in sorted(shapes.items())
    }


def cut(name: str, whole: Any, rank: int) -> Any:
    """What tensor rank ``rank`` of 2 has, by hand."""
    if name.endswith("out.weight"):
        return whole[:, :16] if rank == 0 else whole[:, 16:]
    if name.endswith("fused.weight"):
        return torch.cat([whole[6 * rank : 6 * rank + 6], whole[12 + 2 * rank : 14 + 2 * rank]])
    if name.endswith("word_table.weight"):
        return torch.cat([whole, torch.full((11, 6), 7.0)])[16 * rank : 16 * rank + 16]
    return whole


def load(path: Path) -> Any:
    stand_in = type("AttnBackend", (), {"__init__": lambda self, value: None})
    array = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [
        *(argparse.Namespace, signal.Signals, np.ndarray, np.dtype, array, type(np.dtype(np.uint32))),
        (stand_in, "megatron.core.transformer.enums.AttnBackend"),
        (signal.SIGTERM, "signal.SIGTERM"),  # as some versions of Python save it
    ]
    with torch.serialization.safe_globals(allowed):
        values = torch.load(path, weights_only=True)
    values["args"].attention_backend = None
    return values


def add_custom(values: Any, stage: int, rank: int) -> None:
    """Put the custom parameters of a stage behind the others: in the model, its groups, their states and masters."""
    groups = values["optimizer"]["optimizer"]["param_groups"]
    states = values["optimizer"]["optimizer"]["state"]
    kept = [[(states[i], master) for i, master in zip(g["params"], m, strict=True)] for g, m in masters_of(values)]
    for name, kinds in wholes().items():
        layer = int(name.split(".")[2]) // 2 if ".layers." in name else 1
        if layer != stage:
            continue
        local = name.replace("layers.2.", "layers.0.")
        mine = {kind: cut(name, whole, rank).clone() for kind, whole in kinds.items()}
        values["model"][local] = mine["fp32"].to(torch.bfloat16)
        state = {"step": torch.tensor(4.0), "exp_avg": mine["exp_avg"], "exp_avg_sq": mine["exp_avg_sq"]}
        kept[0 if mine["fp32"].dim() > 1 else 1].append((state, mine["fp32"]))
    values["optimizer"]["fp32_from_fp16_params"] = [[master for _, master in group] for group in kept]
    values["optimizer"]["optimizer"]["state"] = dict(enumerate(state for group in kept for state, _ in group))
    count = 0
    for group, members in zip(groups, kept, strict=True):
        group["params"] = list(range(count, count + len(members)))
        count += len(members)


def masters_of(values: Any) -> Any:
    optimizer = values["optimizer"]
    return zip(optimizer["optimizer"]["param_groups"], optimizer["fp32_from_fp16_params"], strict=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The fixture's run with more parameters in it, as a trainer with modules of its own would have saved it."""
    shutil.copytree(CASE, tmp_path / "run")
    for stage in STAGES:
        for rank in (0, 1):
            path = tmp_path / "run" / "iter_0000004" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            values = load(path)
            add_custom(values, stage, rank)
            torch.save(values, path)
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path / "run"


def words_of(state: State) -> dict[tuple[str, str], Any]:
    return {tensor.key: read_all(tensor.view) for tensor in state.tensors}


def test_custom_parameters_are_whole_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """Somebody added an adapter to Megatron's model; without it the whole checkpoint would be of no use elsewhere."""
    report = convert(run, tmp_path / "u", to="universal", rules=str(tmp_path / "rules.toml"))
    assert [] == report.warnings
    state = read(tmp_path / "u")
    found, before = words_of(state), words_of(read(CASE))
    assert [] == [key for key, words in before.items() if not np.array_equal(words, found[key])]
    for name, kinds in wholes().items():
        for kind, whole in kinds.items():
            assert np.array_equal(whole.numpy().view(np.uint32), found[kind, name]), (kind, name)
        weights = kinds["fp32"].to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(weights, found["model", name]), name
    matrices, vectors = ([n for n in group["names"] if "adapter" in n] for group in state.param_groups)
    assert (4, 2) == (len(matrices), len(vectors))


def test_padding_of_a_custom_vocabulary_is_kept_apart(run: Path, tmp_path: Path) -> None:
    rows = padding_of(read(run, rules=load_rules(str(tmp_path / "rules.toml"))))
    name = "decoder.word_table.weight"
    assert {"model", *KINDS} == {kind for kind, padded in rows if padded == name}
    assert [[7.0] * 6] * 11 == read_all(rows["exp_avg", name]).view(np.float32).tolist()


def test_parameters_that_no_rule_covers_are_all_listed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two|2 tensor ranks") as raised:
        read(run)
    assert [] == [name for name in wholes() if name not in str(raised.value)]
    few = tmp_path / "few.toml"
    few.write_text('version = 1\n[[rule]]\nnames = "**.adapter.**"\nhow = "replicated"\n')
    with pytest.raises(UsageError, match=r"few.toml: no rule covers decoder.word_table.weight, and one is needed"):
        read(run, rules=load_rules(str(few)))


def test_a_rule_that_contradicts_the_files_is_refused(run: Path, tmp_path: Path) -> None:
    """Ranks that should be the same but are not, and a vocabulary larger than what is there."""
    first = '[[rule]]\nnames = "**.fused.weight"\nhow = "replicated"\n'
    text = RULES.replace("[[rule]]", f"{first}[[rule]]", 1)
    (tmp_path / "same.toml").write_text(text)
    with pytest.raises(FormatError, match=r"fused.weight should be the same in .*mp_rank_00_00.* and .*_01_00"):
        convert(run, tmp_path / "u", to="universal", rules=str(tmp_path / "same.toml"))
    (tmp_path / "large.toml").write_text(RULES.replace("words = 21", "words = 33"))
    with pytest.raises(FormatError, match=r"word_table.weight has 32 rows in all .* it should have 33"):
        convert(run, tmp_path / "u", to="universal", rules=str(tmp_path / "large.toml"))


def test_a_rule_that_matches_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "idle.toml").write_text(RULES + '[[rule]]\nnames = "**.lora.weight"\nhow = "replicated"\n')
    with pytest.raises(UsageError, match=r"nothing is matched by \*\*.lora.weight"):
        convert(run, tmp_path / "u", to="universal", rules=str(tmp_path / "idle.toml"))
    for command in (["inspect", run], ["verify", run]):
        assert 2 == cli.main([*map(str, command), "--rules", str(tmp_path / "idle.toml")])
        assert 0 == cli.main([*map(str, command), "--rules", str(tmp_path / "rules.toml")])
    assert 0 == cli.main(["diff", str(run), str(run), "--rules", str(tmp_path / "idle.toml")])


def test_averaged_parameters_are_warned_of(run: Path, tmp_path: Path) -> None:
    """Norms that drifted apart: nobody had the mean, so it is said."""
    text = RULES.replace('"**.adapter.scale"\nhow = "replicated"', '"**.adapter.scale"\nhow = "averaged"')
    (tmp_path / "mean.toml").write_text(text)
    report = convert(run, tmp_path / "u", to="universal", rules=str(tmp_path / "mean.toml"))
    (warning,) = report.warnings
    assert warning.startswith("averaged over 2 ranks") and "layers.2.adapter.scale" in warning


def test_what_args_record_comes_before_the_numbers_of_a_file(run: Path, tmp_path: Path) -> None:
    """The model is SwiGLU's, as args say: with glu = 1 of a preset, gate and up would be mixed silently."""
    text = RULES.replace("[sizes]", 'extends = "megatron"\n[sizes]\nglu = 1\nvocabulary = 90')
    (tmp_path / "more.toml").write_text(text)
    state = read(run, rules=load_rules(str(tmp_path / "more.toml")))
    found, before = words_of(state), words_of(read(CASE))
    assert [] == [key for key, words in before.items() if not np.array_equal(words, found[key])]


def test_a_file_gives_the_vocabulary_that_args_do_not(tmp_path: Path) -> None:
    """It came from a tokenizer, so nothing in the files tells padding from words."""
    shutil.copytree(CASE, tmp_path / "run")
    for path in (tmp_path / "run").rglob("model_optim_rng.pt"):
        values = load(path)
        values["args"].vocab_size = None
        torch.save(values, path)
    name = "embedding.word_embeddings.weight"
    opened = open_checkpoint(tmp_path / "run")
    assert (112, 32) == opened[name].shape
    assert any(name in line and "vocabulary = ROWS" in line for line in opened.state.warnings)
    (tmp_path / "r.toml").write_text('version = 1\nextends = "megatron"\n[sizes]\nvocabulary = 97\n')
    opened = open_checkpoint(tmp_path / "run", rules=str(tmp_path / "r.toml"))
    assert (97, 32) == opened[name].shape
    assert [] == opened.state.warnings


def test_gated_experts_without_args_are_seen_by_their_shapes(tmp_path: Path) -> None:
    """Halves of [gate; up] joined as if they were blocks of rows would train on, wrong."""
    shutil.copytree(CASE, tmp_path / "run")
    for path in (tmp_path / "run").rglob("model_optim_rng.pt"):
        values = load(path)
        del values["args"]
        values["model"] = {
            re.sub(r"mlp\.(linear_fc\d\.weight)$", r"mlp.experts.\g<1>0", key): value
            for key, value in values["model"].items()  # as TEGroupedMLP has its first expert
        }
        del values["optimizer"]
        torch.save(values, path)
    state, expected = read(tmp_path / "run"), read(CASE)
    name = "decoder.layers.3.mlp.experts.linear_fc1.weight0"
    whole = expected.of_kind("model")["decoder.layers.3.mlp.linear_fc1.weight"]
    assert np.array_equal(read_all(whole.view), read_all(state.of_kind("model")[name].view))


def test_quick_geglu_is_gated_as_swiglu_is(tmp_path: Path) -> None:
    """--quick-geglu sets gated_linear_unit too: halves of [gate; up] as blocks of rows would train on, wrong."""
    shutil.copytree(CASE, tmp_path / "run")
    for path in (tmp_path / "run").rglob("model_optim_rng.pt"):
        values = load(path)
        values["args"].swiglu, values["args"].quick_geglu = False, True
        torch.save(values, path)
    found, before = words_of(read(tmp_path / "run")), words_of(read(CASE))
    assert [] == [key for key, words in before.items() if not np.array_equal(words, found[key])]


def part_embeddings(values: Any) -> None:
    """Give the word embeddings, or the output layer, a group of their own, as --decoupled-lr does."""
    optimizer = values["optimizer"]["optimizer"]
    values["args"].decoupled_lr, values["args"].decoupled_min_lr = 0.01, 0.001
    (matrices, first), (vectors, second) = masters_of(values)
    names = [name for name, value in values["model"].items() if value is not None and value.dim() > 1]
    states = [optimizer["state"][i] for i in matrices["params"]]
    own = [i for i, name in enumerate(names) if name in ("embedding.word_embeddings.weight", "output_layer.weight")]
    others = [i for i in range(len(names)) if i not in own]
    kept = [
        (matrices, [(states[i], first[i]) for i in others]),
        (vectors, [(optimizer["state"][i], master) for i, master in zip(vectors["params"], second, strict=True)]),
        ({**matrices, "is_decoupled_lr": True, "max_lr": 0.01}, [(states[i], first[i]) for i in own]),
    ]
    optimizer["state"], optimizer["param_groups"], masters = {}, [], []
    for group, members in kept:
        count = len(optimizer["state"])
        optimizer["param_groups"].append({**group, "params": list(range(count, count + len(members)))})
        optimizer["state"].update(enumerate((state for state, _ in members), count))
        masters.append([master for _, master in members])
    values["optimizer"]["fp32_from_fp16_params"] = masters


def test_a_learning_rate_of_its_own_for_embeddings(tmp_path: Path) -> None:
    """Positions alone tie states to parameters: the embedding's would be some other matrix's."""
    shutil.copytree(CASE, tmp_path / "run")
    for path in (tmp_path / "run").rglob("model_optim_rng.pt"):
        values = load(path)
        part_embeddings(values)
        torch.save(values, path)
    state = read(tmp_path / "run")
    found, before = words_of(state), words_of(read(CASE))
    assert [] == [key for key, words in before.items() if not np.array_equal(words, found[key])]
    groups = {group["is_decoupled_lr"]: group["names"] for group in state.param_groups if group["wd_mult"]}
    assert ["embedding.word_embeddings.weight"] == [name for name in groups[True] if name != "output_layer.weight"]
    assert "embedding.word_embeddings.weight" not in groups[False]
    convert(tmp_path / "run", tmp_path / "other", to="megatron", layout={"tp": 1, "pp": 1})
    assert [] == diff(state, read(tmp_path / "other"))


def assert_same(one: State, other: State) -> None:
    first, second = words_of(one), words_of(other)
    assert sorted(first) == sorted(second)
    assert [] == [key for key, words in first.items() if not np.array_equal(words, second[key])]
    assert [] == diff(one, other)


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 1, "pp": 1}, {"tp": 4, "pp": 2}, {"tp": 1, "pp": 4}, {"tp": 2, "pp": 2, "vpp": 2}]
)
def test_custom_parameters_go_back_for_any_layout(layout: dict[str, int], run: Path, tmp_path: Path) -> None:
    """A run with an adapter could be read once, and never go on in Megatron-LM."""
    rules = str(tmp_path / "rules.toml")
    convert(run, tmp_path / "u", to="universal", rules=rules)
    convert(tmp_path / "u", tmp_path / "other", to="megatron", rules=rules, layout=layout)
    assert_same(read(tmp_path / "u"), read(tmp_path / "other", rules=load_rules(rules)))


def test_each_rank_gets_its_part_where_it_was(run: Path, tmp_path: Path) -> None:
    """The file that Megatron-LM itself loads: names, stages, parts, padding, and the order that ties the optimizer."""
    rules = str(tmp_path / "rules.toml")
    convert(run, tmp_path / "other", to="megatron", rules=rules)
    for stage in STAGES:
        for rank in (0, 1):
            place = Path("iter_0000004") / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            theirs, ours = load(run / place), load(tmp_path / "other" / place)
            weights = [{n: v for n, v in values["model"].items() if v is not None} for values in (theirs, ours)]
            assert set(weights[0]) == set(weights[1])
            assert [] == [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
            listed = []
            for values, model in ((theirs, weights[0]), (ours, weights[1])):
                states, found = values["optimizer"]["optimizer"]["state"], {}
                for plain, (group, masters) in zip((False, True), masters_of(values), strict=True):
                    names = [name for name, value in model.items() if (value.dim() < 2) == plain]
                    for name, i, master in zip(names, group["params"], masters, strict=True):
                        found[name] = [master, *(states[i][kind] for kind in ("exp_avg", "exp_avg_sq", "step"))]
                listed.append(found)
            for name, tensors in listed[0].items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, listed[1][name], strict=True)), name


def with_more(source: Path, shapes: dict[str, tuple[int, ...]], target: Path, *, flat: bool = False) -> State:
    """Write a universal checkpoint of ``source`` that has more parameters, in a group by the shapes on a rank."""
    state, dice = read(source), np.random.default_rng(3)
    if flat:
        state.extra["args"]["fields"]["use_distributed_optimizer"] = True
    for name, shape in shapes.items():
        for kind in KINDS:
            values = dice.standard_normal(shape, dtype=np.float32)
            values.flat[0] = -0.0
            state.tensors.append(Tensor(kind, name, stored_bytes(values.tobytes(), "float32", shape)))
            if kind == "fp32":
                rounded = from_float(values, "bfloat16").tobytes()
                state.tensors.append(Tensor("model", name, stored_bytes(rounded, "bfloat16", shape)))
        state.tensors.append(Tensor("step", name, scalar(4.0, "float32")))
        vector = len(shape) < 2 or "flat" in name
        next(group for group in state.param_groups if (group["wd_mult"] == 0) == vector)["names"].append(name)
    universal.write(state, target, Settings(), identity="test", options={})
    return read(target)


MORE = """
version = 1
[[rule]]
names = "**.flat"
how = "flattened"
shape = [5, 3]
[[rule]]
names = "**.mean"
how = "averaged"
[[rule]]
names = "**.odd.weight"
how = "sharded"
uneven = true
[[rule]]
names = "head.adapter.weight"
how = "sharded"
dim = 1
ranks = [3, 1]
"""
SHAPES: dict[str, tuple[int, ...]] = {
    "decoder.layers.1.flat": (5, 3),
    "decoder.layers.3.mean": (7,),
    "decoder.layers.2.odd.weight": (5, 2),
    "head.adapter.weight": (2, 8),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_every_kind_of_rule_goes_there_and_back(pp: int, flat: bool, tmp_path: Path) -> None:
    """With the distributed optimizer too, whose flat buffers have neither names nor shapes."""
    (tmp_path / "more.toml").write_text(MORE)
    state = with_more(CASE, SHAPES, tmp_path / "u", flat=flat)
    report = convert(
        tmp_path / "u", tmp_path / "run", to="megatron", rules=str(tmp_path / "more.toml"), layout={"tp": 2, "pp": pp}
    )
    assert [] == report.lost
    assert flat == any((tmp_path / "run").rglob("distrib_optim.pt"))
    found = read(tmp_path / "run", rules=load_rules(str(tmp_path / "more.toml")))
    assert ["averaged over 2 ranks, which no rank had: decoder.layers.3.mean"] == found.warnings
    assert_same(state, found)


def test_what_rules_leave_open_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    """Half a run's folder, or a table that is cut elsewhere when it is read, would be found weeks later."""
    rules = str(tmp_path / "rules.toml")
    convert(run, tmp_path / "u", to="universal", rules=rules)
    few, other = tmp_path / "few.toml", tmp_path / "other.toml"
    few.write_text('version = 1\n[[rule]]\nnames = "**.adapter.**"\nhow = "replicated"\n')
    other.write_text(RULES.replace("words = 21", "words = 20"))
    for given, words in (
        (None, r"nothing is known of .*layers.0.adapter.*: how tensor ranks share what is your own, --rules can say"),
        (str(few), r"nothing is known of decoder.word_table.weight"),
        (str(other), r"word_table.weight has 21 rows, and vocabulary = 20"),
    ):
        for dry_run in (True, False):
            with pytest.raises(UsageError, match=words):
                convert(tmp_path / "u", tmp_path / "x", to="megatron", rules=given, dry_run=dry_run)
            assert not (tmp_path / "x").exists()
    with_more(CASE, {"adapter.layers.4.mean": (7,)}, tmp_path / "long")
    (tmp_path / "more.toml").write_text('version = 1\n[[rule]]\nnames = "adapter.**"\nhow = "replicated"\n')
    with pytest.raises(UsageError, match=r"no pipeline stage has a place for adapter.layers.4.mean"):
        convert(tmp_path / "long", tmp_path / "x", to="megatron", rules=str(tmp_path / "more.toml"))
    assert not (tmp_path / "x").exists()


def test_the_order_of_a_module_is_kept() -> None:
    """Positions alone tie the optimizer to parameters: the custom ones stand between Megatron's own."""
    names = [
        "embedding.word_embeddings.weight",
        "embedding.adapter.weight",
        "vision.weight",
        *("decoder.layers.0.gate", "decoder.layers.0.input_layernorm.weight", "decoder.layers.0.adapter.b"),
        *("decoder.layers.0.adapter.a", "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.zero"),
        *("decoder.layers.1.gate", "decoder.layers.1.input_layernorm.weight", "decoder.layers.1.mlp.linear_fc1.weight"),
        *("decoder.final_layernorm.weight", "head.weight", "output_layer.weight", "other.bias"),
    ]
    order = order_of(names)
    assert names == list(order.names)
    assert {"embedding.word_embeddings.weight", "embedding.adapter.weight", "vision.weight"} == order.opening
    known = [name for name in names if in_list_order(name)]
    assert known == list(order_of(reversed(known)).names)
