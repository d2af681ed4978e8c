"""What the real DeepSpeed is run with: one line per feature that moves, renames or drops something in its files."""

from __future__ import annotations

from typing import Any

from tests.frameworks.deepspeed_job import Case

ELASTIC: dict[str, Any] = {"elastic_checkpoint": True}
ROUND_ROBIN: dict[str, Any] = {"round_robin_gradients": True}
ALIGNED: dict[str, Any] = {"parameter_alignment": True}
OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
BF16_OPTIMIZER: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
TIED = {"tied": True}
FUSED = {"optimizer": "config:Adam", "options": {"lr": 1e-3}}

WITHOUT_ZERO = [
    Case(name="z0_fp32", stage=0, dtype="fp32", groups="three"),
    Case(name="z0_fp32_tied", stage=0, dtype="fp32", model=TIED),
    Case(name="z0_bf16_w1", stage=0, world=1),
    Case(name="z0_bf16_tied", stage=0, model=TIED, groups="one"),
    Case(name="z0_fp16", stage=0, dtype="fp16"),
    Case(name="z0_fp16_fused", stage=0, dtype="fp16", **FUSED),
    Case(name="z0_fp32_empty", stage=0, dtype="fp32", changes=("empty",)),
    Case(name="z0_bf16_empty", stage=0, changes=("empty",)),
    Case(name="z0_fp32_fused", stage=0, dtype="fp32", **FUSED),
]

STAGES_1_AND_2 = [
    Case(name="z1_fp32_w1", world=1, dtype="fp32"),
    Case(name="z1_bf16"),
    Case(name="z1_fp32_w3", world=3, dtype="fp32", groups="three"),
    Case(name="z1_bf16_w4", world=4, groups="three"),
    Case(name="z1_fp16", dtype="fp16"),
    Case(name="z1_fp16_skips", dtype="fp16", steps=8,
         config={"fp16": {"initial_scale_power": 24, "loss_scale_window": 2}}),
    Case(name="z2_bf16_w5", stage=2, world=5),
    Case(name="z2_fp16_w3", stage=2, world=3, dtype="fp16", groups="three"),
    Case(name="z1_elastic", zero=ELASTIC),
    Case(name="z2_elastic_w3", stage=2, world=3, zero=ELASTIC, groups="three"),
    Case(name="z1_bf16_optimizer_w3", world=3, config=BF16_OPTIMIZER, groups="three"),
    Case(name="z1_round_robin_w3", world=3, zero=ROUND_ROBIN),
    Case(name="z2_round_robin", stage=2, zero=ROUND_ROBIN, groups="three"),
    Case(name="z1_aligned", zero=ALIGNED),
    Case(name="z2_aligned_round_robin_w3", stage=2, world=3, zero={**ALIGNED, **ROUND_ROBIN}),
    Case(name="z1_tied_w3", world=3, model=TIED),
    Case(name="z2_shared_module_w3", stage=2, world=3, changes=("shared",)),
    Case(name="z1_frozen_layer", dtype="fp32", changes=("frozen layer",)),
    Case(name="z1_empty_and_unused", changes=("empty", "unused")),
    Case(name="z2_empty", stage=2, changes=("empty",)),
    Case(name="z1_frozen_left_out", exclude_frozen=True),
    Case(name="z2_frozen_left_out", stage=2, exclude_frozen=True),
    Case(name="z1_torch_scheduler", scheduler="torch"),
    Case(name="z2_no_client_state", stage=2, client=False),
    Case(name="z1_tag", tag="my-tag.5"),
]

STAGE_3 = [
    Case(name="z3_fp32_w1", stage=3, world=1, dtype="fp32"),
    Case(name="z3_bf16", stage=3),
    Case(name="z3_fp32_w3", stage=3, world=3, dtype="fp32", groups="three"),
    Case(name="z3_bf16_w5", stage=3, world=5),
    Case(name="z3_fp16", stage=3, dtype="fp16"),
    Case(name="z3_sub_groups_w3", stage=3, world=3, zero={"sub_group_size": 1000}, groups="three"),
    Case(name="z3_persistent", stage=3, zero={"stage3_param_persistence_threshold": 200}),
    Case(name="z3_tied_w3", stage=3, world=3, model=TIED),
    Case(name="z3_frozen_layer_w3", stage=3, world=3, changes=("frozen layer",)),
    Case(name="z3_empty_and_unused", stage=3, changes=("empty", "unused")),
    Case(name="z3_frozen_left_out", stage=3, exclude_frozen=True),
    Case(name="z3_one_group", stage=3, groups="one"),
    Case(name="z3_init", stage=3, zero_init=True),
    Case(name="z3_no_scheduler", stage=3, scheduler="none"),
]

