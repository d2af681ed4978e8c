"""
One part, in a process of its own: `python -m benchmarks.worker PART FOLDERS DIRECTORY SCALE SHORT PACE FD`.

Writes each row as a line of JSON to the file descriptor FD as soon as it is there. FOLDERS: where parts lie.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from . import parts
from .processes import die_with_parent
from .run import Run


def main(part: str, folders: str, directory: str, scale: str, short: str, pace: str, descriptor: str) -> None:
    die_with_parent()
    parts.__path__[:] = folders.split(os.pathsep)
    module = importlib.import_module(f".parts.{part}", __package__)
    whole = Run(Path(directory), scale=float(scale), short=short == "1", pace=float(pace))
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as out, whole as run:
        for row in module.rows(run):
            out.write(json.dumps(row.judged(part, short=run.short).as_json()) + "\n")
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
