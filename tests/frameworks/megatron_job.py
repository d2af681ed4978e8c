"""
Runs of the real Megatron-core: train, keep the live state, save as Megatron-LM does, go on; or load and go on.

``megatron.training`` is not on PyPI, so what it does around the core (which files, which keys) is done here.
"""

from __future__ import annotations

import argparse
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.frameworks import cuda_on_cpu

warnings.filterwarnings("ignore")
cuda_on_cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, mpu, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

from tests.fixtures import model as tiny  # noqa: E402

BATCH = 12


def _set_states(self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
    """
    Megatron's own, but for two faults that show with torch's AdamW only, where Transformer Engine's is not installed:
    it wants a "step" that its own files do not have, and writes into fp32 weights without no_grad.
    """
    group, order = self.model_param_group_index_map[parameter]
    main = self.optimizer.param_groups[group]["params"][order]
    states = {"param": main, **self.optimizer.state[main]}
    with torch.no_grad():
        for kind in states.keys() - {"step"}:
            states[kind].copy_(tensors[kind])


DistributedOptimizer._set_main_param_and_optimizer_states = _set_states
moe_utils.te_general_gemm = None  # a name that 0.16.1 forgets to set without Transformer Engine


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: sizes, layout and format. ``divisor``: make_vocab_size_divisible_by."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    layers: int = 4
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    ffn: int = 56
    vocab: int = 97
    divisor: int = 8
    micro: int = 6
    experts: int = 0
    bf16: bool = True
    tied: bool = False
    swiglu: bool = True
    bias: bool = False
    norm: str = "RMSNorm"
    position: str = "learned_absolute"
    distributed: bool = False
    sharding: str = "dp_reshardable"
    form: str = "torch"
    steps: int = 4

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def padded(self) -> int:
        step = self.divisor * self.tp
        return -(-self.vocab // step) * step


class Run:
    """One rank's model, optimizer and scheduler."""

    def __init__(self, case: Case) -> None:
        self.case = case
        chunks = case.vpp if case.pp > 1 else 1
        mpu.initialize_model_parallel(
            case.tp,
            case.pp,
            chunks if chunks > 1 else None,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.tp,
        )
        seed = 900 + 100 * mpu.get_pipeline_model_parallel_rank()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self.config = _transformer_config(case)
        self.model = [self._chunk(i, chunks) for i in range(chunks)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=3e-3,
                min_lr=3e-4,
                weight_decay=0.1,
                adam_beta2=0.95,
                bf16=case.bf16,
                params_dtype=self.config.params_dtype,
                clip_grad=0.0,
                use_distributed_optimizer=case.distributed,
            ),
            self.model,
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=3e-3,
            min_lr=3e-4,
            lr_warmup_steps=2 * BATCH,
            lr_decay_steps=20 * BATCH,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=20 * BATCH,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )
        self.step = 0

    def _chunk(self, number: int, chunks: int) -> DistributedDataParallel:
        case = self.case
        first = mpu.is_pipeline_first_stage(ignore_virtual=True) and number == 0
        last = mpu.is_pipeline_last_stage(ignore_virtual=True) and number == chunks - 1
        module = GPTModel(
            config=self.config,
            transformer_layer_spec=get_gpt_layer_local_spec(case.experts or None, normalization=case.norm),
            vocab_size=case.padded,
            max_sequence_length=BATCH,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type=case.position,
            vp_stage=number if chunks > 1 else None,
        )
        for parameter in module.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        wrapped = Float16Module(self.config, module) if case.bf16 else module
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed, bucket_size=None
        )
        return DistributedDataParallel(self.config, ddp, wrapped, disable_bucketing=number > 0)

    def train(self, steps: int) -> list[float]:
        """Go on for ``steps`` steps; return the losses, means over all microbatches and data-parallel ranks."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        case = self.case
        sizes = tiny.Cfg(vocab=case.vocab, seq=BATCH)
        ids, wanted = tiny.batch(sizes, self.step, mpu.get_data_parallel_rank(), case.dp)
        micros = list(zip(ids.split(case.micro), wanted.split(case.micro), strict=True))
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(micros) for _ in self.model] if len(self.model) > 1 else iter(micros),
            model=self.model,
            num_microbatches=len(micros),
            seq_length=BATCH,
            micro_batch_size=case.micro,
            decoder_seq_length=BATCH,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=BATCH)
        self.step += 1
        mine = [float(torch.stack(found).mean()), 1.0] if found else [0.0, 0.0]
        total = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def args(self) -> argparse.Namespace:
        """What the command line of Megatron-LM would have been, as far as checkpoints depend on it."""
        case = self.case
        return argparse.Namespace(
            num_layers=case.layers,
            hidden_size=case.hidden,
            num_attention_heads=case.heads,
            num_query_groups=case.groups,
            ffn_hidden_size=case.ffn,
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.tp,
            num_experts=case.experts or None,
            world_size=case.world,
            data_parallel_size=case.dp,
            vocab_size=case.vocab,
            padded_vocab_size=case.padded,
            make_vocab_size_divisible_by=case.divisor,
            swiglu=case.swiglu,
            untie_embeddings_and_output_weights=not case.tied,
            transformer_impl="local",
            use_distributed_optimizer=case.distributed,
            accumulate_allreduce_grads_in_fp32=True,
            attention_backend=AttnBackend.auto,
            params_dtype=self.config.params_dtype,
            ckpt_format=case.form,
            consumed_train_samples=self.step * BATCH,
            lr=3e-3,
        )

    def save(self, folder: Path) -> None:
        """Write a checkpoint as megatron.training's save_checkpoint does."""
        place = folder / f"iter_{self.step:07d}"
        metadata = {
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        }
        if self.case.distributed:
            metadata["distrib_optim_sharding_type"] = self.case.sharding
        tree = {"args": self.args(), "checkpoint_version": 3.0, "iteration": self.step}
        stacked = self.case.form == "torch_dist"
        for i, chunk in enumerate(self.model):
            key = "model" if len(self.model) == 1 else f"model{i}"
            whole = chunk.module.sharded_state_dict(metadata=metadata) if stacked else None
            tree[key] = whole if stacked else chunk.state_dict_for_save_checkpoint()
        if stacked:
            tree["optimizer"] = self.optimizer.sharded_state_dict(tree, metadata=metadata)
        else:
            tree["optimizer"] = self.optimizer.state_dict()
        tree["opt_param_scheduler"] = self.scheduler.state_dict()
        tree["num_floating_point_operations_so_far"] = 0
        if stacked:
            _save_stacked(tree, place, metadata)
        else:
            self._save_ranks(tree, place)
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "latest_checkpointed_iteration.txt").write_text(str(self.step))

    def _save_ranks(self, tree: dict[str, Any], place: Path) -> None:
        mine = place / self._folder()
        mine.mkdir(parents=True, exist_ok=True)
        if self.case.distributed:
            self.optimizer.save_parameter_state(str(mine / "distrib_optim.pt"))
        tree["rng_state"] = [_generators()]
        if mpu.get_expert_data_parallel_rank() == 0:
            torch.save(tree, mine / "model_optim_rng.pt")

    def _folder(self) -> str:
        name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}" if self.case.pp > 1 else ""
        return name + (f"_{mpu.get_expert_model_parallel_rank():03d}" if self.case.ep > 1 else "")

    def load(self, folder: Path) -> None:
        """Load Megatron-LM's own format, strictly, as load_checkpoint does."""
        iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
        mine = folder / f"iter_{iteration:07d}" / self._folder()
        tree = torch.load(mine / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        for i, chunk in enumerate(self.model):
            chunk.load_state_dict(tree["model" if len(self.model) == 1 else f"model{i}"], strict=True)
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.case.distributed:
            self.optimizer.load_parameter_state(str(mine / "distrib_optim.pt"))
            self._own_steps()
        self.scheduler.load_state_dict(tree["opt_param_scheduler"])
        generators = tree["rng_state"][0]
        if "torch_rng_state" in generators:
            random.setstate(generators["random_rng_state"])
            np.random.set_state(generators["np_rng_state"])
            torch.set_rng_state(generators["torch_rng_state"])
        self.step = iteration

    def _own_steps(self) -> None:
        """Without Transformer Engine, all states get one and the same step, which each of them then counts up."""
        for one in self.optimizer.chained_optimizers:
            for state in one.optimizer.state.values():
                state["step"] = state["step"].clone()


def _transformer_config(case: Case) -> TransformerConfig:
    more: dict[str, Any] = {}
    if case.experts:
        more = {
            "num_moe_experts": case.experts,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": case.ep,
        }
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        ffn_hidden_size=case.ffn,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        bf16=case.bf16,
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        gated_linear_unit=case.swiglu,
        activation_func=torch.nn.functional.silu if case.swiglu else torch.nn.functional.gelu,
        add_bias_linear=case.bias,
        normalization=case.norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **more,
    )


def _forward(batches: Any, model: torch.nn.Module) -> Any:
    ids, wanted = next(batches)
    size = ids.shape[1]
    places = torch.arange(size).unsqueeze(0).expand_as(ids)
    mask = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    output = model(ids, places, mask, labels=wanted)

    def loss_of(found: torch.Tensor) -> Any:
        loss = found.float().mean()
        return loss, loss.detach().clone()

    return output, loss_of


def _generators() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _save_stacked(tree: dict[str, Any], place: Path, metadata: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
    dist.barrier()
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    dist_checkpointing.save(tree, str(place), get_default_save_sharded_strategy("torch_dist"), content_metadata=content)
