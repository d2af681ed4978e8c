"""
A pickle reader that can not run anything: our own machine for the opcodes, and a closed list of names.

It does not use the ``pickle`` module. A name in a pickle is looked up in ``GLOBALS`` (see globals.py) and nowhere else;
what is not there is refused by name, with UnsafePickle, before anything else happens. What is there are stand-ins of
ours: a rebuilt tensor is a ``TensorRef`` to a range of a file, an object of a framework is a ``Record`` with the name
of its class, arguments and fields, and a function is one of ours that checks its arguments. torch, numpy's own
unpickling, and the frameworks are never imported.

Rule 1: whatever the bytes are, the result is plain values and stand-ins, or FormatError (UnsafePickle is one).
Rule 2: every length is checked against the bytes that are left before it is used, memo indexes are kept in a dict, and
the number of opcodes, the depth of marks, and the length of numbers are bounded.
Rule 3: only lists, dicts, sets and records are changed by opcodes; nothing has a ``__setstate__`` that is called, no
attribute of a Python object is ever set.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from snapshotd.errors import FormatError, LayoutError
from snapshotd.universal.globals import GLOBALS
from snapshotd.universal.standins import Constant, Global, Record, UnsafePickle

__all__ = ["Persistent", "unpickle", "unpickle_with_end", "walk"]

MAX_OPCODES: Final = 200_000_000
"""Opcodes of one pickle. The metadata of 10,000 ranks x 3,000 tensors has some 100 million."""

MAX_MARKS: Final = 1000
"""Open marks: nesting of containers under construction. Python's own recursion limit is of this size."""

MAX_LONG_BYTES: Final = 1024
"""Bytes of one integer. RNG states and hashes stay below 32; long integers cost quadratic time to print."""

Persistent = Callable[[Any], Any]
"""What makes an object of a persistent id: a storage, in torch's files."""


def unpickle(data: bytes | memoryview, *, what: str, persistent: Persistent | None = None) -> Any:
    """Return what the pickle ``data`` holds; ``what`` names it in messages. FormatError (UnsafePickle) otherwise."""
    return unpickle_with_end(data, what=what, persistent=persistent)[0]


def unpickle_with_end(
    data: bytes | memoryview, *, what: str, persistent: Persistent | None = None, begin: int = 0
) -> tuple[Any, int]:
    """As ``unpickle``, from ``data[begin]`` on; returns the end of the pickle too: legacy files have several."""
    machine = _Machine(bytes(data), what, persistent, begin, GLOBALS)
    try:
        value = machine.run()
    except FormatError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LayoutError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
        MemoryError,
    ) as error:
        raise FormatError(f"{what}: not a readable pickle, at byte {machine.at}: {error!s:.200}") from error
    return value, machine.at


