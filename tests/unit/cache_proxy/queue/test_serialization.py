"""Tests of the serialization of errors, and of values that are none."""

import contextlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairError,
    PairRejectedError,
    StoreError,
)
from services.cache_proxy.queue.serialization import pack, pack_error, unpack, unpack_error

TEXT = st.text(max_size=50).filter(lambda text: text.isprintable())
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
# There is no message without the request that may read it.
WORDS = st.tuples(TEXT, TEXT.filter(bool)) | st.just(("", ""))
KINDS: dict[type[PairError], st.SearchStrategy[PairError]] = {
    PairRejectedError: st.builds(
        lambda code, message, field, reason, words: PairRejectedError(code, message, field, reason, *words),
        st.sampled_from(CODES),
        TEXT,
        st.sampled_from(["", ".title"]),
        TEXT,
        WORDS,
    ),
    InvalidModelResponseError: st.builds(InvalidModelResponseError, TEXT),
    ModelUnavailableError: st.builds(
        lambda message, seconds, words: ModelUnavailableError(message, seconds, *words),
        TEXT,
        st.floats(0, 3600),
        WORDS,
    ),
}
ERRORS = st.one_of(*KINDS.values())
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.binary(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(ERRORS)
def test_error_round_trip_keeps_all_fields(error: PairError) -> None:
    """Every kind of error, as msgpack and as a list."""
    for found in (unpack_error(unpack(pack(pack_error(error)))), unpack_error(pack_error(error))):
        assert type(found) is type(error)
        assert {name: getattr(found, name) for name in error.__dataclass_fields__} == {  # type: ignore[attr-defined]
            name: getattr(error, name)
            for name in error.__dataclass_fields__  # type: ignore[attr-defined]
        }


def test_all_pair_errors_are_covered() -> None:
    """A new kind of pair error needs a strategy above, and code in the module."""
    assert set(KINDS) == set(PairError.__subclasses__())


@given(JUNK)
def test_value_that_is_no_error_raises_store_error(junk: object) -> None:
    """Callers count these."""
    with pytest.raises(StoreError):
        unpack_error(unpack(pack(junk)))


@pytest.mark.parametrize(
    "packed",
    [
        # This one would end the caller's RPC as if it had succeeded.
        [b"refused", b"OK", b"m", b"", b""],
        [b"refused", b"INVALID_ARGUMENT", b"m", b""],
        [b"refused", b"INVALID_ARGUMENT", b"m", b"", b"", b"words"],
        [b"unavailable", b"m"],
        [b"unavailable", b"m", b"1"],
        [b"unavailable", b"m", float("nan")],
        [b"unavailable", b"m", -1.0],
        [b"unavailable", b"m", 1.0, b"words", b"request", b"more"],
        [b"nonsense", 7],
        [b"nonsense", b"\xff"],
    ],
)
def test_error_with_missing_or_invalid_field_raises_store_error(packed: object) -> None:
    """No field gets a default."""
    with pytest.raises(StoreError):
        unpack_error(packed)


@given(st.binary(max_size=60))
def test_invalid_msgpack_raises_store_error_only(junk: bytes) -> None:
    """Random bytes are either valid or raise no other error."""
    with contextlib.suppress(StoreError):
        unpack(junk)


def test_long_message_is_truncated() -> None:
    """A model's long error message does not fill Redis."""
    packed = pack(
        pack_error(PairRejectedError(grpc.StatusCode.INVALID_ARGUMENT, "x" * 10**6, "", "y" * 10**6))
    )
    assert len(packed) < 2100


def test_lone_surrogate_is_replaced() -> None:
    """Text that has no UTF-8 form stops no script."""
    assert unpack_error(pack_error(InvalidModelResponseError("\ud800!"))).message == "?!"  # type: ignore[attr-defined]


def test_unknown_error_class_raises_type_error() -> None:
    """Only errors of known classes pass through Redis."""
    with pytest.raises(TypeError):
        pack_error(PairError())
