"""
Against the real Megatron-core, on CPU: ``make test-megatron``.

Each case is trained, saved by Megatron-core, converted and compared with the live model; then written for other sizes,
loaded there strictly, and trained on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert, readers
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core", reason="make test-megatron runs these")
from tests.frameworks.megatron_job import Case  # noqa: E402
from tests.frameworks.megatron_live import perform  # noqa: E402

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
PLAIN = Case(tp=2, pp=2)
FLAT = Case(tp=2, pp=2, dp=2, distributed=True)
EXPERTS = Case(dp=2, ep=2, experts=4, layers=2)
CASES = {
    "plain": (PLAIN, [{}, {"tp": 1, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 2, "pp": 1, "dp": 2}]),
    "tp4": (Case(tp=4, groups=4), [{}, {"tp": 2}]),
    "uneven vocabulary": (Case(tp=2, vocab=131, divisor=128), [{}, {"tp": 1}]),
    "pp4": (Case(pp=4), [{}, {"pp": 2, "vpp": 2}]),
    "virtual stages": (Case(tp=2, pp=2, vpp=2, tied=True), [{}, {"pp": 2, "vpp": 1}, {"tp": 1, "pp": 1}]),
    "tied on two stages": (Case(tp=2, pp=2, tied=True), [{}, {"tp": 1, "pp": 1}]),
    "tied on one stage": (Case(tp=2, tied=True), [{}, {"tp": 1, "pp": 2}]),
    "fp32": (Case(tp=2, pp=2, bf16=False), [{}, {"tp": 1, "pp": 2}]),
    "biases, LayerNorm, gelu": (
        Case(tp=2, pp=2, bias=True, swiglu=False, norm="LayerNorm"),
        [{}, {"tp": 1, "pp": 1}],
    ),
    "rotary": (Case(tp=2, position="rope"), [{}, {"tp": 1, "pp": 2}]),
    "distributed optimizer": (FLAT, [{}, {"tp": 1, "pp": 2, "dp": 1}, {"tp": 2, "pp": 1, "dp": 2}]),
    "distributed, tied": (replace(FLAT, tied=True), [{}, {"tp": 2, "pp": 1, "dp": 2}]),
    "distributed, fp32": (Case(tp=2, dp=2, distributed=True, bf16=False), [{}, {"tp": 1, "dp": 2}]),
    "experts": (EXPERTS, [{}, {"ep": 1, "dp": 1}, {"ep": 4, "dp": 4}]),
    "experts, distributed": (replace(EXPERTS, distributed=True), [{}, {"ep": 1, "dp": 1}]),
    "torch_dist": (replace(PLAIN, form="torch_dist"), [{}, {"tp": 1, "pp": 1}]),
    "torch_dist, tied": (Case(tp=2, pp=2, tied=True, form="torch_dist"), [{}, {"tp": 1, "pp": 2}]),
    "torch_dist, dp_reshardable": (replace(FLAT, form="torch_dist"), [{}, {"tp": 1, "pp": 1, "dp": 2}]),
    "torch_dist, fully_reshardable": (
        replace(FLAT, form="torch_dist", sharding="fully_reshardable"),
        [{}, {"tp": 1, "pp": 1, "dp": 2}],
    ),
    "torch_dist, experts": (replace(EXPERTS, form="torch_dist"), [{}, {"ep": 1, "dp": 1}]),
}


def bytes_of(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{tensor.kind}/{tensor.name}": (tensor.dtype, tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
        if "/" not in tensor.name and tensor.kind != "extra"
    }


def bytes_of_live(tensors: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {key: _bytes(tensor) for key, tensor in tensors.items()}


def _bytes(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    name = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return name, tuple(tensor.shape), flat.numpy().tobytes()


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def groups_of(live: dict[str, Any], tied: dict[str, str]) -> list[dict[str, Any]]:
    """The groups of all ranks as one list; equal ones are one group."""
    found: dict[str, set[str]] = {}
    for groups in live["groups"]:
        for values, names in groups:
            key = json.dumps(values, sort_keys=True)
            found.setdefault(key, set()).update(tied.get(name, name) for name in names)
    return [{"names": sorted(names), **json.loads(key)} for key, names in found.items()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """A converted run would go on from other numbers than it stopped with, or Megatron would refuse to load it."""
    case, layouts = CASES[name]
    live = perform(case, tmp_path / "train", save=tmp_path / "ckpt")
    report = convert(tmp_path / "ckpt", tmp_path / "universal", to="universal")
    assert report.warnings == []
    state = readers.read(tmp_path / "universal")
    expected, found = bytes_of_live(live["tensors"]), bytes_of(state)
    kept = {key: value for key, value in found.items() if not key.startswith("step/") or key in expected}
    wanted = {key: value for key, value in expected.items() if not key.startswith("rng/") or key in found}
    assert sorted(wanted) == sorted(kept)
    assert [] == [key for key in wanted if wanted[key] != kept[key]]
    tied = {"output_layer.weight": "embedding.word_embeddings.weight"} if case.tied else {}
    assert (live["step"], tied, []) == (state.step, state.tied, state.frozen)
    assert live["scheduler"] == state.extra["opt_param_scheduler"]
    groups = [{**group, "names": sorted(group["names"])} for group in state.param_groups]
    assert groups_of(live, tied) == groups
    for layout in layouts:
        _load(case, layout, live, tmp_path)


def _load(case: Case, layout: dict[str, int], live: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "_".join(["run", *(f"{axis}{size}" for axis, size in layout.items())])
    convert(tmp_path / "universal", run, to="megatron", layout=layout)
    target = replace(case, form="torch", **layout)
    loaded = perform(target, tmp_path / "load", load=run)
    expected, found = bytes_of_live(live["tensors"]), bytes_of_live(loaded["tensors"])
    states = [key for key in expected if not key.startswith("rng/")]
    assert [] == [key for key in states if expected[key] != found[key]], layout
    assert live["scheduler"] == loaded["scheduler"]
    if not layout:
        assert live["next_losses"] == loaded["next_losses"]
    elif case.padded == target.padded:  # padding rows that were made anew stand in the softmax
        assert live["next_losses"] == pytest.approx(loaded["next_losses"], rel=1e-3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "layers"), [("megatron_tp2_pp2", 4), ("megatron_dist_tp2_pp2", 2)])
def test_megatron_trainings_own_runs_go_on(case: str, layers: int, tmp_path: Path) -> None:
    """What megatron.training wrote, through the universal format: the losses of the run that nobody interrupted."""
    truth = json.loads((FIXTURES / case / "truth.json").read_text())
    convert(FIXTURES / case / "ckpt", tmp_path / "universal", to="universal")
    convert(tmp_path / "universal", tmp_path / "run", to="megatron")
    found = perform(replace(PLAIN, layers=layers), tmp_path / "load", load=tmp_path / "run")
    assert truth["next_losses"][0] == found["next_losses"][0]
    # Sums of bf16 differ by processor: 1e-5 where it has AMX. Without the first moments it would be 2e-3.
    assert truth["next_losses"] == pytest.approx(found["next_losses"], rel=1e-4)
