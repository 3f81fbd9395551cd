"""Lines of JSON: parsed, rejected and extended as the `json` module would."""

import json
import re
from typing import Any

import pytest
from hypothesis import given

from services.augmenter.domain import PairLevels
from services.augmenter.pipeline import jsonl, line_blocks
from services.augmenter.stats import LineCounts
from services.common.line_reader import LineBlock
from tests.fuzz.corpus import fuzz_for_long, mutate_cases, replay_cases

_LEVEL = 4
_END = re.compile(rb"(?:[ \t\r]|\xef\xbb\xbf)*\Z")
_GOOD = b'{"company":"Acme","title":"Clerk"}'


class _Members(list[tuple[str, Any]]):
    """The members of an object in order, repeated names included."""


class _Number(str):
    """A number as it is written."""

    __slots__ = ()


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _by_json(text: bytes) -> Any:
    """Return the value, with numbers as they are written. Raise ValueError or RecursionError."""
    return json.loads(
        text.decode(),
        object_pairs_hook=_Members,
        parse_constant=_refuse,
        parse_int=_Number,
        parse_float=_Number,
    )


def _pair(text: bytes) -> tuple[str, str] | None:
    """Return the pair of a line, None if it has none."""
    try:
        value = _by_json(text)
    except ValueError:
        return None
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


def _parts(line: bytes) -> list[bytes]:
    """Split a line with several objects, by trying every offset where one may begin."""
    for place in range(1, len(line)):
        if line[place : place + 1] != b"{":
            continue
        before = _END.sub(b"", line[:place])
        if before.endswith(b"}") and jsonl.strip_line(before).startswith(b"{"):
            try:
                json.loads(
                    jsonl.strip_line(before).decode(errors="surrogateescape"), strict=False, parse_int=_Number
                )
            except (ValueError, RecursionError):
                continue
            return [before, *_parts(line[place:])]
    return [line]


def check_line(case: bytes) -> None:
    """Check that a line gives one output line, one rejected line, or none if it is blank.

    The line is checked by itself and after another one. If it has several objects, each counts as a line.
    """
    line = case.replace(b"\n", b" ")
    try:
        wanted = [(part, _pair(text) if text else None) for part, text in _stripped(line)]
    except RecursionError:
        return
    good = [pair for _, pair in wanted if pair is not None]
    bad = [jsonl.strip_line(part) for part, pair in wanted if pair is None and jsonl.strip_line(part)]
    for lines, place in ((line, 0), (_GOOD + b"\n" + line, 1)):
        windows: list[line_blocks.ParsedBlock] = []
        (pairs,) = line_blocks.parse_blocks([LineBlock(lines, place + 1)], parsed_blocks=windows)
        counts = LineCounts(read=place + 1 + sum(one.extra_lines for one in windows))
        output, rejected = line_blocks.apply_levels(windows, PairLevels(bytes([_LEVEL]) * len(pairs)), counts)
        found = output.split(b"\n")[:-1]
        assert counts.is_balanced
        assert [jsonl.strip_line(bytes_) for _, bytes_, _ in rejected] == bad
        assert [(pair.company, pair.title) for pair in pairs][place:] == good
        if len(wanted) == 1:
            assert [bytes_ for _, bytes_, _ in rejected] == ([line] if bad else [])
        for (part, pair), made in zip(
            [one for one in wanted if one[1] is not None], found[place:], strict=True
        ):
            assert pair is not None
            check_splice(jsonl.strip_line(part), made)


def _stripped(line: bytes) -> list[tuple[bytes, bytes]]:
    return [(part, jsonl.strip_line(part)) for part in _parts(line)]


def check_splice(text: bytes, output: bytes) -> None:
    """Check that the output has all members but `seniority`, then the level, and otherwise the same bytes."""
    members = _by_json(text)
    others = [member for member in members if member[0] != "seniority"]
    assert _by_json(output) == [*others, ("seniority", str(_LEVEL))]
    if len(others) == len(members):
        assert output == text[:-1] + b', "seniority": %d}' % _LEVEL


@replay_cases("lines")
def test_committed_lines_are_handled_like_the_json_module(case: bytes) -> None:
    """For every line of the corpus."""
    check_line(case)


@given(mutate_cases("lines"))
def test_mutated_lines_are_handled_like_the_json_module(case: bytes) -> None:
    """For some mutations of the corpus."""
    check_line(case)


@pytest.mark.slow
def test_many_mutated_lines_are_handled_like_the_json_module() -> None:
    """For hundreds of mutations, different ones in every run."""
    fuzz_for_long("lines", check_line)
