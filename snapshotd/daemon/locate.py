"""Where the boxes that a worker wants are on peers, in words that it can act on without its daemon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from snapshotd.daemon.sources import PeerSource, Source
from snapshotd.reshard import Copy
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["located"]


def located(
    by_target: Mapping[int, Sequence[Copy]], num_wants: int, sources: Sequence[Source]
) -> worker.RestoreSources:
    """
    Return the copies that fill wants 0 to ``num_wants`` - 1, by peer. A want that needs another source than peers that
    are read in plain TCP is one of ``others``, whole.
    """
    by_source: defaultdict[int, list[Copy]] = defaultdict(list)
    others: list[int] = []
    for want in range(num_wants):
        copies = by_target.get(want, ())
        if copies and all(_is_plain_peer(sources[copy.source]) for copy in copies):
            for copy in copies:
                by_source[copy.source].append(copy)
        else:
            others.append(want)
    peers = [_peer(sources[number], copies) for number, copies in sorted(by_source.items())]
    return worker.RestoreSources(peers=peers, others=others)


def _is_plain_peer(source: Source) -> bool:
    return isinstance(source, PeerSource) and source.is_plain and bool(source.root)


def _peer(source: Source, copies: Sequence[Copy]) -> worker.RestoreSources.Peer:
    assert isinstance(source, PeerSource)
    return worker.RestoreSources.Peer(
        node_id=source.node_id,
        address=source.address,
        object=source.key,
        file_bytes=source.file_bytes,
        root_digest=source.root,
        copies=[
            worker.RestoreSources.Copy(
                want=copy.target,
                src_begin=copy.src_begin,
                dst_begin=copy.dst_begin,
                run_bytes=copy.run_bytes,
                repeats=[
                    worker.RestoreSources.Copy.Repeat(count=count, src_stride=there, dst_stride=here)
                    for count, there, here in copy.dims
                ],
            )
            for copy in copies
        ],
    )
