"""Checkpoints that torch and transformers themselves wrote, against the live state they were written from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff, verify
from snapshotd.universal.readers import detect, read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = {
    "dcp_fsdp2_w2": "dcp",
    "dcp_fsdp2_w4": "dcp",
    "dcp_fsdp2_tp_2x2": "dcp",
    "hf_llama_sharded": "hf",
    "torch_save_plain": "torch",
}
TAGS = {"float32": "F32", "bfloat16": "BF16", "int64": "I64", "uint8": "U8"}


def source_of(case: str) -> Path:
    folder = FIXTURES / case
    return folder / "ckpt" if (folder / "ckpt").is_dir() else folder / "checkpoint.pt"


def truth_of(case: str) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    data = (FIXTURES / case / "truth.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        found[key] = (entry["dtype"], tuple(entry["shape"]), data[8 + length + begin : 8 + length + end])
    return json.loads((FIXTURES / case / "truth.json").read_text()), found


def tensors_of(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{tensor.kind}/{tensor.name}": (TAGS[tensor.dtype], tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
    }


@pytest.mark.parametrize("case", CASES)
def test_universal_is_the_live_state_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Training would go on from other numbers, or with other hyperparameters, than it stopped with."""
    truth, expected = truth_of(case)
    assert CASES[case] == detect(source_of(case))
    convert(source_of(case), tmp_path / "u", to="universal")
    state = read(tmp_path / "u")
    state.check()
    found = tensors_of(state)
    steps = {key for key in found if key.startswith("step/")}
    assert expected == {key: value for key, value in found.items() if key not in steps}
    assert truth.get("param_groups", []) == state.param_groups
    assert truth["frozen"] == state.frozen
    assert truth["tied"] == state.tied if "tied" in truth else state.tied == {}
    if case != "hf_llama_sharded":
        assert truth["step"] == state.step
        assert truth["lr_scheduler"] == state.extra["lr_scheduler"]
        assert {name for group in truth["param_groups"] for name in group["names"]} == {
            key.removeprefix("step/") for key in steps
        }
    if "dataloader" in truth:
        assert truth["dataloader"] == state.extra["dataloader"]


@pytest.mark.parametrize("to", ["universal", "dcp", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_universal_to_other_formats_and_back_is_the_identity(case: str, to: str, tmp_path: Path) -> None:
    """A round trip through another format would change the run."""
    convert(source_of(case), tmp_path / "u", to="universal")
    target = tmp_path / ("x.pt" if to == "torch" else "x")
    report = convert(tmp_path / "u", target, to=to, layout={"dp": 3} if to == "dcp" else None)
    assert report.lost == []
    back = convert(target, tmp_path / "back", to="universal")
    assert to == back.source_format
    assert diff(read(tmp_path / "u"), read(tmp_path / "back")) == []
    assert verify(target).problems == []


@pytest.mark.parametrize("case", ["dcp_fsdp2_w2", "hf_llama_sharded"])
def test_hugging_face_keeps_the_model_and_says_what_it_drops(case: str, tmp_path: Path) -> None:
    """Weights for inference would be lost, or an optimizer would be dropped without a word."""
    state = read(source_of(case))
    report = convert(source_of(case), tmp_path / "hf", to="hf")
    assert [kind for kind in state.kinds if kind not in ("model", "buffer")] == [
        line.split(":")[0] for line in report.lost if line.split(":")[0] in state.kinds
    ]
    back = read(tmp_path / "hf")
    assert detect(tmp_path / "hf") == "hf"
    differing = [item for item in diff(state, back) if item.kind in ("model", "buffer") or item.what == "frozen"]
    assert differing == []


@pytest.mark.parametrize("case", CASES)
def test_reading_into_universal_needs_no_torch(case: str, tmp_path: Path) -> None:
    """Each command would take 1.4 s longer, and a machine without torch could not read anything."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['pickle5'] = None\n"
        "from snapshotd.universal import convert\n"
        f"convert({str(source_of(case))!r}, {str(tmp_path / 'u')!r}, to='universal')\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('transformers', 'deepspeed', 'megatron', 'grpc')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_our_torch_file_loads_with_weights_only(tmp_path: Path) -> None:
    """Nobody could load what we wrote without trusting it."""
    torch = pytest.importorskip("torch")
    convert(source_of("torch_save_plain"), tmp_path / "x.pt", to="torch")
    ours = torch.load(tmp_path / "x.pt", weights_only=True)
    theirs = torch.load(source_of("torch_save_plain"), weights_only=True)
    assert list(theirs["model"].keys() - ours["model"].keys()) == []
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    for key, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][key][name], value) for name, value in state.items())
    for mine, other in zip(ours["optimizer"]["param_groups"], theirs["optimizer"]["param_groups"], strict=True):
        assert other == {key: value for key, value in mine.items() if key != "param_names"}


def test_dcp_load_takes_what_we_wrote_and_training_goes_on(tmp_path: Path) -> None:
    """A user's script, unchanged, could not resume from a converted checkpoint."""
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from tests.fixtures import model as tiny

    truth, _ = truth_of("torch_save_plain")
    convert(source_of("torch_save_plain"), tmp_path / "dcp", to="dcp", layout={"dp": 2, "tp": 2})
    cfg = tiny.Cfg(**truth["model"])
    model = tiny.build(cfg)
    optimizer = torch.optim.AdamW(tiny.groups_of(model, "decay"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, tiny.warm_cos())
    tiny.loss_of(model, cfg, *tiny.batch(cfg, 0)).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    weights, optim = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": optim, "lr_scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    scheduler.load_state_dict(state["lr_scheduler"])
    losses = []
    for step in range(4, 7):
        loss = tiny.loss_of(model, cfg, *tiny.batch(cfg, step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert truth["next_losses"] == pytest.approx(losses, rel=1e-5)


def test_safetensors_package_reads_our_files(tmp_path: Path) -> None:
    """Other tools could not open the weights."""
    numpy = pytest.importorskip("safetensors.numpy")
    convert(source_of("dcp_fsdp2_w2"), tmp_path / "u", to="universal")
    _, expected = truth_of("dcp_fsdp2_w2")
    loaded = numpy.load_file(tmp_path / "u" / "model.safetensors")
    names = {key.split("/", 1)[1]: value for key, value in expected.items() if key.startswith(("model/", "buffer/"))}
    assert {name: value[2] for name, value in names.items()} == {
        name: array.tobytes() for name, array in loaded.items()
    }
