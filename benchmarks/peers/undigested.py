"""
`python -m benchmarks.peers.undigested daemon ...`: the daemon, but it hashes nothing; for comparing like with like.

Nobody could trust what it keeps: it is no setting of the daemon's, and must not become one by accident.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from snapshotd.cli import main
from snapshotd.daemon import seal
from snapshotd.layout import DIGEST_BYTES, KnownDigests
from snapshotd.layout.digest import chunk_count


def no_digests(
    view: memoryview, length: int, cancel: threading.Event | None = None, known: Sequence[KnownDigests] = ()
) -> bytes:
    return bytes(DIGEST_BYTES * chunk_count(length))


if __name__ == "__main__":
    assert callable(seal.digests_of)
    seal.digests_of = no_digests
    sys.exit(main(sys.argv[1:]))
