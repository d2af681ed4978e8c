"""
The language of rules: TOML to checked values, and which rule a name has.

Rule 1: the first rule whose pattern fits the whole name and whose kinds fit is the one. No pattern is open at an end.
Rule 2: a rule that matches nothing is an error, unless it is ``optional``: it was meant for something.
Rule 3: what is not understood (a key, a value) is an error that says what is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import UsageError

__all__ = ["PRESETS", "Rule", "Rules", "load_rules", "name_list"]

VERSION: Final = 1
HOWS: Final = ("replicated", "averaged", "sharded", "flattened")

_FOLDER: Final = Path(__file__).resolve().parent / "presets"
PRESETS: Final = tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))
"""Names that ``--rules`` takes instead of a file."""

_TOP_KEYS: Final = ("version", "extends", "optional", "sizes", "rule")
_MAX_BYTES: Final = 1 << 20
_MAX_LISTED: Final = 50
_MAX_SIZE: Final = 1 << 62

Size = int | str
"""A number, or the name of one under ``[sizes]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """
    One rule. ``where`` says for messages which.

    how: ``replicated``: the same on every rank. ``averaged``: the mean of all ranks. ``sharded``: each rank has a part
    of dimension ``dim``. ``flattened``: each rank has a part of the elements in row-major order, padded at the end.
    parts: sharded: the sub-parts of a fused tensor in any unit, or how many equal ones; each is shared by all ranks.
    uneven: sharded: sizes that the ranks do not divide are cut as torch.chunk does it.
    ranks: sharded: how much each rank has of each part, in any unit; empty: all the same.
    shape: flattened: of the whole; None: that of the weights.
    vocabulary: sharded: true rows of a vocabulary; 0: a vocabulary whose true rows are not known.
    multiple: a vocabulary is padded to a multiple of this on each rank.
    """

    names: tuple[str, ...]
    how: str
    where: str = "a rule"
    dim: int = 0
    parts: Size | tuple[Size, ...] = 1
    uneven: bool = False
    ranks: tuple[Size, ...] = ()
    shape: tuple[Size, ...] | None = None
    vocabulary: Size | None = None
    multiple: Size = 128
    kinds: tuple[str, ...] = ()
    optional: bool = False
    plain: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    patterns: tuple[re.Pattern[str], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, names: Iterable[str], **fields: Any) -> Rule:
        """Return a rule for names, which may be patterns. UsageError where a pattern makes no sense."""
        given = tuple(names)
        where = fields.get("where", "a rule")
        wild = [name for name in given if not name or set(name) & set("*?{}")]
        patterns = tuple(_pattern(name, where) for name in wild)
        return cls(names=given, plain=frozenset(given).difference(wild), patterns=patterns, **fields)

    @property
    def units(self) -> list[int]:
        """The sizes of the sub-parts, where names were filled in."""
        if isinstance(self.parts, tuple):
            return [size for size in self.parts if isinstance(size, int)]
        return [1] * (self.parts if isinstance(self.parts, int) else 1)

    def as_padded(self) -> Rule:
        """Return the same rule for a vocabulary that keeps its padding, or has it already."""
        return replace(self, vocabulary=None)

    def matches(self, name: str) -> bool:
        return name in self.plain or any(pattern.fullmatch(name) for pattern in self.patterns)

    def covers(self, kind: str, name: str) -> bool:
        return (not self.kinds or kind in self.kinds) and self.matches(name)


