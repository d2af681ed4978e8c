"""
What stands for the names and objects of a pickle: they remember what it says of them, and do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snapshotd.errors import FormatError

__all__ = ["Constant", "Global", "Record", "UnsafePickle"]


class UnsafePickle(FormatError):
    """A pickle names something that is not on the closed list, or asks for what no checkpoint needs."""

    code = "UNSAFE_PICKLE"
    hint = "nothing of it was run; if the file is yours, save it again with plain tensors, numbers, lists and dicts"


class Global:
    """
    A name on the closed list, ``module.name``. ``make(*args)`` is what calling it does; None: it can not be called.

    ``is_class``: it can be used by NEWOBJ, and a Record results when ``make`` is None.
    """

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.make = make

    def __call__(self, args: tuple[Any, ...]) -> Any:
        if self.make is None:
            return Record(self.name, args)
        try:
            return self.make(*args)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise FormatError(f"the pickle calls {self.name} in a way that makes no sense: {error!s:.200}") from error

    def __repr__(self) -> str:
        return f"Global({self.name!r})"


class Constant:
    """A name on the closed list that stands for an object of the class ``name``: a new Record for each who asks."""

    __slots__ = ("args", "name")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args

    def make(self) -> Record:
        return Record(self.name, self.args)


class Record:
    """
    An object of a class on the list: the class's name, the arguments it was made with, and its fields.

    ``get`` reads a field; one that the writer's version did not have yet is None. ``member``: of an enum that was saved
    by the name of its member, that name; most are saved by their values, which are ``args`` then.
    """

    __slots__ = ("args", "fields", "member", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = (), member: str | None = None) -> None:
        self.name = name
        self.args = args
        self.member = member
        self.fields: dict[str, Any] = {}
        self.state: Any = None

    @property
    def kind(self) -> str:
        """The class's own name, without its module."""
        return self.name.rpartition(".")[2]

    def get(self, field: str, default: Any = None) -> Any:
        return self.fields.get(field, default)

    def build(self, state: Any) -> None:
        slots = None
        if type(state) is tuple and len(state) == 2 and all(part is None or type(part) is dict for part in state):
            state, slots = state
        for part in (state, slots):
            if type(part) is dict:
                for key, value in part.items():
                    if type(key) is str:
                        self.fields[key] = value
            elif part is not None:
                self.state = part

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.args!r:.80})"
