"""What goes through Redis and back: every error as it was, and nothing else taken for one."""

import contextlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.errors import Nonsense, PairError, Refused, StoreError, Unavailable
from services.cache_proxy.queue.messages import pack, pack_error, unpack, unpack_error

TEXT = st.text(max_size=50).filter(lambda text: text.isprintable())
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
ERRORS = st.one_of(
    st.builds(Refused, st.sampled_from(CODES), TEXT, st.sampled_from(["", ".title"]), TEXT),
    st.builds(Nonsense, TEXT),
    st.builds(Unavailable, TEXT, st.floats(0, 1e6)),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.binary(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(ERRORS)
def test_an_error_comes_back_as_it_was(error: PairError) -> None:
    """Every field of every kind."""
    found = unpack_error(unpack(pack(pack_error(error))))
    assert type(found) is type(error)
    assert {name: getattr(found, name) for name in error.__dataclass_fields__} == {  # type: ignore[attr-defined]
        name: getattr(error, name)
        for name in error.__dataclass_fields__  # type: ignore[attr-defined]
    }


@given(JUNK)
def test_what_is_no_error_becomes_one_that_may_be_retried(junk: object) -> None:
    """Whatever somebody put into Redis: an error of a pair, and never one with the status OK."""
    found = unpack_error(unpack(pack(junk)))
    assert isinstance(found, PairError)


def test_ok_is_not_a_reason_to_refuse() -> None:
    """A refusal with the code OK would end the caller's RPC as if it had succeeded."""
    assert isinstance(unpack_error([b"refused", b"OK", b"m", b"", b""]), Unavailable)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_a_broken_reply(junk: bytes) -> None:
    """Either they can be read or it is the store's error, never another."""
    with contextlib.suppress(StoreError):
        unpack(junk)


def test_a_long_message_is_cut() -> None:
    """A model that answers with a book does not fill Redis with it."""
    packed = pack(pack_error(Refused(grpc.StatusCode.INVALID_ARGUMENT, "x" * 10**6, "", "y" * 10**6)))
    assert len(packed) < 2100


def test_an_unknown_error_is_a_mistake_here() -> None:
    """Only errors of pairs go through Redis."""
    with pytest.raises(TypeError):
        pack_error(PairError())
