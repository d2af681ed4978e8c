"""The language of rules, and its geometry against a slow and obvious twin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.rules import PRESETS, Rejoiner, Rule, Rules, load_rules, merge, split
from snapshotd.universal.rules.language import parse_rules
from snapshotd.universal.views import View, read_all, stored_bytes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "rules.md"


def view_of(array: np.ndarray[Any, Any]) -> View:
    return stored_bytes(array.tobytes(), "float32", array.shape)


def array_of(view: View) -> np.ndarray[Any, Any]:
    return read_all(view).view(np.float32)


def rules_of(text: str) -> Rules:
    return parse_rules(f"version = 1\n{text}", "r.toml")


def cut_slowly(whole: np.ndarray[Any, Any], dim: int, sizes: list[int], ranks: int) -> list[np.ndarray[Any, Any]]:
    """The twin: rows are dealt out one by one."""
    rows = np.moveaxis(whole, dim, 0)
    mine: list[list[Any]] = [[] for _ in range(ranks)]
    at = 0
    for size in sizes:
        step = -(-size // ranks)
        for i in range(size):
            mine[i // step].append(rows[at + i])
        at += size
    empty = rows[:0]
    return [np.moveaxis(np.stack(found) if found else empty, 0, dim) for found in mine]


@st.composite
def fused(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], int, list[int], int, int]:
    ranks = draw(st.integers(1, 5))
    unit = draw(st.integers(1, 3))
    parts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(parts) * unit
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), dim, parts, unit, ranks


@given(fused())
@settings(max_examples=500, deadline=None)
def test_sub_parts_of_unequal_sizes_are_cut_and_joined_as_the_twin_does(case: Any) -> None:
    """A fused matrix whose queries went where keys should be trains, and is wrong."""
    whole, dim, parts, unit, ranks = case
    rule = Rule.of(["w"], how="sharded", dim=dim, parts=tuple(parts), uneven=True)
    shards = split(rule, "w", view_of(whole), ranks)
    expected = cut_slowly(whole, dim, [size * unit for size in parts], ranks)
    assert [array.tolist() for array in expected] == [array_of(shard).tolist() for shard in shards]
    if all(0 not in shard.shape for shard in shards):
        back = merge(rule, "w", [view_of(array_of(shard)) for shard in shards])
        back.check("w")
        assert whole.tolist() == array_of(back).tolist()


@given(st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_flattened_with_padding(numel: int, ranks: int) -> None:
    whole = np.arange(numel * 2, dtype=np.float32).reshape(numel, 2)
    rule = Rule.of(["w"], how="flattened", shape=(numel, 2))
    shards = split(rule, "w", view_of(whole), ranks)
    assert {-(-2 * numel // ranks)} == {shard.numel for shard in shards}
    padded = np.zeros(shards[0].numel * ranks, np.float32)
    padded[: whole.size] = whole.reshape(-1)
    assert padded.tolist() == np.concatenate([array_of(shard) for shard in shards]).tolist()
    assert whole.tolist() == array_of(merge(rule, "w", shards)).tolist()
    assert whole.tolist() == array_of(merge(Rule.of(["w"], how="flattened"), "w", shards, (numel, 2))).tolist()


def test_vocabulary_is_padded_for_the_ranks_and_cut_again() -> None:
    whole = np.arange(97 * 2, dtype=np.float32).reshape(97, 2)
    rule = Rule.of(["w"], how="sharded", vocabulary=97, multiple=8)
    for ranks, rows in ((1, 104), (2, 112), (3, 120)):
        shards = split(rule, "w", view_of(whole), ranks)
        assert [(rows // ranks, 2)] * ranks == [shard.shape for shard in shards]
        assert not array_of(shards[-1])[97 - rows :].any()
        assert whole.tolist() == array_of(merge(rule, "w", shards)).tolist()
    unknown = Rejoiner(rules_of('[[rule]]\nnames = "w"\nhow = "sharded"\nvocabulary = true'), 2)
    assert (112, 2) == unknown.merge("model", "w", split(rule, "w", view_of(whole), 2)).shape
    assert ["the true size of the vocabulary is not known"] == [line.split(",")[0] for line in unknown.warnings()]


def test_averaged_and_replicated() -> None:
    """A drifted copy taken for a replica would be one rank's value, without a word."""
    copies = [view_of(np.array([1.0, 2.0], np.float32)), view_of(np.array([3.0, 4.0], np.float32))]
    rejoiner = Rejoiner(rules_of('[[rule]]\nnames = "*"\nhow = "averaged"'), 2)
    assert [2.0, 3.0] == array_of(rejoiner.merge("model", "norm", copies)).tolist()
    assert ["averaged over 2 ranks, which no rank had: norm"] == rejoiner.warnings()
    with pytest.raises(FormatError, match="norm should be the same"):
        array_of(merge(Rule.of(["*"], how="replicated"), "norm", copies))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("layers.*.w", ["layers.1.w", "layers.10.w"], ["layers.1.x.w", "a.layers.1.w", "layers.1.ww", "layers1.w"]),
        ("**.w", ["w", "a.w", "a.b.w"], ["aw", "w.a"]),
        ("a.**.w", ["a.w", "a.b.w", "a.b.c.w"], ["ab.w", "a.bw"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab"]),
        ("**", ["a", "a.b"], []),
        ("*.{weight,bias}", ["a.weight", "a.bias"], ["a.weightbias", "a.b.bias"]),
        ("w?", ["w1", "w2"], ["w", "w12"]),
        ("w.+(x)", ["w.+(x)"], ["w.x", "wx"]),
    ],
)
def test_patterns_fit_whole_names_only(pattern: str, yes: list[str], no: list[str]) -> None:
    """A pattern that is open at its end takes layers.10 for layers.1."""
    rule = Rule.of([pattern], how="replicated")
    assert yes == [name for name in yes + no if rule.matches(name)]


