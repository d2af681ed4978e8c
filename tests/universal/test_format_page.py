"""The page of the universal format, sentence by sentence, on what every fixture becomes; our own reader is not used."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash

from snapshotd.universal import convert

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/truth.json"))
FIELDS = {"format", "version", "step", "source", "tensors", "tied", "frozen", "param_groups", "extra", "warnings"}
ENTRY = {"kind", "name", "dtype", "shape", "file", "key", "digest"}
STATES = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


def source_of(case: str) -> Path:
    folder = FIXTURES / case
    return folder / "ckpt" if (folder / "ckpt").is_dir() else folder / "checkpoint.pt"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its README describes it: (header, data)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(directory, universal.json, truth.json) of one fixture."""
    path = tmp_path_factory.mktemp("u") / request.param
    convert(source_of(request.param), path, to="universal")
    truth = json.loads((FIXTURES / request.param / "truth.json").read_text())
    return path, json.loads((path / "universal.json").read_text()), truth


def of_kind(manifest: Any, *kinds: str) -> dict[str, Any]:
    return {entry["name"]: entry for entry in manifest["tensors"] if entry["kind"] in kinds}


def test_the_marker_has_its_fields(converted: Any) -> None:
    path, manifest, truth = converted
    assert set(manifest) == FIELDS
    assert ("snapshotd-universal", 1) == (manifest["format"], manifest["version"])
    assert (None if manifest["source"]["format"] == "hf" else truth["step"]) == manifest["step"]
    assert manifest["source"]["format"] in ("dcp", "deepspeed", "megatron", "hf", "torch")
    assert [] == [file.name for file in path.iterdir() if file.name.startswith(".")]
    for entry in manifest["tensors"]:
        assert set(entry) == ENTRY
    assert {1} == set(Counter((entry["kind"], entry["name"]) for entry in manifest["tensors"]).values())


def test_each_tensor_is_where_it_is_said_to_be(converted: Any) -> None:
    """Its digest is that of the source's bytes, and no file holds what nobody mentions."""
    path, manifest, _ = converted
    files = {name: header_of(path / name) for name in {entry["file"] for entry in manifest["tensors"]}}
    left = {(name, key) for name, (header, _) in files.items() for key in header if key != "__metadata__"}
    assert {file.name for file in path.glob("*.safetensors")} == set(files)
    for entry in manifest["tensors"]:
        header, data = files[entry["file"]]
        found = header[entry["key"]]
        begin, end = found["data_offsets"]
        assert (SAFETENSORS[entry["dtype"]], entry["shape"]) == (found["dtype"], found["shape"])
        assert f"xxh3_128:{xxhash.xxh3_128_hexdigest(data[begin:end])}" == entry["digest"]
        left.remove((entry["file"], entry["key"]))
    assert set() == left


def test_kinds(converted: Any) -> None:
    _, manifest, _ = converted
    kinds = {entry["kind"] for entry in manifest["tensors"]}
    assert set() == kinds - {"model", "buffer", "fp32", "rng", "extra"} - STATES
    model = of_kind(manifest, "model")
    for name, entry in of_kind(manifest, "fp32").items():
        assert "float32" == entry["dtype"]
        assert model[name]["dtype"] in ("bfloat16", "float16")  # where weights are fp32 there is no second copy
    for kind in kinds & STATES:
        assert set() == set(of_kind(manifest, kind)) - set(model)
    for entry in of_kind(manifest, "step").values():
        assert [] == entry["shape"]
    for name in of_kind(manifest, "rng"):
        assert re.fullmatch(r"\d+(/.+)?", name)


def test_names_are_those_of_the_undivided_model(converted: Any) -> None:
    _, manifest, truth = converted
    names = of_kind(manifest, "model", "buffer")
    lists: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(r"(.*?\.(?:layers|local_experts|deepspeed_experts))\.(\d+)\.", f".{name}"):
            lists.setdefault(match[1], set()).add(int(match[2]))
    for prefix, numbers in lists.items():
        assert set(range(len(numbers))) == numbers, prefix
    rows = {entry["shape"][0] for name, entry in names.items() if re.search(r"(embed|word_embeddings)\.weight$", name)}
    assert set() == rows - {truth["model"]["vocab"] if "model" in truth and "vocab" in truth["model"] else 97}


def test_tied_and_frozen(converted: Any) -> None:
    _, manifest, truth = converted
    model = of_kind(manifest, "model")
    assert truth.get("tied", {}) == manifest["tied"]
    assert sorted(truth.get("frozen", [])) == sorted(manifest["frozen"])
    for alias, name in manifest["tied"].items():
        assert alias not in model
        assert name in model
    states = {entry["name"] for entry in manifest["tensors"] if entry["kind"] in STATES}
    for name in manifest["frozen"]:
        assert name in model
        assert name not in states


def test_groups_name_every_member_and_every_hyperparameter(converted: Any) -> None:
    _, manifest, truth = converted
    groups = manifest["param_groups"]
    states = {entry["name"] for entry in manifest["tensors"] if entry["kind"] in STATES - {"step"}}
    listed = [name for group in groups for name in group["names"]]
    assert len(listed) == len(set(listed))
    assert set() == states - set(listed)
    expected = truth.get("param_groups") or [g for chain in truth.get("param_groups_rank0") or [] for g in chain]
    lost = any("no hyperparameters" in line for line in manifest["warnings"])  # elastic files have none
    for group, true in zip(groups, expected, strict=bool(states)):
        for key, value in true.items():
            if key not in ("params", "names", "param_names") and not lost:
                assert (key, value) == (key, group[key])


def test_the_index_is_transformers(converted: Any) -> None:
    path, manifest, _ = converted
    model = of_kind(manifest, "model", "buffer")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert {name: entry["file"] for name, entry in model.items()} == index["weight_map"]
    assert all(entry["key"] == name and entry["file"].startswith("model") for name, entry in model.items())
    assert {"format": "pt"} == header_of(path / "model.safetensors")[0]["__metadata__"]
    for name, config in manifest["extra"].get("configs", {}).items():
        assert name not in ("config.json", "generation_config.json") or config == json.loads((path / name).read_text())
