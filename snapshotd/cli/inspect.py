"""`snapshotd inspect PATH`: what a checkpoint of any format, a job's directory or a slot file is, and what is in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snapshotd.cli.convert import A_JOB, add_source, place, rules_of
from snapshotd.durable import DurableSnapshot, open_snapshot, scan_durable
from snapshotd.durable.format import MARKER_NAME
from snapshotd.errors import CorruptionError, FormatError, UsageError
from snapshotd.layout import Layout, header_length
from snapshotd.sizes import format_bytes
from snapshotd.universal.describe import describe
from snapshotd.universal.places import Job, Place
from snapshotd.universal.readers import detect
from snapshotd.universal.rules import Rules

TENSORS_SHOWN = 40
_PEEK_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=f"a checkpoint, a job's directory or the durable root, a slot file, or {A_JOB}")
    add_source(parser, "PATH")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare the digests")


def run(options: argparse.Namespace) -> int:
    found = examine(place(options, options.path), options.source_format, rules_of(options), verify=options.verify)
    if options.json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        _show(found)
    return 0 if found.get("complete", True) else CorruptionError.exit_code


def examine(
    path: Place, source_format: str = "auto", rules: Rules | None = None, *, verify: bool = False
) -> dict[str, Any]:
    """
    Describe what lies at `path`; with `verify`, every byte is read.

    Raises UsageError when there is nothing that snapshotd knows, FormatError or CorruptionError for a snapshot or slot
    that is broken. Other checkpoints that are broken are described as such.
    """
    if isinstance(path, Job):
        return describe(path, source_format, rules, verify=verify)
    try:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    except OSError as error:  # too long a name, a loop of links
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if source_format != "auto":
        return describe(path, source_format, rules, verify=verify)
    if path.is_file() and path.name != MARKER_NAME:
        return _slot_file(path) if _is_slot(path) else describe(path, "auto", rules, verify=verify)
    if path.is_file():
        path = path.parent
    if (path / MARKER_NAME).is_file():
        detect(path)  # refuses a folder with another checkpoint in it
        with open_snapshot(path) as snapshot:
            return _snapshot(path, snapshot, verify)
    if any(path.glob("rank-*.safetensors")):
        raise FormatError(
            f"{path} has rank files but no {MARKER_NAME}: it was not finished and is no snapshot; "
            "a daemon removes such leftovers when it persists the next one"
        )
    durables = scan_durable(path) or scan_durable(path.parent, path.name)
    if not durables:
        return describe(path, "auto", rules, verify=verify)
    return {
        "kind": "durable-root",
        "path": str(path),
        "snapshots": [
            {"job": ref.job, "epoch": ref.epoch, "step": ref.step, "world_size": ref.world_size, "path": ref.path}
            for ref in durables
        ],
    }


def _snapshot(path: Path, snapshot: DurableSnapshot, verify: bool) -> dict[str, Any]:
    ref = snapshot.ref
    ranks = [snapshot.rank_file(rank) for rank in range(snapshot.world_size)]
    tensors: dict[str, dict[str, Any]] = {}
    for rank, file in enumerate(ranks):
        _collect(tensors, file.layout, rank)
    result: dict[str, Any] = {
        "kind": "snapshot",
        "path": str(path),
        "complete": True,
        "job": ref.job,
        "epoch": ref.epoch,
        "step": ref.step,
        "world_size": ref.world_size,
        "bytes": sum(file.file_bytes for file in ranks),
        "ranks": [{"rank": rank, "file": file.path.name, "bytes": file.file_bytes} for rank, file in enumerate(ranks)],
        "tensors": sorted(tensors.values(), key=lambda tensor: (tensor["kind"], tensor["name"])),
        "readable_by": ["snapshotd", "safetensors (rank files)"],
    }
    if verify:
        result["verified_bytes"] = snapshot.verify()
    return result


def _is_slot(path: Path) -> bool:
    if path.suffix == ".slot":
        return True
    with path.open("rb") as file:
        return path.suffix == ".safetensors" and b'"snapshotd.boxes"' in file.read(_PEEK_BYTES)


def _slot_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise FormatError(f"{path} has {len(first)} bytes; a slot begins with 8 bytes of header length")
        length = header_length(first)
        layout = Layout.parse(first + file.read(length))
        meta_begin, meta_end = layout.meta
        file.seek(meta_begin)
        meta_text = file.read(meta_end - meta_begin)
    size = path.stat().st_size
    if size != layout.file_bytes:
        raise FormatError(f"{path} has {size} bytes, its layout says {layout.file_bytes}")
    tensors: dict[str, dict[str, Any]] = {}
    _collect(tensors, layout, None)
    result: dict[str, Any] = {
        "kind": "slot",
        "path": str(path),
        "layout": layout.hash,
        "bytes": layout.file_bytes,
        "tensors": sorted(tensors.values(), key=lambda tensor: (tensor["kind"], tensor["name"])),
        "readable_by": ["snapshotd", "safetensors"],
    }
    try:
        result["step"] = json.loads(meta_text)["step"]
    except (ValueError, KeyError, TypeError):
        result["step"] = None
    return result


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is said in lines of their own, before the table."""
    for key in ("kind", "format", "path", "job", "epoch", "step", "world_size", "layout", "complete", "problem"):
        if key in found and (found[key] is not None or key == "step"):
            value = found[key]
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in _flat(value))
            yield key, value
    if "bytes" in found:
        yield "bytes", format_bytes(found["bytes"])
    if found.get("parameters"):
        yield "parameters", f"{found['parameters']:,}"
    if "kinds" in found:
        yield "tensors", ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    if found.get("param_groups"):
        yield "groups", f"{len(found['param_groups'])} of {', '.join(str(g['members']) for g in found['param_groups'])}"
    for key in ("tied", "frozen", "extra", "warnings", "readable_by"):
        if found.get(key):
            yield key.replace("_", " "), _some(list(found[key]))
    if "verified_bytes" in found:
        yield "verified", f"{format_bytes(found['verified_bytes'])}, every digest matches"


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from value.items() if isinstance(value, dict) else [(key, value)]


