"""DCP for a layout: a file for each rank, with what that rank will load, and any other job can load it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import UsageError
from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from snapshotd.universal.rules import Rule, Rules
from snapshotd.universal.views import read_all
from snapshotd.universal.writers.dcp_mesh import Mesh

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RANKS = Path(__file__).resolve().parent / "mesh_ranks.py"
DIMS = {"attn.qkv.weight": 0, "attn.qkv.bias": 0, "attn.out.weight": 1, "mlp.gate_up.weight": 0, "mlp.down.weight": 1}
RULES = """
version = 1
[[rule]]
names = "**.attn.qkv.{weight,bias}"
how = "sharded"
[[rule]]
names = "**.mlp.gate_up.weight"
how = "sharded"
parts = 2
[[rule]]
names = ["**.attn.out.weight", "**.mlp.down.weight"]
how = "sharded"
dim = 1
[[rule]]
names = "embed.weight"
how = "sharded"
vocabulary = 97
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    (tmp_path / "rules.toml").write_text(RULES)
    return str(tmp_path / "rules.toml")


@pytest.mark.timeout(300)
def test_fsdp_and_tensor_parallelism_load_it_from_their_own_files(tmp_path: Path, rules: str) -> None:
    """A job on 2 x 2 ranks would get other numbers, or each rank would read the files of all others."""
    torch = pytest.importorskip("torch")
    source = FIXTURES / "dcp_fsdp2_w2" / "ckpt"
    state = read(source)
    convert(source, tmp_path / "dcp", to="dcp", layout={"dp": 2, "tp": 2}, rules=rules)
    moments = state.of_kind("exp_avg")

    def tensor_of(item: Any) -> Any:
        return torch.from_numpy(read_all(item.view).view(np.float32).copy()).reshape(item.shape)

    names = [name for name, item in state.of_kind("model").items() if name in moments and item.dtype == "float32"]
    dims = {name: dim for name in names for end, dim in DIMS.items() if name.endswith(end)}
    truth = {
        "model": {name: tensor_of(state.of_kind("model")[name]) for name in names},
        "exp_avg": {name: tensor_of(moments[name]) for name in names},
        "dims": dims,
        "local": [name for name in dims if "gate_up" not in name],  # DTensor has no sub-parts
    }
    assert len(truth["local"]) >= 8
    torch.save(truth, tmp_path / "truth.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(RANKS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(tmp_path)], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"dp": 2, "tp": 2}, {"tp": 3}, {"pp": 2}, {"dp": 2, "tp": 3, "pp": 2}, {"cp": 3}]
)
@pytest.mark.parametrize("with_rules", [False, True])
def test_a_file_per_rank_and_back(layout: dict[str, int], with_rules: bool, tmp_path: Path, rules: str) -> None:
    """Whoever loads it elsewhere would miss rows, or have some twice; 97 rows and 2 heads divide by nothing here."""
    source = FIXTURES / "dcp_fsdp2_w2" / "ckpt"
    convert(source, tmp_path / "dcp", to="dcp", layout=layout, rules=rules if with_rules else None)
    world = int(np.prod(list(layout.values())))
    assert sorted(f"__{rank}_0.distcp" for rank in range(world)) == sorted(
        p.name for p in (tmp_path / "dcp").glob("*.distcp")
    )
    assert [] == diff(read(source), read(tmp_path / "dcp"))


@pytest.mark.parametrize("axis", ["ep", "vpp"])
def test_axes_that_dcp_has_not(axis: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{axis} means nothing to DCP; it takes dp, tp, pp"):
        convert(FIXTURES / "dcp_fsdp2_w2" / "ckpt", tmp_path / "dcp", to="dcp", layout={axis: 2})
    assert [] == list(tmp_path.iterdir())


@st.composite
def meshes(draw: st.DrawFn) -> tuple[dict[str, int], Rule, tuple[int, ...]]:
    layout = {axis: draw(st.integers(1, 4)) for axis in ("dp", "tp", "pp")}
    shape = draw(st.lists(st.integers(0, 13), min_size=0, max_size=3))
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, 2))
    if dim < len(shape):
        shape[dim] = sum(parts) * draw(st.integers(1, 4))
    return layout, Rule.of(["layers.0.w"], how="sharded", dim=dim, parts=tuple(parts)), tuple(shape)


@given(meshes())
@settings(max_examples=500, deadline=None)
def test_every_element_lies_in_the_file_of_the_rank_that_has_it(case: Any) -> None:
    """The twin deals out indexes with numpy: over tensor ranks part by part, then over replicas by rows."""
    layout, rule, shape = case
    mesh = Mesh(layout, Rules([rule]), ["embed", "layers.0.w"])
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found: dict[int, list[int]] = {}
    for rank, (at, lengths) in mesh.boxes("model", "layers.0.w", shape):
        box = whole[tuple(slice(a, a + n) for a, n in zip(at, lengths, strict=True))]
        found.setdefault(rank, []).extend(np.asarray(box).reshape(-1).tolist())
    assert whole.reshape(-1).tolist() == sorted(i for mine in found.values() for i in mine)
    if layout["tp"] == 1 or rule.dim >= len(shape) or 0 in shape:
        return
    unit = shape[rule.dim] // sum(rule.units)
    ends = np.cumsum([size * unit for size in rule.units])[:-1]
    pieces = [_chunk(part, layout["tp"], rule.dim) for part in np.split(whole, ends, rule.dim)]
    for t in range(layout["tp"]):
        local = np.concatenate([piece[t] for piece in pieces], rule.dim)
        for d, rows in enumerate(_chunk(local, layout["dp"], 0)):
            assert sorted(rows.reshape(-1).tolist()) == sorted(found.get(d * layout["tp"] + t, []))


def _chunk(array: Any, parts: int, dim: int) -> list[Any]:
    step = -(-array.shape[dim] // parts)
    return [
        np.take(array, range(min(i * step, array.shape[dim]), min((i + 1) * step, array.shape[dim])), dim)
        for i in range(parts)
    ]


def test_stages_have_their_layers() -> None:
    """Each pipeline rank would read the files of all stages."""
    names = ["embed.weight", *(f"layers.{i}.{w}" for i in range(4) for w in ("a.weight", "b.weight")), "norm.weight"]
    mesh = Mesh({"pp": 2}, None, names)
    ranks = {name: {rank for rank, _ in mesh.boxes("exp_avg", name, (4, 4))} for name in (*names, "alias.weight")}
    assert {0} == set.union(*(ranks[name] for name in names[:5]))
    assert {1} == set.union(*(ranks[name] for name in (*names[5:], "alias.weight")))
