"""
Make ``tests/fixtures/deepspeed_*`` anew: ``.venv-deepspeed/bin/python -m tests.frameworks.deepspeed_fixtures``.

Small checkpoints of the real DeepSpeed, each with the state of the live engine, for what the other fixtures have not:
shards with an affine map, experts, optimizers of stages and expert ranks without names, shuffled and aligned.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tests.frameworks.deepspeed_cases import SOURCES
from tests.frameworks.deepspeed_job import launch

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SMALL = {"vocab": 41, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 24, "seq": 8, "extra_odd": 11}
NAMES = (
    *("tp2_z1_bf16", "tp2_z3_w4", "moe_z0_bf16", "moe_z2_w4", "pp2_z0_fp32", "pp2_z1_fp32_tied_w4"),
    *("z2_aligned_round_robin_w3", "z0_fp16_fused", "z1_elastic", "z1_sgd"),
)


def main() -> None:
    for name in NAMES:
        folder = FIXTURES / f"deepspeed_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        case = SOURCES[name]
        launch("train", replace(case, model={**SMALL, **case.model}), folder)
        for script in (folder / "ckpt").glob("*.py"):  # DeepSpeed's own, not ours
            script.unlink()


if __name__ == "__main__":
    main()
