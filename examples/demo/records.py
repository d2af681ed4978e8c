"""What a training run leaves behind (see `Record` in examples/train_gpt.py), read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Line", "Loss", "Run", "Start", "Summary", "Tail", "parse_lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The workers began (again) at step `first`."""

    first: int
    world: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Step `step` was done; `bits` is its loss as a hexadecimal float."""

    step: int
    world: int
    bits: str
    time: float

    @property
    def value(self) -> float:
        return float.fromhex(self.bits)


Line: TypeAlias = Start | Loss


def parse_lines(lines: Iterable[str]) -> Iterator[Line]:
    """Raises ValueError for a line that is none."""
    for text in lines:
        line = json.loads(text)
        if "start" in line:
            yield Start(first=int(line["start"]), world=int(line["world"]), time=float(line["time"]))
        else:
            step, world, bits = int(line["step"]), int(line["world"]), str(line["loss"])
            yield Loss(step=step, world=world, bits=bits, time=float(line["time"]))


class Tail:
    """New lines of a file that somebody else appends to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Line]:
        """The whole lines that were not read before; none while there is no file."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(parse_lines(whole.decode().splitlines()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole state at one step: a digest of each tensor, and the JSON values."""

    tensors: dict[str, str]
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Summary:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = {
            name: f"{entry['dtype']} {entry['shape']} {entry['sha256']}" for name, entry in content["tensors"].items()
        }
        return cls(tensors=tensors, values=content["values"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of examples/train_gpt.py. final is None when it did not come to its end."""

    lines: tuple[Line, ...]
    final: Summary | None
    states: dict[int, Summary]

    @classmethod
    def read(cls, directory: Path) -> Run:
        final = directory / "final.json"
        states = {int(path.stem.removeprefix("state-")): Summary.read(path) for path in directory.glob("state-*.json")}
        return cls(
            lines=tuple(Tail(directory / "run.jsonl").read()),
            final=Summary.read(final) if final.exists() else None,
            states=states,
        )

    @property
    def losses(self) -> list[Loss]:
        return [line for line in self.lines if isinstance(line, Loss)]

    @property
    def starts(self) -> list[Start]:
        return [line for line in self.lines if isinstance(line, Start)]
