"""
What the hook raises on purpose; nothing of it ever comes out of ``capture``.

* CannotExpress (TypeError)      a value that JSON and tensors cannot hold; the message names its path and the fix
* RestoreError (RuntimeError)    restore() cannot go on, and starting afresh in silence would lose work
* StateLost (SystemExit, 6)      the cluster says that the state is gone for good; the worker's exit code is 6
"""

from __future__ import annotations

__all__ = ["CannotExpress", "RestoreError", "StateLost"]


class CannotExpress(TypeError):
    """A value that neither JSON nor tensors can hold; ``path`` says where it is."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(
            f"{path}: {what} cannot be kept in a snapshot. Leave it out, turn it into tensors, numbers, strings, lists "
            "or dicts, or tell how with snapshotd_client.register_codec(type, encode, decode)"
        )
        self.path = path


class RestoreError(RuntimeError):
    """The state could not be restored; the message says what does not fit and what to do."""


class StateLost(SystemExit):
    """More was lost than the redundancy covers, and nothing durable is left. Exit code 6, as in all of snapshotd."""

    def __init__(self, reason: str) -> None:
        super().__init__(6)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
