"""Hostile pickles: either plain values, or FormatError; nothing is ever run."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from snapshotd.errors import FormatError
from snapshotd.universal.globals import _ENUMS, GLOBALS
from snapshotd.universal.plain import to_json
from snapshotd.universal.standins import Record, UnsafePickle
from snapshotd.universal.unpickle import unpickle, walk

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


class Attack:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


MARKER = "/proc/self/does-not-exist-and-never-will"
ATTACKS = {
    "os.system": pickle.dumps(Attack(os.system, ("touch " + MARKER,))),
    "posix.system": b"cposix\nsystem\n(S'touch x'\ntR.",
    "eval": pickle.dumps(Attack(eval, ("1/0",))),
    "exec": b"c__builtin__\nexec\n(S'raise SystemExit'\ntR.",
    "nested reduce": pickle.dumps([{"a": (1, Attack(eval, ("1",)))}]),
    "inner reduce": pickle.dumps(Attack(getattr, (Attack(__import__, ("os",)), "system"))),
    "getattr": b"c__builtin__\ngetattr\n(c__builtin__\ndict\nS'get'\ntR.",
    "getattr of a record": b"cbuiltins\ngetattr\n(cargparse\nNamespace\nS'lr'\ntR.",
    "getattr of an object": b"cbuiltins\ngetattr\n(cargparse\nNamespace\n)RS'lr'\ntR.",
    "getattr of a method": b"cbuiltins\ngetattr\n(csignal\nSignals\nS'__class__'\ntR.",
    "getattr of no name": b"cbuiltins\ngetattr\n(csignal\nSignals\nS'a.b'\ntR.",
    "getattr by default": b"cbuiltins\ngetattr\n(csignal\nSignals\nS'x'\nNtR.",
    "getattr of a member": b"cbuiltins\ngetattr\n(csignal\nSIGTERM\nS'value'\ntR.",
    "import": b"c__builtin__\n__import__\n(S'os'\ntR.",
    "inst": b"(S'id'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'id'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0fserialization.os\x93.",
    "torch.load": b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R.",
    "functools.partial": b"cfunctools\npartial\n(tR.",
    "operator.attrgetter": b"coperator\nattrgetter\n(S'x'\ntR.",
    "extension": b"\x80\x02\x82\x01.",
    "numpy load": b"cnumpy\nload\n(S'x'\ntR.",
    "runpy": b"crunpy\n_run_code\n(tR.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_before_anything_runs(name: str) -> None:
    """A downloaded checkpoint would run its author's commands."""
    with pytest.raises(FormatError) as caught:
        unpickle(ATTACKS[name], what="file.pt")
    assert "file.pt" in str(caught.value)


def test_refusal_names_what_was_asked_for() -> None:
    with pytest.raises(UnsafePickle, match=r"posix\.system"):
        unpickle(ATTACKS["os.system"], what="f")


def by_name(module: str, kind: str, member: str) -> bytes:
    """An enum's member as Python 3.11.0 to 3.11.3 save it."""
    return f"cbuiltins\ngetattr\n(c{module}\n{kind}\nV{member}\ntR.".encode()


def test_members_of_enums_may_be_saved_by_their_names() -> None:
    """Debian 12's Python saves them so: each DCP checkpoint has one, and each of Megatron's."""
    for name in _ENUMS:
        module, _, kind = name.rpartition(".")
        found = unpickle(by_name(module, kind, "anything"), what="f")
        assert (name, (), "anything") == (found.name, found.args, found.member)
        assert {"$object": name, "member": "anything"} == to_json(found, "x")
    stage = unpickle(by_name("deepspeed.runtime.zero.config", "ZeroStageEnum", "weights"), what="f")
    assert ((3,), None) == (stage.args, stage.member)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_read_in_every_protocol(protocol: int) -> None:
    names = argparse.Namespace(lr=1.0, steps=range(2, 9, 3), path=PurePosixPath("a/b"))
    found = to_json(unpickle(pickle.dumps(names, protocol), what="f"), "x")
    assert {"$object": "argparse.Namespace", "fields": {"lr": 1.0, "steps": [2, 5, 8], "path": "a/b"}} == found
    with pytest.raises(FormatError, match=r"f: .*a range of 10000000000"):
        unpickle(pickle.dumps(range(10**10), protocol), what="f")


def test_signals_may_be_saved_by_their_own_names() -> None:
    """Python 3.10 and older save them so, and Megatron keeps one among its arguments."""
    expected = unpickle(b"csignal\nSignals\n(K\x0ftR.", what="f")
    for data in (b"csignal\nSIGTERM\n.", by_name("signal", "Signals", "SIGTERM")):
        found = unpickle(data, what="f")
        assert (expected.name, expected.args) == (found.name, found.args)
    changed, other = unpickle(b"csignal\nSIGTERM\n}(S'a'\nK\x01ubcsignal\nSIGTERM\n\x86.", what="f")
    assert ({"a": 1}, {}) == (changed.fields, other.fields)