class Rules:
    """A list of rules with the numbers that they use. ``label`` names the file or the preset."""

    def __init__(self, rules: Sequence[Rule], sizes: Mapping[str, int] | None = None, label: str = "the rules") -> None:
        self.rules = list(rules)
        self.sizes = dict(sizes or {})
        self.label = label
        self._found: dict[tuple[str, str], Rule | None] = {}

    def find(self, kind: str, name: str) -> Rule | None:
        """The rule for a tensor, its numbers filled in; None when there is none. UsageError for a number not given."""
        key = (kind, name)
        if key not in self._found:
            rule = next((rule for rule in self.rules if rule.covers(kind, name)), None)
            self._found[key] = None if rule is None else self._filled(rule)
        return self._found[key]

    def require(self, kind: str, names: Iterable[str], why: str) -> None:
        """UsageError that lists those ``names`` that no rule covers, though one is needed; ``why`` says for what."""
        bare = [name for name in names if self.find(kind, name) is None]
        if bare:
            raise UsageError(f"{self.label}: no rule covers {name_list(bare)}, and one is needed: {why}")

    def check_used(self, names: Iterable[str]) -> None:
        """UsageError that lists the patterns of rules that match none of ``names``."""
        known = list(names)
        idle = [rule for rule in self.rules if not any(map(rule.matches, known))]
        wrong = [rule for rule in idle if not rule.optional]
        if not wrong and len(idle) == len(self.rules):
            wrong = idle
        if wrong:
            patterns = name_list([f"{', '.join(rule.names)} ({rule.where})" for rule in wrong])
            raise UsageError(
                f"{self.label}: nothing is matched by {patterns}; mend the patterns, or say optional = true. "
                f"The names are {name_list(known, 20)}"
            )

    def with_sizes(self, sizes: Mapping[str, int]) -> Rules:
        """Return the same rules with more numbers; those that the rules give themselves stay."""
        return Rules(self.rules, {**sizes, **self.sizes}, self.label)

    def _filled(self, rule: Rule) -> Rule:
        number = self._number
        return replace(
            rule,
            parts=_each(rule.parts, lambda size: number(rule, size)),
            ranks=tuple(number(rule, size) for size in rule.ranks),
            shape=None if rule.shape is None else tuple(number(rule, size) for size in rule.shape),
            vocabulary=None if rule.vocabulary is None else number(rule, rule.vocabulary),
            multiple=number(rule, rule.multiple),
        )

    def _number(self, rule: Rule, size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            raise UsageError(f"{rule.where} uses the size {size!r}, which is not under [sizes]: add it there")
        return self.sizes[size]


def load_rules(name: str) -> Rules:
    """Return the rules of the file ``name``, or of the preset of that name."""
    path = Path(name)
    if path.is_file():
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size} bytes; rules have at most {_MAX_BYTES}")
        try:
            return parse_rules(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
    if name in PRESETS:
        return parse_rules((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}")
    raise UsageError(f"--rules: {name} is neither a file nor a preset; there are {', '.join(PRESETS)}")


def parse_rules(text: str, label: str) -> Rules:
    """Return the rules in ``text``; UsageError, with ``label``, for what is wrong with them."""
    if sys.version_info >= (3, 11):  # imported here: most conversions have no rules
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{label} is not TOML: {error}") from error
    _check_keys(values, _TOP_KEYS, label)
    if values.get("version") != VERSION:
        raise UsageError(f"{label}: version is {values.get('version')!r}; this program reads version = {VERSION}")
    optional = _typed(values, "optional", bool, False, label)
    sizes = _typed(values, "sizes", dict, {}, label)
    for key, value in sizes.items():
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise UsageError(f"{label}: sizes.{key} is {value!r}, expected a number")
    listed_rules = _typed(values, "rule", list, [], label)
    rules = [_rule(item, f"{label}, rule {i + 1}", optional) for i, item in enumerate(listed_rules)]
    base = values.get("extends")
    if base is not None:
        if base not in PRESETS:
            raise UsageError(f"{label}: extends is {base!r}; there are the presets {', '.join(PRESETS)}")
        behind = load_rules(base)
        rules += [replace(rule, optional=True) for rule in behind.rules]
        sizes = {**behind.sizes, **sizes}
    if not rules:
        raise UsageError(f"{label} has no [[rule]]")
    return Rules(rules, sizes, label)


def name_list(names: Sequence[str], limit: int = _MAX_LISTED) -> str:
    """Return names for a message, not more than a person reads."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_KEYS: Final = {
    "replicated": (),
    "averaged": (),
    "sharded": ("dim", "parts", "uneven", "ranks", "vocabulary", "multiple"),
    "flattened": ("shape",),
}


def _rule(item: Any, where: str, optional: bool) -> Rule:
    if not isinstance(item, dict):
        raise UsageError(f"{where} is no table: write [[rule]]")
    how = item.get("how")
    if how not in HOWS:
        raise UsageError(f"{where}: how is {how!r}, expected one of {', '.join(HOWS)}")
    _check_keys(item, ("names", "how", "kinds", "optional", *_KEYS[how]), f"{where} ({how})")
    names = _texts(item, "names", where)
    if not names:
        raise UsageError(f"{where} has no names: which tensors is it for?")
    dim = _typed(item, "dim", int, 0, where)
    if not 0 <= dim < 32:
        raise UsageError(f"{where}: dim is {dim}, expected 0 for the first dimension, 1 for the second, ...")
    shape = item.get("shape")
    rule = Rule.of(
        names,
        how=how,
        where=where,
        dim=dim,
        parts=_parts(item.get("parts", 1), f"{where}: parts"),
        uneven=_typed(item, "uneven", bool, False, where),
        ranks=_sizes(item["ranks"], f"{where}: ranks") if "ranks" in item else (),
        shape=None if shape is None else _sizes(shape, f"{where}: shape"),
        vocabulary=_vocabulary(item.get("vocabulary"), where),
        multiple=_size(item.get("multiple", 128), f"{where}: multiple"),
        kinds=_texts(item, "kinds", where),
        optional=_typed(item, "optional", bool, optional, where),
    )
    if rule.vocabulary is not None and rule.parts != 1:
        raise UsageError(f"{where}: a vocabulary has no parts")
    return rule


def _parts(value: Any, where: str) -> Size | tuple[Size, ...]:
    return _sizes(value, where) if isinstance(value, list) else _size(value, where)


def _each(sizes: Size | tuple[Size, ...], change: Callable[[Size], int]) -> Size | tuple[Size, ...]:
    return tuple(map(change, sizes)) if isinstance(sizes, tuple) else change(sizes)


def _vocabulary(value: Any, where: str) -> Size | None:
    if value is None or value is False:
        return None
    return 0 if value is True else _size(value, f"{where}: vocabulary")


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """``*``: anything within a part of the name; ``**``: any number of parts; ``?``: a character; ``{a,b}``."""
    result, at, depth = "", 0, 0
    while at < len(text):
        if text.startswith("**.", at) and (at == 0 or text[at - 1] == "."):
            result, at = result + r"(?:.*\.)?", at + 3
        elif text.startswith(".**", at) and at + 3 == len(text):
            result, at = result + r"(?:\..*)?", at + 3
        elif text.startswith("**", at):
            if text != "**":
                raise UsageError(f"{where}: in {text!r}, ** must be a whole part of the name, as in layers.**.weight")
            result, at = ".*", 2
        else:
            char = text[at]
            depth += {"{": 1, "}": -1}.get(char, 0)
            if depth not in (0, 1):
                raise UsageError(f"{where}: the braces of {text!r} do not match")
            plain = {"*": "[^.]*", "?": "[^.]", "{": "(?:", "}": ")"}.get(char, re.escape(char))
            result, at = result + ("|" if char == "," and depth else plain), at + 1
    if depth or not text:
        raise UsageError(f"{where}: the braces of {text!r} do not match" if text else f"{where}: an empty name")
    return re.compile(result)


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UsageError(f"{where} does not know {', '.join(unknown)}; it takes {', '.join(known)}")


def _typed(values: Mapping[str, Any], key: str, kind: type, default: Any, where: str) -> Any:
    value = values.get(key, default)
    if type(value) is not kind:
        raise UsageError(f"{where}: {key} is {value!r}, expected a {kind.__name__}")
    return value


def _texts(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = values.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: {key} is {value!r}, expected text or a list of texts")
    return tuple(texts)


def _sizes(value: Any, where: str) -> tuple[Size, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} is {value!r}, expected a list of numbers or of names under [sizes]")
    return tuple(_size(item, where) for item in value)


def _size(value: Any, where: str) -> Size:
    return value if isinstance(value, str) else _count(value, where)


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise UsageError(f"{where} is {value!r}, expected a positive number")
    return value