def test_the_first_rule_wins_and_kinds_choose() -> None:
    rules = rules_of(
        """
        [sizes]
        heads = 4
        [[rule]]
        names = "a.w"
        kinds = "exp_avg"
        how = "averaged"
        [[rule]]
        names = ["a.*"]
        how = "sharded"
        parts = ["heads", 1, 1]
        [[rule]]
        names = "**"
        how = "replicated"
        """
    )
    found = [rules.find(kind, name) for kind, name in (("exp_avg", "a.w"), ("model", "a.w"), ("model", "b"))]
    assert ["averaged", "sharded", "replicated"] == [rule.how if rule else None for rule in found]
    assert found[1] is not None
    assert [4, 1, 1] == found[1].units


def test_what_no_rule_covers_and_rules_for_nothing_are_listed() -> None:
    """A typing error in a pattern must not turn into a wrong layout."""
    rules = rules_of('[[rule]]\nnames = ["a.w", "b.w"]\nhow = "replicated"\n[[rule]]\nnames = "c.?"\nhow = "averaged"')
    with pytest.raises(UsageError, match=re.escape("no rule covers x.w, y.w, and one is needed: tp=2")):
        rules.require("model", ["a.w", "x.w", "y.w"], "tp=2")
    with pytest.raises(UsageError, match=re.escape("nothing is matched by c.? (r.toml, rule 2)")):
        rules.check_used(["a.w"])
    rules.check_used(["a.w", "c.w"])
    with pytest.raises(UsageError, match="nothing is matched"):
        load_rules("megatron").check_used(["model.layers.0.q_proj.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[rule\\]\\]"),
        ("x = ", "not TOML"),
        ("rules = 1", "does not know rules; it takes version, extends"),
        ('[[rule]]\nnames = "a"', "rule 1: how is None, expected one of replicated"),
        ('[[rule]]\nhow = "sharded"', "has no names"),
        ('[[rule]]\nnames = "a"\nhow = "replicated"\ndim = 1', "\\(replicated\\) does not know dim"),
        ('[[rule]]\nnames = "a"\nhow = "sharded"\ndim = -1', "dim is -1"),
        ('[[rule]]\nnames = "a"\nhow = "sharded"\nparts = [1, 0]', "parts is 0"),
        ('[[rule]]\nnames = "a"\nhow = "sharded"\nparts = 2\nvocabulary = 5', "a vocabulary has no parts"),
        ('[[rule]]\nnames = "{a"\nhow = "sharded"', "braces of '{a'"),
        ('[[rule]]\nnames = "a**"\nhow = "sharded"', "must be a whole part"),
        ('[[rule]]\nnames = 3\nhow = "sharded"', "expected text or a list"),
        ('extends = "nobody"', "there are the presets llama"),
        ("[sizes]\nh = -1", "sizes.h is -1"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rules_of(text)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="version is 2"):
        parse_rules("version = 2", "r.toml")
    with pytest.raises(UsageError, match="neither a file nor a preset; there are llama"):
        load_rules("nobody")
    with pytest.raises(UsageError, match="uses the size 'heads', which is not under"):
        rules_of('[[rule]]\nnames = "a"\nhow = "sharded"\nparts = ["heads", 1]').find("model", "a")
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot be read"):
        load_rules(str(tmp_path / "r.toml"))
    whole = view_of(np.zeros((7, 2), np.float32))
    with pytest.raises(UsageError, match="7 of w cannot be divided over 2 ranks; uneven = true"):
        split(Rule.of(["w"], how="sharded"), "w", whole, 2)
    with pytest.raises(UsageError, match=re.escape("parts [2, 1] do not divide the size 7")):
        split(Rule.of(["w"], how="sharded", parts=(2, 1)), "w", whole, 2)
    with pytest.raises(UsageError, match="no dimension 2"):
        split(Rule.of(["w"], how="sharded", dim=2), "w", whole, 2)
    with pytest.raises(FormatError, match="rank 0 has 4 of 8 on dimension 0 .*should have 5"):
        halves = [view_of(np.zeros((4, 2), np.float32))] * 2
        merge(Rule.of(["w"], how="sharded", parts=(5, 3), uneven=True), "w", halves)
    with pytest.raises(FormatError, match="no parts of one tensor"):
        merge(Rule.of(["w"], how="sharded"), "w", [whole, view_of(np.zeros((7, 3), np.float32))])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_documented(name: str) -> None:
    rules = load_rules(name)
    assert all(rule.optional or name == "replicated" for rule in rules.rules)
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("preset", "name", "expected"),
    [
        ("megatron-glu", "decoder.layers.3.mlp.linear_fc1.weight", ("sharded", 0, [1, 1])),
        ("megatron", "decoder.layers.3.mlp.linear_fc1.weight", ("sharded", 0, [1])),
        ("megatron", "decoder.layers.3.mlp.experts.linear_fc2.weight7", ("sharded", 1, [1])),
        ("megatron", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", ("replicated", 0, [1])),
        ("megatron", "decoder.layers.0.input_layernorm.weight", ("replicated", 0, [1])),
        ("transformers", "model.layers.1.self_attn.k_proj.bias", ("sharded", 0, [1])),
        ("transformers", "model.layers.1.mlp.down_proj.weight", ("sharded", 1, [1])),
        ("transformers", "transformer.h.0.attn.c_attn.weight", ("sharded", 1, [1, 1, 1])),
        ("transformers", "model.norm.weight", ("replicated", 0, [1])),
        ("llama", "tok_embeddings.weight", ("sharded", 0, [1])),
        ("llama2", "tok_embeddings.weight", ("sharded", 1, [1])),
    ],
)
def test_presets_know_their_models(preset: str, name: str, expected: tuple[str, int, list[int]]) -> None:
    rule = load_rules(preset).find("model", name)
    assert rule is not None
    assert expected == (rule.how, rule.dim, rule.units)
