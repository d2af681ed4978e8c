"""Generate the wire contract anew and compare it with what is committed: `python -m tests.proto_drift`."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COMMITTED = {"worker_pb2_grpc.py", "bulk_pb2_grpc.py", "record_pb2_grpc.py"}


def drift() -> list[str]:
    """Names of generated files that differ from proto/, or are missing."""
    protos = sorted(str(path) for path in (ROOT / "proto" / "snapshotd" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as made:
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), f"--python_out={made}"]
            + [f"--pyi_out={made}", f"--grpc_python_out={made}", *protos],
            check=True,
        )
        fresh = {path.name: path for path in (Path(made) / "snapshotd" / "v1").iterdir()}
        committed = ROOT / "snapshotd" / "v1"
        wanted = set(fresh) - NOT_COMMITTED
        there = {path.name for path in committed.iterdir() if "_pb2" in path.name and path.suffix in (".py", ".pyi")}
        differing = {name for name in wanted & there if not filecmp.cmp(fresh[name], committed / name, shallow=False)}
    return sorted(differing | (wanted ^ there))


if __name__ == "__main__":
    changed = drift()
    if changed:
        sys.exit(f"generated code is not that of proto/: {', '.join(changed)}; run `make proto`")
