"""
Storage for ``torch.distributed.checkpoint``: pass these to ``dcp.load`` and ``dcp.save``, and change nothing else::

    from snapshotd.universal.storage import StorageReader, StorageWriter

    dcp.save(state_dict, storage_writer=StorageWriter(path))   # makes a universal checkpoint, from any number of ranks
    dcp.load(state_dict, storage_reader=StorageReader(path))   # any checkpoint that can be read, onto any layout

This package imports torch; the rest of ``snapshotd.universal`` does not.
"""

from __future__ import annotations

from snapshotd.universal.storage.reader import StorageReader
from snapshotd.universal.storage.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
