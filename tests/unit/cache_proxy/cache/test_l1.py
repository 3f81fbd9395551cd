"""L1: what it stores, for how long, and what drops its answers."""

from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.cache.entry import NO_EXPIRY
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.wire.batches import level_suffix

_MIB = 2**20


def _key(number: int) -> bytes:
    return b"\x12\x04%04d" % number


def _digest(number: int) -> bytes:
    return number.to_bytes(2, "little") * 8


def _level(cache: L1Cache, number: int) -> int:
    """Return the level that a look-up finds, 0 for a miss."""
    cell = cache.get_protected(_key(number), None) or cache.promote(_key(number))
    assert not cell or cell == level_suffix(cell[1])
    return cell[1] if cell else 0


def _put(
    cache: L1Cache, number: int, level: int = 4, *, epoch: int | None = None, day: int = NO_EXPIRY
) -> None:
    cache.put(
        _key(number),
        level,
        digest=_digest(number),
        epoch=cache.epoch if epoch is None else epoch,
        expiry_day=day,
    )


def test_cell_holds_the_bytes_of_the_last_level() -> None:
    """A look-up returns the bytes that follow the uuid in an answer, for the last level stored."""
    cache = L1Cache(max_bytes=_MIB)
    for level in (*range(1, 8), *range(7, 0, -1)):
        _put(cache, level, level)
        assert _level(cache, level) == level
    _put(cache, 1, 7)
    assert (_level(cache, 1), cache.entries) == (7, 7)


def test_removed_digest_is_dropped_in_all_spellings() -> None:
    """`remove` drops every key that was stored for the digest; a later put is stored."""
    cache = L1Cache(max_bytes=_MIB)
    for spelling in range(5):
        cache.put(_key(spelling), 3, digest=_digest(1), epoch=cache.epoch)
    _put(cache, 7)
    cache.remove(_digest(1))
    assert [_level(cache, spelling) for spelling in range(5)] == [0] * 5
    assert _level(cache, 7) == 4
    cache.put(_key(0), 3, digest=_digest(1), epoch=cache.epoch)
    assert [_level(cache, spelling) for spelling in range(2)] == [3, 0]


def test_removal_drops_few_other_entries() -> None:
    """About a 32nd of the cache is dropped along with a digest."""
    cache = L1Cache(max_bytes=_MIB)
    for number in range(1000):
        _put(cache, number)
    cache.remove(_digest(500))
    assert _level(cache, 500) == 0
    assert sum(_level(cache, number) > 0 for number in range(1000)) > 950


def test_put_with_epoch_before_an_invalidation_is_dropped() -> None:
    """A put carries the epoch of its look-up: after a `remove` or a `clear` it stores nothing."""
    cache = L1Cache(max_bytes=_MIB)
    for everything in (False, True):
        epoch = cache.epoch
        if everything:
            cache.clear()
        else:
            cache.remove(_digest(1))
        _put(cache, 1, epoch=epoch)
        assert _level(cache, 1) == 0
        _put(cache, 1)
        assert _level(cache, 1) == 4


def test_clear_drops_everything() -> None:
    """No entry is left in either segment, and none is counted."""
    cache = L1Cache(max_bytes=_MIB)
    for number in range(10):
        _put(cache, number)
    _level(cache, 3)
    cache.clear()
    assert (cache.entries, cache.size_bytes) == (0, 0)
    assert [_level(cache, number) for number in range(10)] == [0] * 10


def test_day_going_backwards_drops_answers_that_expire() -> None:
    """The clock was ahead when the answers were stored: they would be kept for too long."""
    cache = L1Cache(max_bytes=2**20)
    cache.expire(100)
    _put(cache, 1, day=130)
    _put(cache, 2)
    cache.expire(60)
    assert (_level(cache, 1), _level(cache, 2)) == (0, 4)
    _put(cache, 1, day=90)
    assert _level(cache, 1) == 4


def test_answer_is_kept_until_its_day_of_expiry() -> None:
    """From its day of expiry on, an entry is a miss; other entries of its bucket stay."""
    cache = L1Cache(max_bytes=_MIB)
    # All three are in one bucket.
    for number, day in ((1, 100), (33, 101), (65, NO_EXPIRY)):
        _put(cache, number, day=day)
    cache.expire(99)
    assert [_level(cache, number) for number in (1, 33, 65)] == [4, 4, 4]
    cache.expire(100)
    assert [_level(cache, number) for number in (1, 33, 65)] == [0, 4, 4]
    cache.expire(1000)
    assert [_level(cache, number) for number in (1, 33, 65)] == [0, 0, 4]


def test_expired_answer_is_not_stored() -> None:
    """An answer from L2 that is too old, or whose last day has just ended, is not stored."""
    cache = L1Cache(max_bytes=_MIB)
    cache.expire(100)
    _put(cache, 1, day=100)
    assert _level(cache, 1) == 0
    _put(cache, 1, day=101)
    assert _level(cache, 1) == 4


_STEPS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 40), st.integers(1, 7), st.integers(0, 5)),
    st.tuples(st.just("get"), st.integers(0, 40), st.just(0), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 40), st.just(0), st.just(0)),
    st.tuples(st.just("expire"), st.just(0), st.just(0), st.integers(0, 5)),
)


@given(st.lists(_STEPS, max_size=120))
def test_look_up_never_returns_removed_or_expired_answer(steps: list[tuple[str, int, int, int]]) -> None:
    """In any order of operations: the last level stored, unless removed or expired, or a miss."""
    cache = L1Cache(max_bytes=4000)
    known: dict[int, tuple[int, int]] = {}
    today = 0
    for step, number, level, day in steps:
        if step == "put":
            _put(cache, number, level, day=day)
            if day > today:
                known[number] = level, day
        elif step == "remove":
            cache.remove(_digest(number))
            known.pop(number, None)
        elif step == "expire":
            today = max(today, day)
            cache.expire(today)
        else:
            last_level, expiry_day = known.get(number, (0, 0))
            assert _level(cache, number) in {0, last_level if expiry_day > today else 0}


def test_each_level_and_bucket_of_digests_has_a_separate_cell() -> None:
    """No entry has the level of another one, and `remove` drops only the bucket of its digest."""
    cache = L1Cache(max_bytes=4 * _MIB)
    numbers = [(first, level) for first in range(256) for level in range(1, 8)]
    for number, (first, level) in enumerate(numbers):
        cache.put(_key(number), level, digest=bytes([first]) * 16, epoch=cache.epoch)
    assert [_level(cache, number) for number in range(len(numbers))] == [level for _, level in numbers]
    cache.remove(bytes([255]) * 16)
    remaining = [level if first % 32 != 255 % 32 else 0 for first, level in numbers]
    assert [_level(cache, number) for number in range(len(numbers))] == remaining


def test_cache_with_zero_bytes_is_disabled() -> None:
    """With `--l1-max-bytes 0`, nothing is stored."""
    assert not L1Cache(max_bytes=0).enabled
    assert L1Cache(max_bytes=1).enabled


def test_size_includes_cells_of_each_day() -> None:
    """Cells take memory for each day of expiry in use."""
    cache = L1Cache(max_bytes=_MIB)
    sizes = [cache.size_bytes]
    for day in (10, 20):
        _put(cache, 1, day=day)
        sizes.append(cache.size_bytes)
    assert sizes[0] == 0
    assert sizes[0] < sizes[1] < sizes[2]
