"""
Pure: which bytes are protected by which parity (geometry), and the arithmetic of it (codecs).

Knows ``layout`` for the size of a digest chunk, and nobody else. Its only touch with the machine is loading the codec's
shared library.
"""

from __future__ import annotations

from snapshotd.erasure.codec import Codec, IsalCodec, ZfecCodec, load_codec
from snapshotd.erasure.geometry import ParityRow, Part, StripeGeometry, decode_plan, recoverable, reencode_plan

__all__ = [
    "Codec",
    "IsalCodec",
    "ParityRow",
    "Part",
    "StripeGeometry",
    "ZfecCodec",
    "decode_plan",
    "load_codec",
    "recoverable",
    "reencode_plan",
]
