"""Tests of inserting a level: everything but `seniority` stays byte for byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.pipeline.splice import splice_level

_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_TEXT | st.sampled_from(["seniority", "company"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_KEYS = st.one_of(
    st.just('"seniority"'),
    st.just('"\\u0073eniorit\\u0079"'),
    st.just('"Seniority"'),
    _TEXT.map(json.dumps),
    _TEXT.map(lambda text: json.dumps(text, ensure_ascii=False)),
)
_SPACE = st.text(" \t", max_size=2)


@st.composite
def _objects(draw: st.DrawFn) -> bytes:
    """Draw objects as text, with any white space, repeated and escaped members, `company` among them."""
    members = draw(st.lists(st.tuples(_KEYS, _VALUES), max_size=6))
    members.insert(draw(st.integers(0, len(members))), ('"company"', draw(_VALUES)))
    ascii_only = draw(st.booleans())
    written = (
        f"{draw(_SPACE)}{key}{draw(_SPACE)}:{draw(_SPACE)}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{draw(_SPACE)}"
        for key, value in members
    )
    return ("{" + ",".join(written) + "}").encode()


def _members(text: bytes) -> list[tuple[str, Any]]:
    members: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
    return members


@given(_objects(), st.integers(1, 7))
def test_result_is_the_object_with_one_seniority_at_its_end(text: bytes, level: int) -> None:
    """The result has the other members of the object in order, repeated ones too, and then the level."""
    others = [member for member in _members(text) if member[0] != "seniority"]
    assert _members(splice_level(text, level, replace=True)) == [*others, ("seniority", level)]


@given(_objects(), st.integers(1, 7), st.integers(1, 7))
def test_splicing_again_only_replaces_the_level(text: bytes, first: int, second: int) -> None:
    """A result that is spliced again equals the input spliced with the second level alone."""
    once = splice_level(text, first, replace=True).rstrip(b"\n")
    assert splice_level(once, second, replace=True) == splice_level(text, second, replace=True)


@given(_objects(), st.integers(1, 7))
def test_without_a_seniority_every_byte_is_kept(text: bytes, level: int) -> None:
    """In an object without a level, every byte is kept, and the level stands before the closing brace."""
    if any(name == "seniority" for name, _ in _members(text)):
        return
    expected = text[:-1] + b', "seniority": %d}\n' % level
    assert splice_level(text, level, replace=True) == splice_level(text, level, replace=False) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"seniority":9,"a":1}', b'{"a":1, "seniority": 4}\n'),
        (b'{ "seniority" : [1, {"b": "}"}] , "a" : 1 }', b'{  "a" : 1 , "seniority": 4}\n'),
        (b'{"a":1,"seniority":null}', b'{"a":1, "seniority": 4}\n'),
        (b'{"a":1 , "seniority":"x\\"" , "b":2}', b'{"a":1  , "b":2, "seniority": 4}\n'),
        (b'{"seniority":1,"seniority":2,"a":1,"seniority":3}', b'{"a":1, "seniority": 4}\n'),
        (b'{"a":1,"\\u0073eniority":2,"b":3}', b'{"a":1,"b":3, "seniority": 4}\n'),
        (
            b'{"a":{"seniority":1},"b":["seniority"]}',
            b'{"a":{"seniority":1},"b":["seniority"], "seniority": 4}\n',
        ),
        (b'{"a":1 , "seniority" : 2}', b'{"a":1 , "seniority": 4}\n'),
        (b'{"a":1,"seniority":2 }', b'{"a":1 , "seniority": 4}\n'),
        (b'{"a":"seniority","seniority":"seniority"}', b'{"a":"seniority", "seniority": 4}\n'),
        (b'{"seniority":1,"a":1,"seniority":2}', b'{"a":1, "seniority": 4}\n'),
        (b'{"seniority":1,"a":{"seniority":2}}', b'{"a":{"seniority":2}, "seniority": 4}\n'),
        (b'{"\\u0073eniority":1,"a":1,"seniority":2}', b'{"a":1, "seniority": 4}\n'),
        (b'{"a":"\\"seniority\\": 1","seniority":2}', b'{"a":"\\"seniority\\": 1", "seniority": 4}\n'),
    ],
)
def test_existing_seniority_is_removed_with_one_comma(text: bytes, expected: bytes) -> None:
    """A level at any position in the object is removed with one comma. Nested members are kept."""
    assert splice_level(text, 4, replace=True) == expected


def test_deep_nesting_is_skipped_without_recursion() -> None:
    """A value nested 100,000 levels deep does not exhaust the stack."""
    deep = b"[" * 100_000 + b"]" * 100_000
    assert (
        splice_level(b'{"a":' + deep + b',"seniority":1}', 2, replace=True)
        == b'{"a":' + deep + b', "seniority": 2}\n'
    )
