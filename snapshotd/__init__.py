"""Fault-tolerant in-memory checkpointing and elastic training. Importing it imports neither torch nor grpc."""

__version__ = "0.1.0"
