"""Every fixture through every format and back: all that the format can hold is as it was, the rest is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapshotd.cli import main
from snapshotd.errors import UsageError
from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = sorted(entry.name for entry in FIXTURES.iterdir() if (entry / "truth.json").is_file())
MEGATRON = [case for case in CASES if case.startswith("megatron")]
LAYOUTS = {"dcp": {"dp": 3}, "megatron": {"tp": 2, "pp": 1}}


def source_of(case: str) -> Path:
    folder = FIXTURES / case
    return folder / "ckpt" if (folder / "ckpt").is_dir() else folder / "checkpoint.pt"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def universal(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture as a universal checkpoint, which each test of it reads."""
    path = tmp_path_factory.mktemp("universal") / "u"
    convert(source_of(case), path, to="universal")
    return path


@pytest.mark.parametrize("to", ["universal", "dcp", "torch", "deepspeed", "megatron", "hf"])
def test_there_and_back(case: str, universal: Path, to: str, tmp_path: Path) -> None:
    """Who converts to try another framework, and comes back, must not have lost anything that nobody spoke of."""
    whole = read(universal)
    target = tmp_path / ("x.pt" if to == "torch" else "x")
    if to == "megatron" and case not in MEGATRON:
        with pytest.raises(UsageError, match="not those of a Megatron-core GPT model"):
            convert(universal, target, to=to)
        return
    if to == "deepspeed" and not whole.param_groups and not whole.optimizer_kinds:
        assert ["there are no parameter groups"] == [
            line.split(":")[0] for line in convert(universal, target, to=to).lost
        ]
        return
    report = convert(universal, target, to=to, layout=LAYOUTS.get(to))
    back = read(target)
    back.check()
    differences = diff(whole, back)
    told = {line.split(":")[0].removeprefix("extra.") for line in report.lost}
    silent = [
        item
        for item in differences
        if not (item.what == "missing" and item.kind in told)
        and not (item.what == "param_groups" and "param_groups" in told)
        and not (item.what == "extra_state" and set(whole.extra) - set(back.extra) <= told)
    ]
    assert [] == silent
    assert to == "hf" or [] == report.lost


def test_what_is_lost_is_a_warning_and_in_the_json_and_strict_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(source_of("ds_z2_bf16_w2"))
    assert 0 == main(["convert", source, str(tmp_path / "a"), "--to", "hf"])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not kept: ")]
    assert 0 == main(["convert", source, str(tmp_path / "b"), "--to", "hf", "--json"])
    lost = json.loads(capsys.readouterr().out)["lost"]
    assert [f"not kept: {line}" for line in lost] == told
    kinds = {line.split(":")[0] for line in lost}
    assert {"fp32", "exp_avg", "exp_avg_sq", "step", "rng", "param_groups", "extra.lr_scheduler"} <= kinds
    assert 2 == main(["convert", source, str(tmp_path / "c"), "--to", "hf", "--strict"])
    assert "exp_avg" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
