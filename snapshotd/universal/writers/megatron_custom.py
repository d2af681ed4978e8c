"""
Parameters that Megatron-core does not know, and vocabularies: what of a model can be written for Megatron-LM, and how
many rows it has there.
"""

from __future__ import annotations

from snapshotd.errors import UsageError
from snapshotd.universal.derived import Filled
from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_names import EMBEDDING, in_list_order, is_buffer, is_expert
from snapshotd.universal.readers.megatron_padding import padding_of
from snapshotd.universal.readers.megatron_rules import is_fused
from snapshotd.universal.rules import Rule, Rules, load_rules, name_list
from snapshotd.universal.state import State
from snapshotd.universal.views import View, concat

__all__ = ["Padder", "check_names"]


def check_names(state: State, given: Rules | None) -> None:
    """UsageError where parameters are neither Megatron-core's nor in the user's rules."""
    names = [name for name, tensor in state.of_kind("model").items() if not is_buffer(name, tensor.view)]
    preset, own = load_rules("megatron"), given.rules if given is not None else []
    unknown = [
        name
        for name in names
        if not is_fused(name)
        and (preset.find("model", name) is None or not (own or in_list_order(name)))
        and not any(rule.covers("model", name) for rule in own)
    ]
    if unknown or EMBEDDING not in names:
        told = f"nothing is known of {name_list(unknown, 5)}" if unknown else f"{EMBEDDING} is missing"
        remedy = ": how tensor ranks share what is your own, --rules can say" if EMBEDDING in names else ""
        raise UsageError(f"the parameters are not those of a Megatron-core GPT model: {told}{remedy}")


class Padder:
    """Gives vocabularies the rows that tensor ranks divide: the source's own where they fit, else zeros."""

    def __init__(self, state: State, facts: Facts, rules: Rules) -> None:
        self._facts, self._rules = facts, rules
        self._preset = load_rules("megatron")
        self._kept = padding_of(state)
        self._used: set[tuple[str, str]] = set()

    def pads(self, kind: str, name: str) -> bool:
        """Whether the tensor is a vocabulary."""
        rule = self._rules.find(kind, name)
        return rule is not None and rule.vocabulary is not None

    def padded(self, kind: str, name: str, view: View) -> View:
        """Return ``view`` with its padding. UsageError where it is not of the size that the rule says."""
        rule = self._rules.find("model", name)
        if rule is None or not view.shape:
            return view
        dim = rule.dim
        rows = self._rows_of(rule, name, view.shape[dim])
        kept = self._kept.get((kind, name))
        if kept is not None and kept.dtype == view.dtype and view.shape[dim] + kept.shape[dim] == rows:
            self._used.add((kind, name))
            return concat([view, kept], dim)
        shape = [rows - size if d == dim else size for d, size in enumerate(view.shape)]
        return view if shape[dim] <= 0 else concat([view, Filled(view.dtype, shape)], dim)

    def keeps_all(self) -> bool:
        """Whether the padding that the source had is written as such."""
        return bool(self._kept) and self._used == set(self._kept)

    def _rows_of(self, rule: Rule, name: str, true: int) -> int:
        own = self._preset.find("model", name)
        if own is not None and own.vocabulary is not None:
            return self._facts.count("padded_vocab_size") or 0
        if rule.vocabulary not in (0, true):
            raise UsageError(f"{rule.where}: {name} has {true} rows, and vocabulary = {rule.vocabulary}")
        ranks = self._facts.etp if is_expert(name) else self._facts.tp
        step = ranks * (rule.multiple if isinstance(rule.multiple, int) else 1)
        return -(-true // step) * step
