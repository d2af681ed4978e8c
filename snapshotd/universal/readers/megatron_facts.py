"""
What a Megatron-LM checkpoint says of itself: ``args``, the Namespace of the whole command line, and what follows.

Rule 1: what ``args`` says is used before any rule and any shape; shapes then have to agree with it.
Rule 2: without ``args`` (old or stripped files) sizes come from the folder's names; what only ``args`` knows is None,
and who needs it says so in a warning or refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snapshotd.errors import FormatError
from snapshotd.universal.standins import Record

__all__ = ["Facts", "Place"]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One model-parallel rank: its pipeline stage, tensor rank and expert rank."""

    pp: int
    tp: int
    ep: int


class Facts:
    """
    Sizes and switches of a run. ``label`` names the file that they come from.

    ``tp, pp, vp, ep, etp``: numbers of tensor ranks, pipeline stages, virtual chunks per stage, expert ranks, tensor
    ranks of an expert; they can be set where ``args`` is missing.
    """

    def __init__(self, args: Any, label: str) -> None:
        self.label = label
        self.args: Mapping[str, Any] = {}
        if isinstance(args, Record) and args.kind == "Namespace":
            self.args = args.fields
        elif isinstance(args, dict):
            self.args = args
        elif args is not None:
            raise FormatError(f"{label}: args is a {type(args).__name__}, expected an argparse.Namespace")
        self.tp = self.count("tensor_model_parallel_size") or self.count("model_parallel_size") or 1
        self.pp = self.count("pipeline_model_parallel_size") or 1
        self.vp = self.count("virtual_pipeline_model_parallel_size") or 1
        self.ep = self.count("expert_model_parallel_size") or 1
        self.num_experts = self.count("num_experts") or self.count("num_moe_experts")
        self.etp = self.tp
        if self.num_experts:
            self.etp = self.count("expert_tensor_parallel_size") or self.tp
            if self.num_experts % self.ep:
                raise FormatError(f"{label}: {self.num_experts} experts cannot be on {self.ep} expert ranks")

    @property
    def known(self) -> bool:
        """Whether there were ``args`` at all."""
        return bool(self.args)

    def count(self, name: str) -> int | None:
        """A positive integer, None where the file does not say."""
        value = self.args.get(name)
        return value if type(value) is int and value > 0 else None

    def number(self, name: str) -> float | None:
        value = self.args.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def flag(self, name: str) -> bool:
        return self.args.get(name) is True

    def text(self, name: str) -> str:
        value = self.args.get(name)
        return value if isinstance(value, str) else ""

    @property
    def gated(self) -> bool | None:
        """Whether the first matrix of an MLP is [gate; up]; None: only shapes can tell."""
        if "swiglu" not in self.args:
            return None
        return self.flag("swiglu") or self.flag("quick_geglu") or self.flag("geglu") or self.flag("reglu")

    @property
    def tied(self) -> bool | None:
        """Whether the output layer is the word embedding; None: not known."""
        if "untie_embeddings_and_output_weights" not in self.args:
            return None
        return not self.flag("untie_embeddings_and_output_weights")

    @property
    def data_parallel_size(self) -> int | None:
        """Data-parallel ranks, context parallelism counted in; None: not known."""
        world = self.count("world_size")
        if world is not None and world % (self.tp * self.pp) == 0:
            return world // (self.tp * self.pp)
        dp = self.count("data_parallel_size")
        return None if dp is None else dp * (self.count("context_parallel_size") or 1)

    @property
    def experts_per_rank(self) -> int:
        return (self.num_experts or 0) // self.ep

    def places(self) -> Iterator[Place]:
        """
        Iterate over the ranks that write a legacy checkpoint: the first of each expert-data-parallel group.

        Expert and tensor ranks count over the same machines, each in its own grid; where an expert is cut less often
        than the rest, not every pair of them occurs.
        """
        for pp in range(self.pp):
            seen = {Place(pp, rank % self.tp, rank // self.etp % self.ep) for rank in range(self.etp * self.ep)}
            seen |= {Place(pp, tp, 0) for tp in range(self.tp) if not any(place.tp == tp for place in seen)}
            yield from sorted(seen)

    def rank_of(self, place: Place) -> int:
        """The global rank that wrote for ``place``: tensor ranks count fastest, pipeline stages slowest."""
        if self.flag("use_tp_pp_dp_mapping") and self.ep == 1:
            return self.rank_at(place.pp, place.tp, 0)
        stage = self.tp * (self.data_parallel_size or max(1, self.etp * self.ep // self.tp))
        for rank in range(max(self.etp * self.ep, self.tp)):
            if rank % self.tp == place.tp and rank // self.etp % self.ep == place.ep:
                return place.pp * stage + rank
        return place.pp * stage + place.tp

    def rank_at(self, pp: int, tp: int, dp: int) -> int:
        """The global rank of a place in the grid; stages count slowest unless the run mapped them before replicas."""
        if self.flag("use_tp_pp_dp_mapping"):
            return tp + self.tp * (pp + self.pp * dp)
        return tp + self.tp * (dp + (self.data_parallel_size or 1) * pp)

    def layers_of(self) -> list[list[int]]:
        """
        The number of layers of each virtual chunk of each stage, ``[chunk][stage]``, as Megatron divides them.

        Needed only where no file shows it: in distributed checkpoints. FormatError where ``args`` does not say enough.
        """
        total = self.count("num_layers")
        if total is None:
            raise FormatError(f"{self.label}: args does not say num_layers")
        if self.args.get("pipeline_model_parallel_layout") is not None and self.pp > 1:
            return self._layers_of_layout(total)
        first, last = self.count("decoder_first_pipeline_num_layers"), self.count("decoder_last_pipeline_num_layers")
        embedding = self.flag("account_for_embedding_in_pipeline_split")
        loss = self.flag("account_for_loss_in_pipeline_split")
        per_stage = [0] * self.pp
        middle = [i for i in range(self.pp) if not (i == 0 and first) and not (i == self.pp - 1 and last)]
        rest = total - (first or 0) - (last or 0) + embedding + loss
        if middle and rest % len(middle):
            raise FormatError(f"{self.label}: {rest} layers cannot be on {len(middle)} pipeline stages")
        for i in range(self.pp):
            per_stage[i] = rest // len(middle) if i in middle else (first if i == 0 and first else last) or 0
        result = [[count // self.vp for count in per_stage] for _ in range(self.vp)]
        result[0][0] -= embedding
        result[-1][-1] -= loss
        if sum(map(sum, result)) != total or min(map(min, result)) < 0:
            raise FormatError(f"{self.label}: {total} layers cannot be on {self.pp} stages of {self.vp} chunks")
        return result

    def _layers_of_layout(self, total: int) -> list[list[int]]:
        """``Et*3|(tt|)*29,m|L``: stages between bars, t for a layer; commas mean nothing, stars repeat."""
        text = self.text("pipeline_model_parallel_layout").replace(",", "").replace(" ", "")
        stages = [stage.count("t") for stage in _unfold(text, self.label).split("|")]
        if len(stages) != self.pp * self.vp or sum(stages) != total:
            raise FormatError(
                f"{self.label}: the pipeline layout {text!r:.80} has {len(stages)} parts and {sum(stages)} layers, "
                f"expected {self.pp * self.vp} and {total}"
            )
        return [stages[chunk * self.pp : (chunk + 1) * self.pp] for chunk in range(self.vp)]


def _unfold(text: str, label: str, depth: int = 0) -> str:
    """Write out ``x*3`` and ``(..)*3``."""
    result, at = "", 0
    while at < len(text):
        item = text[at]
        at += 1
        if item == "(":
            level, begin = 1, at
            while at < len(text) and level:
                level += {"(": 1, ")": -1}.get(text[at], 0)
                at += 1
            if level or depth > 20:
                raise FormatError(f"{label}: the pipeline layout {text!r:.80} makes no sense")
            item = _unfold(text[begin : at - 1], label, depth + 1)
        times = ""
        if at < len(text) and text[at] == "*":
            at += 1
            while at < len(text) and text[at].isdigit():
                times += text[at]
                at += 1
        result += item * min(int(times or 1), 10_000)
        if len(result) > 1_000_000:
            raise FormatError(f"{label}: the pipeline layout {text!r:.80} makes no sense")
    return result
