"""The per-node daemon: a pure core that owns the life of slots, and the pipelines that do its work."""
