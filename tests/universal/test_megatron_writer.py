"""Universal -> Megatron-LM -> universal, for other sizes too, is the identity."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.errors import UsageError
from snapshotd.universal import readers, torchzip
from snapshotd.universal.convert import convert
from snapshotd.universal.readers.megatron_names import EMBEDDING
from snapshotd.universal.readers.megatron_padding import padding_of
from snapshotd.universal.sources import FileSource
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import Settings
from snapshotd.universal.views import Cut, read_all, stored_bytes
from snapshotd.universal.writers import universal
from snapshotd.universal.writers.megatron_args import target_args

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = ("megatron_tp2_pp2", "megatron_dist_tp2_pp2")


def words_of(state: State) -> dict[tuple[str, str], Any]:
    return {tensor.key: read_all(tensor.view) for tensor in state.tensors}


def assert_same(one: State, other: State) -> None:
    first, second = words_of(one), words_of(other)
    assert sorted(first) == sorted(second)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    for part in ("step", "param_groups", "tied", "frozen", "extra"):
        assert getattr(one, part) == getattr(other, part), part


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [{}, {"tp": 1, "pp": 1}, {"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"dp": 2}])
def test_any_layout_and_back(case: str, layout: dict[str, int], tmp_path: Path) -> None:
    convert(FIXTURES / case / "ckpt", tmp_path / "universal", to="universal")
    convert(tmp_path / "universal", tmp_path / "run", to="megatron", layout=layout)
    convert(tmp_path / "run", tmp_path / "again", to="universal")
    assert readers.detect(tmp_path / "run") == "megatron"
    assert_same(readers.read(tmp_path / "universal"), readers.read(tmp_path / "again"))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("megatron_vpp2_tp2_pp2", {"tp": 1, "pp": 4, "vpp": 1}),
        ("megatron_dist_opt_tp2_pp2_tied", {"tp": 2, "pp": 1, "dp": 1}),
        ("megatron_moe_ep2_dist_opt", {"ep": 4, "dp": 4}),
        ("megatron_moe_ep2_dist_opt", {"ep": 1}),
        ("megatron_dist_dp_reshardable", {"tp": 1, "pp": 2}),
    ],
)
def test_more_layouts_and_back(case: str, layout: dict[str, int], tmp_path: Path) -> None:
    convert(FIXTURES / case / "ckpt", tmp_path / "universal", to="universal")
    convert(tmp_path / "universal", tmp_path / "run", to="megatron", layout=layout)
    assert_same(readers.read(tmp_path / "universal"), readers.read(tmp_path / "run"))


def test_virtual_stages_and_back(tmp_path: Path) -> None:
    convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "run", to="megatron", layout={"tp": 1, "pp": 2, "vpp": 2})
    names = sorted(entry.name for entry in (tmp_path / "run" / "iter_0000004").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_00_001"]
    assert_same(readers.read(FIXTURES / CASES[0] / "ckpt"), readers.read(tmp_path / "run"))


def test_every_rank_of_a_larger_run_has_generators(tmp_path: Path) -> None:
    """Megatron-LM exits when a rank's file has none."""
    convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "run", to="megatron", layout={"tp": 2, "pp": 4})
    folders = sorted((tmp_path / "run" / "iter_0000004").iterdir())
    states = [torchzip.load(FileSource(folder / "model_optim_rng.pt"))["rng_state"][0] for folder in folders]
    assert 8 == len(states)
    assert {"random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states"} == set.union(
        *map(set, states)
    )
    assert all(len(state) == 5 for state in states)
    assert_same(readers.read(FIXTURES / CASES[0] / "ckpt"), readers.read(tmp_path / "run"))


def test_padding_is_made_anew(tmp_path: Path) -> None:
    """97 tokens are 112 rows for two tensor ranks, 104 for one; a loader with the wrong size refuses the file."""
    convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "run", to="megatron", layout={"tp": 1, "pp": 1})
    state = readers.read(tmp_path / "run")
    assert state.source["padded_vocab_size"] == 104
    assert state.of_kind("model")["embedding.word_embeddings.weight"].shape == (97, 32)


