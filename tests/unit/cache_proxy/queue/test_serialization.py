"""What goes through Redis and back: every error as it was, and nothing else taken for one."""

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
WORDS = st.tuples(TEXT, TEXT.filter(bool)) | st.just(("", ""))  # without a request there are none
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
def test_an_error_comes_back_as_it_was(error: PairError) -> None:
    """Every field of every kind, through Redis and without."""
    for found in (unpack_error(unpack(pack(pack_error(error)))), unpack_error(pack_error(error))):
        assert type(found) is type(error)
        assert {name: getattr(found, name) for name in error.__dataclass_fields__} == {  # type: ignore[attr-defined]
            name: getattr(error, name)
            for name in error.__dataclass_fields__  # type: ignore[attr-defined]
        }


def test_every_kind_of_error_is_tried() -> None:
    """A new kind of error of a pair needs a line above, and in the codec."""
    assert set(KINDS) == set(PairError.__subclasses__())


@given(JUNK)
def test_what_is_no_error_is_garbage(junk: object) -> None:
    """Whatever somebody put into Redis raises the store's error, which is counted."""
    with pytest.raises(StoreError):
        unpack_error(unpack(pack(junk)))


@pytest.mark.parametrize(
    "packed",
    [
        [b"refused", b"OK", b"m", b"", b""],  # would end the caller's RPC as if it had succeeded
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
def test_an_error_with_a_field_missing_or_of_another_type_is_garbage(packed: object) -> None:
    """No field is made up."""
    with pytest.raises(StoreError):
        unpack_error(packed)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_a_broken_reply(junk: bytes) -> None:
    """Either they can be read or it is the store's error, never another."""
    with contextlib.suppress(StoreError):
        unpack(junk)


def test_a_long_message_is_cut() -> None:
    """A model that answers with a book does not fill Redis with it."""
    packed = pack(
        pack_error(PairRejectedError(grpc.StatusCode.INVALID_ARGUMENT, "x" * 10**6, "", "y" * 10**6))
    )
    assert len(packed) < 2100


def test_text_that_is_no_utf_8_can_be_packed() -> None:
    """Half a surrogate pair in a message stops no script."""
    assert unpack_error(pack_error(InvalidModelResponseError("\ud800!"))).message == "?!"  # type: ignore[attr-defined]


def test_an_unknown_error_is_a_mistake_here() -> None:
    """Only errors of pairs go through Redis."""
    with pytest.raises(TypeError):
        pack_error(PairError())
