"""Parse the replies of the store's scripts."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.cache_proxy.errors import StoreError


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a step of the sweep did: the number of pairs removed, and whether old generations remain."""

    removed: int
    has_leftovers: bool


@dataclass(frozen=True, slots=True)
class TagInspection:
    """What a tag holds; `samples` are (encoding, pairs, bytes) of some of its buckets."""

    generation: str
    buckets: int
    pairs: int
    leftovers: bool
    garbage: int
    samples: list[tuple[str, int, int]]


def raise_if_error(reply: Any) -> Any:
    """Return a reply, or raise it if it is a `StoreError`."""
    if isinstance(reply, StoreError):
        raise reply
    return reply


def unpack_entries(packed: bytes, *, count: int) -> Sequence[int]:
    """Return the entries in a reply of two bytes for each, the low byte first. Raises `StoreError`."""
    entries = array("H")
    if len(packed) != count * entries.itemsize:
        message = f"the store answered {len(packed)} bytes for {count} look-ups"
        raise StoreError(message)
    entries.frombytes(packed)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def parse_inspection(reply: Any) -> TagInspection:
    """Return the inspection of a tag from the reply of its script."""
    generation, buckets, pairs, leftovers, sampled, garbage = reply
    triples = zip(sampled[::3], sampled[1::3], sampled[2::3], strict=True)
    return TagInspection(
        generation.decode("utf-8", "replace"),
        buckets,
        pairs,
        bool(leftovers),
        garbage,
        [(encoding.decode(), pair_count, size_bytes) for encoding, pair_count, size_bytes in triples],
    )