OPTIMIZERS = [
    Case(name="z1_fused", **FUSED),
    Case(name="z3_fused_w3", stage=3, world=3, **FUSED),
    Case(name="z1_torch_adam", optimizer="config:AdamW", options={"lr": 1e-3, "torch_adam": True}),
    Case(name="z2_offload", stage=2, zero=OFFLOAD, optimizer="config:AdamW", options={"lr": 1e-3}),
    Case(name="z3_offload", stage=3, zero=OFFLOAD, optimizer="config:AdamW", options={"lr": 1e-3}),
    Case(name="z1_sgd", optimizer="SGD", options={"momentum": 0.9}),
    Case(name="z2_sgd_without_state", stage=2, optimizer="SGD"),
    Case(name="z3_sgd", stage=3, optimizer="SGD", options={"momentum": 0.9}),
    Case(name="z1_adagrad", optimizer="Adagrad", groups="one"),
    Case(name="z1_rmsprop", optimizer="RMSprop", options={"lr": 1e-3, "momentum": 0.9, "centered": True}),
    Case(name="z2_amsgrad", stage=2, options={"amsgrad": True}),
    Case(name="z1_nadam", optimizer="NAdam"),
    Case(name="z1_asgd", optimizer="ASGD"),
    Case(name="z1_rprop", optimizer="Rprop"),
]

PARALLEL = [
    Case(name="pp1_z1_tied", pp=1, model=TIED),
    Case(name="pp2_z1_bf16", pp=2),
    Case(name="pp2_z1_fp32_tied_w4", pp=2, world=4, dtype="fp32", model=TIED),
    Case(name="pp3_z1_fp16_w3", pp=3, world=3, dtype="fp16", model={"layers": 5}, groups="three"),
    Case(name="pp2_bf16_optimizer_w4", pp=2, world=4, model=TIED, config=BF16_OPTIMIZER),
    Case(name="pp2_z0_bf16_tied", pp=2, stage=0, model=TIED),
    Case(name="pp2_z0_fp32", pp=2, stage=0, dtype="fp32"),
    Case(name="pp2_z0_fp16", pp=2, stage=0, dtype="fp16"),
    Case(name="tp2_z0_bf16", tp=2, stage=0),
    Case(name="tp2_z1_bf16", tp=2),
    Case(name="tp2_z1_unfused", tp=2, model={"fused": False}, gather_head=True),
    Case(name="tp2_z1_uneven", tp=2, model={"heads": 6, "kv_heads": 3, "hidden": 48, "ffn": 57}, groups="three"),
    Case(name="tp2_z2_fp32_tied_w4", tp=2, world=4, stage=2, dtype="fp32", model=TIED),
    Case(name="tp2_z3_w4", tp=2, world=4, stage=3),
    Case(name="moe_z0_fp32", experts=4, ep=2, stage=0, dtype="fp32"),
    Case(name="moe_z0_bf16", experts=4, ep=2, stage=0),
    Case(name="moe_z1", experts=4, ep=2),
    Case(name="moe_z2_w4", experts=4, ep=2, world=4, stage=2),
    Case(name="moe_z2_ep1", experts=2, ep=1, stage=2),
    Case(name="moe_data_first_w4", experts=4, ep=2, world=4,
         config={"use_data_before_expert_parallelism": True}),
    Case(name="moe_residual", experts=4, ep=2, residual=True),
    Case(name="moe_round_robin_w4", experts=4, ep=2, world=4, stage=2, zero=ROUND_ROBIN),
    Case(name="moe_bf16_optimizer_w4", experts=4, ep=2, world=4, config=BF16_OPTIMIZER),
]

READ = [*WITHOUT_ZERO, *STAGES_1_AND_2, *STAGE_3, *OPTIMIZERS, *PARALLEL]

SOURCES = {case.name: case for case in READ}

SAME = (
    *("z1_bf16", "z1_fp16", "z1_tied_w3", "z1_sgd", "z1_torch_scheduler", "z1_bf16_optimizer_w3", "z1_fused"),
    *("z3_one_group", "z3_fused_w3"),
)
"""
Sources that the same run goes on from, after a way through Universal and back: its losses must be the very same. Stage
3's loader makes one tensor the step of all groups: with several, torch's optimizers count it up once for each.
"""

OTHER = [
    ("z1_bf16", {"stage": 2, "world": 3}),
    ("z1_bf16", {"stage": 3, "world": 4}),
    ("z3_bf16", {}),
    ("z3_bf16_w5", {"stage": 1, "world": 1}),
    ("z2_fp16_w3", {"stage": 3, "world": 2}),
    ("z0_fp32", {"stage": 1, "world": 2}),
    ("z2_round_robin", {"stage": 2, "world": 3, "zero": {}}),
    ("z3_tied_w3", {"stage": 2, "world": 2}),
    ("z2_amsgrad", {"stage": 1, "world": 3}),
    ("z1_bf16_w4", {"stage": 1, "world": 2, "config": BF16_OPTIMIZER}),
    ("tp2_z1_bf16", {"stage": 1, "world": 2, "tp": 1}),
    ("tp2_z1_uneven", {"stage": 2, "world": 3, "tp": 1}),
    ("z1_empty_and_unused", {"stage": 2, "world": 3}),
    ("z2_empty", {"stage": 3, "world": 2}),
]
"""Sources, and what is another in the run that loads them: it must hold the very same state."""
