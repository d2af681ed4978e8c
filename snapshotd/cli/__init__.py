"""
The command line: `snapshotd COMMAND ...`; one file per command.

Exit codes are those of snapshotd/errors.py: 0 done, 1 a bug or a broken peer, 2 usage, 3 nobody
answers, 4 access denied, 5 not enough memory, 6 state lost, 7 corrupt data.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from snapshotd import __version__
from snapshotd.errors import SnapshotdError

__all__ = ["main"]

_COMMANDS = {
    "coordinator": "run the coordinator",
    "daemon": "run the daemon of this node",
    "status": "show nodes, jobs, protection and events",
    "restore": "write a job's snapshot into a directory",
    "inspect": "say what a snapshot or slot file is and holds",
    "forget": "forget a job and free its snapshots",
    "convert": "convert a checkpoint of any framework into another format",
    "verify": "check every digest and the coverage of a checkpoint",
    "bench": "measure what snapshotd costs on this machine, beside its floors",
    "diff": "compare two checkpoints tensor by tensor, bit by bit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="snapshotd", description="Fault-tolerant in-memory checkpointing and elastic training."
    )
    parser.add_argument("--version", action="version", version=f"snapshotd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, doc in _COMMANDS.items():
        command = commands.add_parser(name, help=doc, description=doc[0].upper() + doc[1:] + ".")
        if name == chosen:
            # Only the chosen command is imported: `status` must not pay for what the daemon needs.
            module = importlib.import_module(f"snapshotd.cli.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except SnapshotdError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"snapshotd {options.command}: {error}{hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
