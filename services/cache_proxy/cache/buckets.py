"""Compute the Redis key and value of a stored pair, as `lua/include/buckets.lua` does inside scripts."""

from dataclasses import dataclass

from services.cache_proxy.cache.entry import pack_entry
from services.cache_proxy.redis_keys import bucket_key
from services.common.levels import LEVEL_COUNT

COLUMNS = 4
TAGS = 64
# The bytes of a digest that are the field of a pair in its bucket.
FIELD_BYTES = slice(1, 12)
MIN_VALUE = -4096


def tag_for_digest(digest: bytes) -> int:
    """Return the tag to which a pair belongs."""
    return digest[0] // COLUMNS


@dataclass(frozen=True, slots=True)
class TagState:
    """The state of a tag, as stored under its key: the name of the generation and the number of buckets."""

    generation: str
    buckets: int

    def bucket_key(self, base: str, digest: bytes) -> str:
        """Return the key of the bucket that holds a pair of this tag.

        The comments in `lua/include/buckets.lua` explain the numbering of buckets (spiral storage).
        """
        column = digest[0] % COLUMNS
        first = (self.buckets + COLUMNS - 1 - column) // COLUMNS
        h = int.from_bytes(digest[1:4], "big") / 2**24
        position = (1 + h * (0.6565 + 0.3435 * h)) * (1 << first.bit_length() - 1)
        number = int(position) if int(position) >= first else int(position * 2)
        tag = tag_for_digest(digest)
        return bucket_key(base, tag, generation=self.generation, number=number * COLUMNS + column)


def entry_from_value(value: bytes | None, *, today: int) -> int | None:
    """Return the entry that the value of a field holds; 0 if there is no value, None if it is garbage."""
    if value is None:
        return 0
    digits = value.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > len("999999"):
        return None
    day, level = divmod(int(value) - MIN_VALUE, LEVEL_COUNT)
    return pack_entry(level + 1, day) if 0 <= day <= today + 1 else None