def test_calling_what_is_no_function_is_refused() -> None:
    with pytest.raises(UnsafePickle, match="calls"):
        unpickle(b"]K\x01\x85R.", what="f")


def test_state_of_plain_objects_cannot_be_set() -> None:
    """BUILD on a list or a class could change what later code does."""
    for data in (b"]}b.", b"ctorch\nSize\n}b.", b"ctorch\nfloat32\n}b."):
        with pytest.raises(FormatError):
            unpickle(data, what="f")


def test_state_never_reaches_python_attributes() -> None:
    record = unpickle(b"cargparse\nNamespace\n)\x81}(S'__class__'\nK\x01S'lr'\nK\x02ub.", what="f")
    assert Record is type(record)
    assert record.fields == {"__class__": 1, "lr": 2}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x09.",
        b"K",
        b".",
        b"(K\x01",
        b"t.",
        b"R.",
        b"h\x07.",
        b"X\xff\xff\xff\xffab.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffab.",
        b"\x96\x00\x00\x00\x00\x00\x01\x00\x00ab.",
        b"T\xff\xff\xff\xffab.",
        b"B\xff\xff\xff\x7fab.",
        b"\x8b\xff\xff\xff\x7f\x01.",
        b"\x8b\x00\x00\x10\x00" + b"\x01" * 0x100000 + b".",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"(" * 5000 + b".",
        b"K\x01K\x02.",
        b"}K\x01a.",
        b"]K\x01K\x02s.",
        b"](K\x01K\x02u.",
        b"(K\x01d.",
        b"\x8f(]\x90.",
        b"}(]K\x01u.",
        b"c__builtin__\nbytearray\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0f\x85R.",
        b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
        b"c__builtin__\nlist\nK\x01\x85R.",
        b"ctorch\nSize\n(J\xff\xff\xff\xfft\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89}tR.",
        b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
        b"X\x01\x00\x00\x00aQ.",
    ],
)
def test_lengths_that_lie_and_broken_streams_end_in_a_format_error(data: bytes) -> None:
    """A broken file would take all the memory, or end the program with a trace that says nothing."""
    with pytest.raises(FormatError):
        unpickle(data, what="f")


def test_memo_index_allocates_nothing() -> None:
    assert unpickle(b"K\x01r\xff\xff\xff\x7f.", what="f") == 1


def test_billion_laughs_are_counted_when_they_are_walked() -> None:
    """A file of 300 bytes would become a JSON of gigabytes."""
    data = b"]q\x00" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(12))
    value = unpickle(b"(" + data + b"t.", what="f")[-1]  # all of them in one tuple: the last has 10**12 leaves
    with pytest.raises(FormatError, match="too deep or too large"):
        list(walk(value, limit=100_000))
    with pytest.raises(FormatError, match="too deep or too large"):
        to_json(_recursive(), "x")


def _recursive() -> Any:
    value = unpickle(b"]q\x00h\x00a.", what="f")
    assert value[0] is value
    return value


def test_flipped_and_cut_pickles_never_raise_anything_else() -> None:
    """A rotten file would end a conversion with an error that nobody understands."""
    dice = random.Random(7)
    good = (FIXTURES / "dcp_fsdp2_w2" / "ckpt" / ".metadata").read_bytes()[:6000] + b"."
    for _ in range(400):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        if dice.random() < 0.5:
            del data[dice.randrange(len(data)) :]
        with contextlib.suppress(FormatError):
            unpickle(bytes(data), what="f")


def test_plain_values_are_what_pickle_gives() -> None:
    """A value that is read as another one changes the run."""
    values = [
        *(None, True, False, 0, -1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**100), 0.1, -0.0, 1e308),
        *("", "ä", "x" * 300, "\ud800", b"", b"a" * 300, (), (1,), (1, 2), (1, 2, 3, 4), [], [[1], {}]),
        {"a": {1: (2,)}},
        *({1, 2}, frozenset({3}), 1 + 2j, bytearray(b"xy"), list(range(3000)), {i: str(i) for i in range(2000)}),
    ]
    for protocol in range(6):
        for value in values:
            assert value == unpickle(pickle.dumps(value, protocol), what="f"), (protocol, value)


def test_closed_list_has_nothing_that_runs() -> None:
    """Somebody adds a convenient name, and the door is open."""
    forbidden = ("os.", "posix.", "sys.", "subprocess", "importlib", "builtins.eval")  # getattr is one of ours
    assert [name for name in GLOBALS if name.startswith(forbidden)] == []
    assert [name for name, found in GLOBALS.items() if type(found).__module__.startswith(("torch", "builtins"))] == []


def test_numpy_arrays_are_numbers_only() -> None:
    np = pytest.importorskip("numpy")
    array = np.arange(6, dtype="<u4").reshape(2, 3)
    for protocol in (2, 4):
        found = unpickle(pickle.dumps(array, protocol), what="f")
        assert array.tolist() == found.value.tolist()
        assert unpickle(pickle.dumps(np.int64(7), protocol), what="f") == 7
    with pytest.raises(FormatError):
        unpickle(pickle.dumps(np.array([object], dtype=object), 2), what="f")

