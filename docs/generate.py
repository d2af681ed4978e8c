"""Write the parts of the reference that come from the code: `python docs/generate.py [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from snapshotd import errors
from snapshotd.failpoints import SITES
from snapshotd.settings import CoordinatorSettings, DaemonSettings, ToolSettings, table, variable

TARGET = Path(__file__).resolve().parent / "reference" / "settings.md"

COMMANDS = (
    ("snapshotd coordinator", "coordinator", CoordinatorSettings),
    ("snapshotd daemon", "daemon", DaemonSettings),
    ("snapshotd status, restore, forget; convert, inspect, verify, diff of job:NAME", "tools", ToolSettings),
)


def settings_page() -> str:
    """The page on settings, exit codes and failpoints."""
    lines = [
        "# Command line, settings, exit codes",
        "",
        "Made by `python docs/generate.py`; do not edit.",
        "",
        "Every setting has a flag, an environment variable and a TOML key. The flag wins over the variable, the",
        "variable over the file (`--config FILE` or `SNAPSHOTD_CONFIG`), the file over the default. Sizes are bytes,",
        "or `4GiB`, `512MiB`, `64K`.",
    ]
    for title, section, kind in COMMANDS:
        lines += ["", f"## {title}", "", f"TOML table `[{section}]`.", ""]
        lines += ["| flag | variable | key | default | what |", "| --- | --- | --- | --- | --- |"]
        for name, setting in table(kind).items():
            default = setting.default
            if name == "node_id":
                default = "the host's name"
            elif name == "state":
                default = "~/.local/state/snapshotd"
            elif name == "socket":
                default = "$XDG_RUNTIME_DIR/snapshotd/daemon.sock or /tmp/snapshotd-UID/daemon.sock"
            elif name == "arena":
                default = "/dev/shm/snapshotd-UID/NODE"
            flag = "--" + name.replace("_", "-")
            lines.append(f"| `{flag}` | `{variable(kind, name)}` | `{name}` | {default!s} | {setting.doc} |")
    lines += ["", "## Exit codes", "", "| code | reason | when |", "| --- | --- | --- |", "| 0 | | done |"]
    kinds = [getattr(errors, name) for name in errors.__all__]
    for kind in sorted(kinds, key=lambda kind: (kind.exit_code, kind.code)):
        if kind is not errors.SnapshotdError:
            lines.append(f"| {kind.exit_code} | `{kind.code}` | {(kind.__doc__ or '').strip().rstrip('.')} |")
    lines += [
        "",
        "A worker whose job's state is lost, and its torchrun, exit with 6.",
        "",
        "## Failpoints",
        "",
        'For tests: `SNAPSHOTD_FAILPOINTS="name=action@N;..."`. Actions: off, raise, delay(ms), exit(code), kill,',
        "hang, corrupt, touch(path), wait(path). `@N`: at the N-th time only. They cost nothing when off.",
        "",
        "| site | where |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {doc} |" for name, doc in sorted(SITES.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the page is not up to date")
    options = parser.parse_args()
    page = settings_page()
    if options.check:
        if TARGET.read_text(encoding="utf-8") != page:
            print(f"{TARGET} is not up to date; run python docs/generate.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
