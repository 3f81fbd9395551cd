"""Paths to company and title, and what cannot be one."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import UsageError
from services.common.posting_fields import DEFAULT_FIELDS, PostingFields, text_at


def _fields(company: str = "company", title: str = "title", level: str = "seniority") -> PostingFields:
    return PostingFields.parse(company=company, title=title, level=level)


def test_dotted_path_is_parsed() -> None:
    """A path is one name or several; the standard names are the default."""
    assert _fields() == DEFAULT_FIELDS
    assert _fields("content.company", "content.role.name", "niveau") == PostingFields(
        ("content", "company"), ("content", "role", "name"), "niveau"
    )


@pytest.mark.parametrize(
    ("company", "title", "level", "named"),
    [
        ("", "title", "seniority", "--company-field ''"),
        ("a..b", "title", "seniority", "--company-field 'a..b'"),
        ("company", ".title", "seniority", "--title-field '.title'"),
        ("company", 'ti"tle', "seniority", "--title-field"),
        ("company", "ti\\tle", "seniority", "--title-field"),
        ("company", "title", "a\nb", "--level-field"),
        ("company", "title", "", "--level-field ''"),
        ("company", "title", "a.b", "--level-field 'a.b': the level is a member of the posting itself"),
        ("company", "title", "title", "--level-field 'title' would replace"),
        ("content.company", "title", "content", "--level-field 'content' would replace"),
        ("content", "content.title", "seniority", "one is inside the other"),
        ("a.b.c", "a.b", "seniority", "one is inside the other"),
        ("comp\udcff", "title", "seniority", "--company-field"),
    ],
)
def test_contradictory_fields_are_rejected(company: str, title: str, level: str, named: str) -> None:
    """One line names the flag, its value and what is wrong."""
    with pytest.raises(UsageError) as refused:
        _fields(company, title, level)
    assert named in str(refused.value)


_NAMES = st.sampled_from(["a", "b", "é", "seniority"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(".".join)
_VALUES = st.recursive(
    st.none() | st.text(max_size=3) | st.integers(),
    lambda inner: st.dictionaries(_NAMES, inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=12,
)


def _at(value: Any, path: str) -> Any:
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return value


@given(st.dictionaries(_NAMES, _VALUES, max_size=4), _PATHS, _PATHS)
def test_both_readers_find_values_at_paths(posting: dict[str, Any], company: str, title: str) -> None:
    """The fast reader takes only what `json` finds there, and finds the same."""
    try:
        fields = _fields(company, title, "level")
    except UsageError:
        return
    expected = (_at(posting, company), _at(posting, title))
    if not all(isinstance(text, str) for text in expected):
        with pytest.raises(ValueError, match=r"is missing|is not"):
            fields.read_pair(posting)
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(
                json.dumps(posting), type=fields.make_struct("P", msgspec.UnsetType, msgspec.UNSET)
            )
        return
    assert fields.read_pair(posting) == expected
    found = msgspec.json.decode(
        json.dumps(posting), type=fields.make_struct("P", msgspec.UnsetType, msgspec.UNSET)
    )
    assert fields.pair_getter(found) == expected


@pytest.mark.parametrize(
    ("posting", "message"),
    [
        ({}, "a is missing"),
        ({"a": {}}, "a.b is missing"),
        ({"a": 1}, "a is not an object"),
        ({"a": {"b": 1}}, "a.b is not an object"),
        ({"a": {"b": {"c": None}}}, "a.b.c is not a string"),
    ],
)
def test_reason_names_the_path(posting: Any, message: str) -> None:
    """As far as it leads."""
    with pytest.raises(ValueError, match=message):
        text_at(posting, ("a", "b", "c"))
