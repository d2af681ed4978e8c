"""One folder, two checkpoints: which of them is read must not depend on the order in which formats are looked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd.cli import main
from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal import open as open_checkpoint
from snapshotd.universal.readers import FORMATS, detect

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TORCH_FILE = "torch_save_plain/checkpoint.pt"


def lay(target: Path, *places: str) -> Path:
    """Put fixtures, folders' contents or files, into one folder."""
    target.mkdir(exist_ok=True)
    for place in places:
        source = FIXTURES / place
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
    return target


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rivals") / "universal"
    convert(FIXTURES / "ds_z1_bf16_w2" / "ckpt", target, to="universal")
    return target


@pytest.mark.parametrize(
    ("places", "claims"),
    [
        (
            ("dcp_fsdp2_w2/ckpt", "ds_z2_bf16_w2/ckpt"),
            {"deepspeed": "latest", "dcp": ".metadata"},
        ),
        (
            ("dcp_fsdp2_w2/ckpt", "ds_z2_bf16_w2/ckpt/global_step4"),
            {"deepspeed": "mp_rank_00_model_states.pt", "dcp": ".metadata"},
        ),
        (
            ("hf_llama_sharded/ckpt", TORCH_FILE),
            {"hf": "model.safetensors.index.json", "torch": "checkpoint.pt"},
        ),
        (
            ("hf_llama_sharded/ckpt", "dcp_fsdp2_w2/ckpt"),
            {"dcp": ".metadata", "hf": "model.safetensors.index.json"},
        ),
        (
            ("dcp_fsdp2_w2/ckpt", TORCH_FILE),
            {"dcp": ".metadata", "torch": "checkpoint.pt"},
        ),
        (
            ("megatron_tp2_pp2/ckpt", "ds_z2_bf16_w2/ckpt", "dcp_fsdp2_w2/ckpt"),
            {"megatron": "latest_checkpointed_iteration.txt", "deepspeed": "latest", "dcp": ".metadata"},
        ),
        (
            ("megatron_tp2_pp2/ckpt/iter_0000004", "dcp_fsdp2_w2/ckpt"),
            {"megatron": "mp_rank_00_000", "dcp": ".metadata"},
        ),
    ],
)
def test_two_checkpoints_in_one_folder_are_told(
    places: tuple[str, ...], claims: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of another run would be converted, and nobody would know."""
    path = lay(tmp_path / "both", *places)
    with pytest.raises(UsageError, match="checkpoints of several formats") as raised:
        detect(path)
    told = ", ".join(f"{name} ({file})" for name, file in claims.items())
    assert f"{path} holds checkpoints of several formats: {told}: say with --from which one is meant" == str(
        raised.value
    )
    for words in (
        ["inspect", str(path)],
        ["verify", str(path)],
        ["convert", str(path), str(tmp_path / "u"), "--to", "hf"],
    ):
        assert UsageError.exit_code == main(words)
        assert told in capsys.readouterr().err
    assert not (tmp_path / "u").exists()
    for name in claims:
        assert 0 == main(["inspect", str(path), "--from", name])
        assert f"format: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["dcp_fsdp2_w2/ckpt", "ds_z2_bf16_w2/ckpt", TORCH_FILE, "hf_llama_sharded/ckpt"])
def test_universal_beside_another(place: str, universal: Path, tmp_path: Path) -> None:
    """A conversion into a folder that was not empty would hide what was there."""
    path = lay(tmp_path / "both", place)
    shutil.copytree(universal, path, dirs_exist_ok=True, copy_function=_unless_there)
    with pytest.raises(UsageError, match=r"several formats: universal \(universal.json\), "):
        detect(path)
    with open_checkpoint(path, "universal") as checkpoint:
        assert 4 == checkpoint.step


def _unless_there(source: str, target: str) -> None:
    if not Path(target).exists():
        shutil.copy(source, target)


@pytest.mark.parametrize("text", ["", "{", '{"format": "snapshotd-universal", "version": 1}'])
def test_what_is_broken_is_told_as_before(text: str, universal: Path, tmp_path: Path) -> None:
    """That a marker was cut short is the news, and not that its own weights lie beside it."""
    path = tmp_path / "u"
    shutil.copytree(universal, path)
    (path / "universal.json").write_text(text)
    assert "universal" == detect(path)
    with pytest.raises(FormatError, match=r"universal\.json"):
        open_checkpoint(path)


def _trainer(path: Path) -> None:
    """HF Trainer under DeepSpeed: the weights for transformers beside the folder of the training state."""
    lay(path, "hf_llama_sharded/ckpt", "ds_z2_bf16_w2/ckpt")
    (path / "zero_to_fp32.py").write_text("")
    (path / "trainer_state.json").write_text("{}")


def _hub(path: Path) -> None:
    """The same weights twice, as the hub has them, and what is no checkpoint."""
    lay(path, "hf_llama_sharded/ckpt")
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2)}, path / "pytorch_model.bin")
    torch.save({"projector.weight": torch.zeros(2)}, path / "mm_projector.bin")


def _trainer_of_one(path: Path) -> None:
    """HF Trainer alone: the optimizer's own file is part of it."""
    torch = pytest.importorskip("torch")
    lay(path, "hf_llama_sharded/ckpt")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save({"last_epoch": 1}, path / "scheduler.pt")


def _accelerate(path: Path) -> None:
    """accelerate's two folders, with weights that were gathered for use."""
    lay(path, "hf_llama_sharded/ckpt")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        lay(path / name, "dcp_fsdp2_w2/ckpt")


def _megatron_deepspeed(path: Path) -> None:
    """Megatron-DeepSpeed leaves Megatron's tracker file beside DeepSpeed's files."""
    lay(path, "ds_z2_bf16_w2/ckpt")
    (path / "latest_checkpointed_iteration.txt").write_text("4")


def _lightning(path: Path) -> None:
    """Lightning's own facts beside DCP's files."""
    torch = pytest.importorskip("torch")
    lay(path, "dcp_fsdp2_w2/ckpt")
    torch.save({"epoch": 1, "global_step": 4, "optimizer_states": [], "lr_schedulers": []}, path / "meta.pt")


def _damaged(path: Path) -> None:
    """What cannot be read is no second checkpoint."""
    lay(path, "dcp_fsdp2_w2/ckpt", "hf_llama_sharded/ckpt/model.safetensors.index.json")
    (path / "checkpoint.pt").write_bytes(b"PK\x03\x04 and nothing else")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_trainer, "deepspeed"),
        (_hub, "hf"),
        (_trainer_of_one, "hf"),
        (_accelerate, "dcp"),
        (_megatron_deepspeed, "deepspeed"),
        (_lightning, "dcp"),
        (_damaged, "dcp"),
    ],
)
def test_what_comes_together_is_one_checkpoint(make: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    """Trainers leave several formats in one folder every day."""
    make(tmp_path / "c")
    assert expected == detect(tmp_path / "c")


def test_our_own_folder_is_one_checkpoint(universal: Path) -> None:
    assert "universal" == detect(universal)
    assert "hf" in FORMATS and (universal / "model.safetensors").is_file()
