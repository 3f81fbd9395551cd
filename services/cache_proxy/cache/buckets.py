"""Where a pair is kept: the Python twin of `lua/layout.lua`, for whoever must name a key outside a script."""

from dataclasses import dataclass

from services.cache_proxy.cache.entry import pack_entry
from services.cache_proxy.redis_keys import bucket_key
from services.common.levels import LEVEL_COUNT

COLUMNS = 4
TAGS = 64
FIELD_BYTES = slice(1, 12)  # of a digest
MIN_VALUE = -4096


def tag_for_digest(digest: bytes) -> int:
    """The tag that a pair belongs to."""
    return digest[0] // COLUMNS


@dataclass(frozen=True, slots=True)
class TagState:
    """A tag's state, as its key in Redis has it."""

    generation: str
    buckets: int

    def bucket_key(self, base: str, digest: bytes) -> str:
        """The key of the bucket that a pair of this tag is in."""
        column = digest[0] % COLUMNS
        first = (self.buckets + COLUMNS - 1 - column) // COLUMNS
        h = int.from_bytes(digest[1:4], "big") / 2**24
        place = (1 + h * (0.6565 + 0.3435 * h)) * (1 << first.bit_length() - 1)
        number = int(place) if int(place) >= first else int(place * 2)
        tag = tag_for_digest(digest)
        return bucket_key(base, tag, generation=self.generation, number=number * COLUMNS + column)


def entry_from_value(value: bytes | None, *, today: int) -> int | None:
    """The entry of a field's value; 0 for none, None for garbage."""
    if value is None:
        return 0
    digits = value.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > len("999999"):
        return None
    day, level = divmod(int(value) - MIN_VALUE, LEVEL_COUNT)
    return pack_entry(level + 1, day) if 0 <= day <= today + 1 else None
