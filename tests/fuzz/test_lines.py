"""Lines of JSON: asked, rejected and spliced as by the `json` module."""

import json
from typing import Any

import pytest
from hypothesis import given

from services.augmenter import jsonl, window
from services.augmenter.totals import LineCounts
from services.common.lines import Piece
from tests.fuzz.corpus import fuzz_for_long, mutated, replayed

_LEVEL = 4
_GOOD = b'{"company":"Acme","title":"Clerk"}'


class _Members(list[tuple[str, Any]]):
    """An object's, in order, repeated ones too."""


class _Number(str):
    """One as it is spelled."""

    __slots__ = ()


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _by_json(text: bytes) -> Any:
    """The value, its numbers as they are spelled. Raises ValueError and RecursionError."""
    return json.loads(
        text.decode(), object_pairs_hook=_Members, parse_constant=_refuse, parse_int=_Number,
        parse_float=_Number,
    )  # fmt: skip


def _pair(text: bytes) -> tuple[str, str] | None:
    """What a line asks for, if anything."""
    value = _by_json(text)
    if not isinstance(value, _Members):
        return None
    last = dict(value)
    company, title = last.get("company"), last.get("title")
    if type(company) is not str or type(title) is not str:
        return None
    try:
        (company + title).encode()
    except UnicodeEncodeError:
        return None
    return company, title


def check_line(case: bytes) -> None:
    """The line alone, and among others: one output line, one rejected, or none if it is blank."""
    line = case.replace(b"\n", b" ")
    text = jsonl.strip(line)
    try:
        expected = _pair(text) if text else None
    except RecursionError:
        return
    except ValueError:
        expected = None
    for lines, place in ((line, 0), (_GOOD + b"\n" + line, 1)):
        windows: list[window.Window] = []
        (pairs,) = window.parsed([Piece(lines, place + 1)], first=2, into=windows)
        counts = LineCounts()
        output, rejected = window.settled(windows, window.Answers(bytes([_LEVEL]) * len(pairs)), counts)
        found = output.split(b"\n")[:-1]
        assert counts.augmented == place + (expected is not None)
        assert [bytes_ for _, bytes_, _ in rejected] == ([line] if text and expected is None else [])
        if expected is not None:
            assert expected in [(pair.company, pair.title) for pair in pairs]
            check_splice(text, found[place])


def check_splice(text: bytes, output: bytes) -> None:
    """All members but those named `seniority` in their order, then the level; without such, every byte."""
    members = _by_json(text)
    others = [member for member in members if member[0] != "seniority"]
    assert _by_json(output) == [*others, ("seniority", str(_LEVEL))]
    if len(others) == len(members):
        assert output == text[:-1] + b', "seniority": %d}' % _LEVEL


@replayed("lines")
def test_odd_lines(case: bytes) -> None:
    """Every committed line becomes what `json` says of it."""
    check_line(case)


@given(mutated("lines"))
def test_damaged_lines(case: bytes) -> None:
    """So does what hypothesis makes of them."""
    check_line(case)


@pytest.mark.slow
def test_damaged_lines_for_long() -> None:
    """Hundreds of others in every run."""
    fuzz_for_long("lines", check_line)