def test_padding_of_the_same_size_is_kept(tmp_path: Path) -> None:
    """The padding rows stand in the softmax: with others, the loss of the next step would be another one."""
    name = "embedding.word_embeddings.weight"
    source = readers.read(FIXTURES / CASES[0] / "ckpt")
    padding = {key: read_all(view) for key, view in padding_of(source).items()}
    assert {"model", "fp32", "exp_avg", "exp_avg_sq"} == {kind for kind, _ in padding}
    assert (15, 32) == padding["model", name].shape
    convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "same", to="megatron", layout={"pp": 1})
    convert(tmp_path / "same", tmp_path / "other", to="megatron", layout={"tp": 1, "pp": 1})
    rank = torchzip.load(FileSource(tmp_path / "same" / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt"))
    assert np.array_equal(padding["model", name], read_all(rank["model"][name].view)[-15:])
    rank = torchzip.load(FileSource(tmp_path / "other" / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"))
    rows = read_all(rank["model"][name].view)
    assert ((104, 32), 0) == (rows.shape, np.count_nonzero(rows[97:]))


def test_the_null_tokenizer_has_one_token_more(tmp_path: Path) -> None:
    """Its end-of-document token counts where Megatron computes the padded size: 96 + 1 tokens are 104 rows, not 96."""
    state = readers.read(FIXTURES / CASES[0] / "ckpt")
    fields = {**state.extra["args"]["fields"], "vocab_size": 96}
    view = Cut(state.of_kind("model")[EMBEDDING].view, (0, 0), (96, 32))
    weights = [Tensor("model", EMBEDDING, view)]
    args = target_args(State(format="megatron", tensors=weights), fields, {"tp": 1})
    assert 104 == args["padded_vocab_size"]


def test_layers_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 layers cannot be on 3 pipeline stages"):
        convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "run", to="megatron", layout={"pp": 3})


def test_an_enum_that_was_saved_by_its_name_stays_so(tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 save them; what its value is only Megatron knows."""
    state = readers.read(FIXTURES / CASES[0] / "ckpt")
    member = {"$object": "megatron.core.transformer.enums.AttnBackend", "member": "auto"}
    state.extra["args"]["fields"]["attention_backend"] = member
    universal.write(state, tmp_path / "universal", Settings(), identity="test", options={})
    convert(tmp_path / "universal", tmp_path / "run", to="megatron")
    assert member == readers.read(tmp_path / "run").extra["args"]["fields"]["attention_backend"]
    (path,) = (tmp_path / "run").glob("*/mp_rank_00_000/model_optim_rng.pt")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        opcodes = list(pickletools.genops(archive.read(name)))
    names = {argument for _, argument, _ in opcodes if isinstance(argument, str)}
    assert {"builtins getattr", "megatron.core.transformer.enums AttnBackend", "auto"} <= names


def test_names_that_are_not_megatrons(tmp_path: Path) -> None:
    from snapshotd.universal.writers import megatron

    view = stored_bytes(bytes(8), "float32", (2,))
    with pytest.raises(UsageError, match=r"blocks.0.attn.qkv"):
        megatron.check(State(format="torch", tensors=[Tensor("model", "blocks.0.attn.qkv.weight", view)]), {})
    with pytest.raises(UsageError, match=r"embedding.word_embeddings.weight is missing"):
        megatron.check(State(format="torch", tensors=[]), {})


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    """The file is one that torch.save could have written, with classes of argparse and enums only."""
    import argparse
    import signal

    torch = pytest.importorskip("torch")
    convert(FIXTURES / CASES[0] / "ckpt", tmp_path / "run", to="megatron")
    path = tmp_path / "run" / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    stand_in = type("AttnBackend", (), {"__init__": lambda self, value: None})
    allowed = [
        argparse.Namespace,
        signal.Signals,
        (stand_in, "megatron.core.transformer.enums.AttnBackend"),
    ]
    with torch.serialization.safe_globals(allowed):
        ours = torch.load(path, weights_only=True)
    assert ours["args"].tensor_model_parallel_size == 2
    assert ours["model"]["output_layer._extra_state"] is None
    assert ours["optimizer"]["optimizer"]["param_groups"][1]["params"] == [9, 10, 11, 12, 13]
    assert ours["rng_state"][0]["random_rng_state"][0] == 3
    assert ours["optimizer"]["optimizer"]["state"][0]["step"].item() == 4.0