def _some(items: list[str], limit: int = 8) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def _collect(tensors: dict[str, dict[str, Any]], layout: Layout, rank: int | None) -> None:
    for shard in layout.shards:
        box = shard.tensor
        name = box.name if box.scope == "global" or rank is None else f"{box.name} (rank {rank})"
        entry = tensors.setdefault(
            name,
            {
                "name": name,
                "kind": box.kind,
                "scope": box.scope,
                "dtype": box.dtype,
                "shape": list(box.global_shape),
                "bytes": 0,
                "parts": 0,
            },
        )
        entry["bytes"] += shard.nbytes
        entry["parts"] += 1


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(soft_wrap=True)
    for key, value in _lines(found):
        console.print(f"{key:>11}: {value}", highlight=False, markup=False)
    if "snapshots" in found:
        table = Table("job", "epoch", "step", "world", "path")
        for snapshot in found["snapshots"]:
            table.add_row(
                snapshot["job"], *(str(snapshot[key]) for key in ("epoch", "step", "world_size")), snapshot["path"]
            )
        console.print(table)
    if "tensors" in found:
        table = Table(Column("tensor", overflow="fold"), "kind", "dtype", "shape", "bytes", "parts")
        for tensor in found["tensors"][:TENSORS_SHOWN]:
            table.add_row(
                tensor["name"],
                tensor["kind"],
                tensor["dtype"],
                "x".join(map(str, tensor["shape"])) or "scalar",
                format_bytes(tensor["bytes"]),
                str(tensor["parts"]),
            )
        console.print(table)
        if len(found["tensors"]) > TENSORS_SHOWN:
            console.print(f"... and {len(found['tensors']) - TENSORS_SHOWN} more (--json shows all)", highlight=False)
