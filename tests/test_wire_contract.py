"""The committed generated code is that of proto/."""

from __future__ import annotations

from tests.proto_drift import drift


def test_generated_code_is_what_the_contract_says() -> None:
    """A daemon and a client built from different contracts would misread each other."""
    assert [] == drift()
