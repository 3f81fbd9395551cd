"""Cuts pairs into chunks of a bounded size, so that no script call holds Redis for long."""

from collections.abc import Iterator, Sequence

from services.cache_proxy.domain import Pair

# A script call of this size holds Redis for about 5 ms.
CHUNK_PAIRS = 500

# A pair counts once more for each of these in its text, so that the bytes of a chunk are bounded, too.
_BYTES_PER_EXTRA_WEIGHT = 1024


def pair_weight(size_bytes: int) -> int:
    """Return as how many pairs a pair of this size counts in a chunk."""
    return 1 + size_bytes // _BYTES_PER_EXTRA_WEIGHT


def weighted_chunks(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Yield the pairs in chunks that weigh `CHUNK_PAIRS` at most, or are one pair."""
    start = 0
    weight = 0
    for index, pair in enumerate(pairs):
        added_weight = pair_weight(pair.size_bytes)
        if index > start and weight + added_weight > CHUNK_PAIRS:
            yield pairs[start:index]
            start = index
            weight = 0
        weight += added_weight
    if pairs:
        yield pairs[start:]