def walk(value: Any, limit: int = 50_000_000) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Iterate over (path, leaf) of nested dicts, lists and tuples; FormatError when it never ends or is too large."""
    todo: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    count = 0
    while todo:
        path, item = todo.pop()
        count += 1
        if count > limit or len(path) > MAX_MARKS:
            raise FormatError("a structure is too deep or too large, or contains itself")
        if isinstance(item, dict) and item:
            todo += [((*path, key), child) for key, child in reversed(item.items())]
        elif isinstance(item, (list, tuple)) and item:
            todo += [((*path, i), item[i]) for i in range(len(item) - 1, -1, -1)]
        else:
            yield path, item


_MARK: Final = object()


class _Machine:
    """The opcodes. ``at`` is the next byte."""

    def __init__(
        self, data: bytes, what: str, persistent: Persistent | None, begin: int, known: Mapping[str, Any]
    ) -> None:
        self.data, self.what, self.persistent, self.at, self.known = data, what, persistent, begin, known
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, table, stop = self.data, _TABLE, 0x2E
        end = len(data)
        for _ in range(MAX_OPCODES):
            at = self.at
            if at >= end:
                raise self.wrong("it ends before its STOP: it was cut short")
            code = data[at]
            self.at = at + 1
            if code == stop:
                break
            step = table[code]
            if step is None:
                raise self.wrong(f"byte 0x{code:02x} at {at} is no opcode that is read here")
            step(self)
        else:
            raise self.wrong(f"it has more than {MAX_OPCODES} opcodes")
        if len(self.stack) != 1 or self.marks:
            raise self.wrong("it leaves more or less than one object")
        return self.stack[0]

    def wrong(self, why: str) -> FormatError:
        return FormatError(f"{self.what}: not a readable pickle: {why}")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise self.wrong(f"a length of {count} at byte {self.at}, but {len(self.data) - self.at} bytes are left")
        data = self.data[self.at : end]
        self.at = end
        return data

    def number(self, count: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + 65536)
        if end < 0:
            raise self.wrong(f"a line at byte {self.at} has no end")
        line = self.data[self.at : end]
        self.at = end + 1
        return line

    def pop(self) -> Any:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise self.wrong(f"nothing is left on the stack at byte {self.at}")
        return self.stack.pop()

    def top(self) -> Any:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise self.wrong(f"nothing is on the stack at byte {self.at}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.wrong(f"there is no mark at byte {self.at}")
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            raise self.wrong(f"it is nested deeper than {MAX_MARKS}")
        self.marks.append(len(self.stack))

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise self.wrong(f"memo {key} was never put")
        self.stack.append(self.memo[key])

    def put(self, key: int) -> None:
        self.memo[key] = self.top()

    def find(self, module: str, name: str) -> None:
        found = self.known.get(f"{module}.{name}")
        if found is None:
            raise UnsafePickle(
                f"{self.what}: refused, because it names {module}.{name}, which is not on the closed list of what "
                "checkpoints need"
            )
        self.stack.append(found.make() if isinstance(found, Constant) else found)

    def call(self, target: Any, args: Any) -> None:
        if not isinstance(target, Global):
            raise UnsafePickle(f"{self.what}: refused, because it calls {type(target).__name__}, which is no function")
        if type(args) is not tuple:
            raise self.wrong(f"{target.name} is called with {type(args).__name__} instead of arguments")
        try:
            made = target(args)
        except FormatError as error:
            if str(error).startswith(self.what.partition(" (")[0]):
                raise
            raise type(error)(f"{self.what}: {error}") from error
        self.stack.append(made)

    def build(self, state: Any) -> None:
        target = self.top()
        if isinstance(target, Record):
            target.build(state)
        elif hasattr(type(target), "pickle_state"):
            type(target).pickle_state(target, state)  # ours: a numpy array or dtype under construction
        elif not isinstance(target, dict):  # an OrderedDict's own attributes (_metadata of a state dict) say nothing
            raise UnsafePickle(f"{self.what}: refused, because it sets the state of a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.wrong(f"it sets items of a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise self.wrong(f"it appends to a {type(target).__name__}")
        target += items

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise self.wrong("it refers to storages outside of it")
        self.stack.append(self.persistent(key))


_Step = Callable[[_Machine], None]


def _long(m: _Machine, count: int) -> None:
    if not 0 <= count <= MAX_LONG_BYTES:
        raise m.wrong(f"an integer of {count} bytes")
    m.stack.append(m.number(count, signed=True))


def _text(m: _Machine, count: int) -> None:
    m.stack.append(str(m.take(count), "utf-8", "surrogatepass"))


def _decimal(m: _Machine) -> None:
    line = m.line()
    if line in (b"00", b"01"):
        m.stack.append(line == b"01")
    elif len(line) > 2 * MAX_LONG_BYTES:
        raise m.wrong("a decimal number without end")
    else:
        m.stack.append(int(line.rstrip(b"L")))


def _string(m: _Machine) -> None:
    line = m.line().strip()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1] or b"\\" in line:
        raise m.wrong("a STRING that is not simple")
    m.stack.append(str(line[1:-1], "latin-1"))


def _global_line(m: _Machine) -> None:
    module, name = str(m.line(), "utf-8"), str(m.line(), "utf-8")
    m.find(module, name)


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise m.wrong("a global whose name is no text")
    m.find(module, name)


def _instance(m: _Machine) -> None:
    _global_line(m)
    target = m.pop()
    m.call(target, tuple(m.pop_mark()))


def _object(m: _Machine) -> None:
    items = m.pop_mark()
    if not items:
        raise m.wrong("OBJ without a class")
    m.call(items[0], tuple(items[1:]))


def _reduce(m: _Machine) -> None:
    args = m.pop()
    m.call(m.pop(), args)


def _new_ex(m: _Machine) -> None:
    kwargs, args, target = m.pop(), m.pop(), m.pop()
    if kwargs != {}:
        raise m.wrong("an object made with keyword arguments")
    m.call(target, args)


def _tuple_of(m: _Machine, count: int) -> None:
    items = [m.pop() for _ in range(count)]
    m.stack.append(tuple(reversed(items)))


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


def _add_items(m: _Machine) -> None:
    items = m.pop_mark()
    target = m.top()
    if not isinstance(target, set):
        raise m.wrong(f"it adds to a {type(target).__name__}")
    target.update(items)


def _pop(m: _Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.pop()


def _protocol(m: _Machine) -> None:
    version = m.number(1)
    if not 0 <= version <= 5:
        raise m.wrong(f"protocol {version} is not known")


def _append(m: _Machine) -> None:
    item = m.pop()
    m.extend([item])


def _build(m: _Machine) -> None:
    state = m.pop()
    m.build(state)


def _push(make: Callable[[], Any]) -> _Step:
    return lambda m: m.stack.append(make())


def _frozen_set(m: _Machine) -> None:
    m.stack.append(frozenset(m.pop_mark()))


def _frame(m: _Machine) -> None:
    length = m.number(8)
    if length > len(m.data) - m.at:
        raise m.wrong(f"a frame of {length} bytes, but {len(m.data) - m.at} are left")


def _pop_to_mark(m: _Machine) -> None:
    m.pop_mark()


def _dict(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append({})
    m.set_items(items)


_STEPS: Final[dict[bytes, _Step]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _Machine.mark,
    b"0": _pop,
    b"1": _pop_to_mark,
    b"2": lambda m: m.stack.append(m.top()),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"I": _decimal,
    b"L": _decimal,
    b"J": lambda m: m.stack.append(m.number(4, signed=True)),
    b"K": lambda m: m.stack.append(m.number(1)),
    b"M": lambda m: m.stack.append(m.number(2)),
    b"\x8a": lambda m: _long(m, m.number(1)),
    b"\x8b": lambda m: _long(m, m.number(4, signed=True)),
    b"F": lambda m: m.stack.append(float(m.line())),
    b"G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    b"S": _string,
    b"T": lambda m: m.stack.append(str(m.take(m.number(4, signed=True)), "latin-1")),
    b"U": lambda m: m.stack.append(str(m.take(m.number(1)), "latin-1")),
    b"B": lambda m: m.stack.append(m.take(m.number(4))),
    b"C": lambda m: m.stack.append(m.take(m.number(1))),
    b"\x8e": lambda m: m.stack.append(m.take(m.number(8))),
    b"\x96": lambda m: m.stack.append(m.take(m.number(8))),
    b"V": lambda m: m.stack.append(str(m.line(), "raw-unicode-escape")),
    b"X": lambda m: _text(m, m.number(4)),
    b"\x8c": lambda m: _text(m, m.number(1)),
    b"\x8d": lambda m: _text(m, m.number(8)),
    b"c": _global_line,
    b"\x93": _stack_global,
    b"i": _instance,
    b"o": _object,
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _new_ex,
    b"b": _build,
    b")": _push(tuple),
    b"]": _push(list),
    b"}": _push(dict),
    b"\x8f": _push(set),
    b"\x85": lambda m: _tuple_of(m, 1),
    b"\x86": lambda m: _tuple_of(m, 2),
    b"\x87": lambda m: _tuple_of(m, 3),
    b"t": lambda m: m.stack.append(tuple(m.pop_mark())),
    b"l": lambda m: m.stack.append(m.pop_mark()),
    b"d": _dict,
    b"a": _append,
    b"e": lambda m: m.extend(m.pop_mark()),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"\x90": _add_items,
    b"\x91": _frozen_set,
    b"g": lambda m: m.get(int(m.line())),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
    b"p": lambda m: m.put(int(m.line())),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"P": lambda m: m.persist(str(m.line(), "utf-8")),
    b"Q": lambda m: m.persist(m.pop()),
}
"""Each opcode that is read. Extensions (EXT1 to EXT4) and out-of-band buffers are not: nobody writes them here."""

_TABLE: Final[list[_Step | None]] = [_STEPS.get(bytes([code])) for code in range(256)]
