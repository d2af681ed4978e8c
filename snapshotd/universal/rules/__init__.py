"""
Rules: how the parts of a tensor on several ranks make a whole, where the source does not record it.

language.py reads them (TOML; docs/reference/rules.md has the language), shares.py applies them. ``presets/`` holds
those that come with the package.
"""

from __future__ import annotations

from snapshotd.universal.rules.language import PRESETS, Rule, Rules, load_rules, name_list
from snapshotd.universal.rules.ranks import cut_ranks, join_ranks, rules_of_record
from snapshotd.universal.rules.shares import Rejoiner, join_parts, merge, split, widths

__all__ = [
    "PRESETS",
    "Rejoiner",
    "Rule",
    "Rules",
    "cut_ranks",
    "join_parts",
    "join_ranks",
    "name_list",
    "load_rules",
    "merge",
    "rules_of_record",
    "split",
    "widths",
]
