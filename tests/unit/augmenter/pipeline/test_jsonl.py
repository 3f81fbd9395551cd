"""Tests of parsing a line: every unusual line, and its result."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.augmenter.domain import Pair
from services.augmenter.pipeline import jsonl, line_blocks
from services.augmenter.pipeline.jsonl import Posting, RejectedLine
from services.augmenter.pipeline.splice import splice_level
from services.common.line_reader import LineBlock

_GOOD = b'"company":"Acme","title":"Clerk"'


def _parse_lines(*texts: bytes) -> list[jsonl.ParsedLine]:
    """Return the parsed lines of a block, whichever parser reads it."""
    blocks: list[line_blocks.ParsedBlock] = []
    (pairs,) = line_blocks.parse_blocks([LineBlock(b"\n".join(texts), len(texts))], parsed_blocks=blocks)
    (block,) = blocks
    if isinstance(block, line_blocks.MixedBlock):
        return jsonl.parse([jsonl.strip_line(text) for text in texts])
    return [Posting(pair) for pair in pairs]


def _parse_line(text: bytes) -> jsonl.ParsedLine:
    """Return a parsed line, and check that the lines beside it make no difference."""
    good = b"{" + _GOOD + b"}"
    alone = _parse_lines(text)[0]
    among = _parse_lines(good, text, b"not JSON")[1]
    if isinstance(alone, Posting):
        assert isinstance(among, Posting)
        assert among.pair == alone.pair
    else:
        assert among == alone
    return alone


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"nonsense", "not JSON: Expecting value (character 1)"),
        (b"{" + _GOOD, "not JSON"),
        (b"{" + _GOOD + b"} x", "not JSON: Extra data"),
        (b"{" + _GOOD + b',"x":NaN}', "not JSON: NaN is not a JSON value"),
        (b"{" + _GOOD + b',"x":-Infinity}', "not JSON: -Infinity is not a JSON value"),
        (b"{" + _GOOD + b',"x":"\x01"}', "not JSON: Invalid control character"),
        (b"{" + _GOOD + b',"x":01}', "not JSON"),
        (b"{" + _GOOD + b",}", "not JSON"),
        (b"{'company':'a','title':'b'}", "not JSON"),
        (b"{" + _GOOD + b"}\x0c", "not JSON"),
        (b'["company","title"]', "not a JSON object"),
        (b'"company"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"{}", "company is missing"),
        (b'{"title":"b"}', "company is missing"),
        (b'{"company":"a"}', "title is missing"),
        (b'{"x":{"company":"a","title":"b"}}', "company is missing"),
        (b'{"company":null,"title":"b"}', "company is not a string"),
        (b'{"company":"a","title":7}', "title is not a string"),
        (b'{"company":["a"],"title":"b"}', "company is not a string"),
        (b"{" + _GOOD + b',"company":null}', "company is not a string"),
        (b"{" + _GOOD + b',"\\u0074itle":1}', "title is not a string"),
        (b'{"company":"\\ud800","title":"b"}', "company holds a lone surrogate"),
        (b'{"company":"a","title":"x\\udfff"}', "title holds a lone surrogate"),
        (b'{"company":"\xff","title":"b"}', "not valid UTF-8 (byte 13)"),
        (b"{" + _GOOD + b',"x":"\xc3"}', "not valid UTF-8"),
        (b"{" + _GOOD + b',"\xed\xa0\x80":1}', "not valid UTF-8"),
        (b"{" + _GOOD + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_bad_line_is_rejected_with_its_reason(text: bytes, reason: str) -> None:
    """A line that cannot be augmented is rejected, with the reason."""
    entry = _parse_line(text)
    assert isinstance(entry, RejectedLine)
    assert reason in entry.reason


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (b'{"company":"","title":""}', ("", "")),
        (b"{" + _GOOD + b',"x":"\\ud800"}', ("Acme", "Clerk")),
        (b"{" + _GOOD + b',"\\udc00":1}', ("Acme", "Clerk")),
        (b"{" + _GOOD + b',"x":' + b"9" * 5000 + b',"y":"\\ud800"}', ("Acme", "Clerk")),
        (b'{"company":null,"company":"last","title":"b"}', ("last", "b")),
        (b'{"company":"first","title":"b","\\u0063ompany":"last"}', ("last", "b")),
        (b'{"company":"\\ud83d\\ude00","title":"\\u0000"}', ("\U0001f600", "\0")),
        ('{"company":"株式会社","title":"Ingénieur"}'.encode(), ("株式会社", "Ingénieur")),
        (b"{" + _GOOD + b',"x":{"company":1,"title":null,"seniority":3}}', ("Acme", "Clerk")),
        (b"{" + _GOOD + b',"x":1e999,"y":-0}', ("Acme", "Clerk")),
        (b"{" + _GOOD + b',"x":"' + b"y" * 2**20 + b'"}', ("Acme", "Clerk")),
    ],
)
def test_unusual_valid_line_is_parsed_and_keeps_its_bytes(text: bytes, pair: tuple[str, str]) -> None:
    """An unusual but valid line gives the pair that JSON parsers read, and its bytes are kept."""
    entry = _parse_line(text)
    assert isinstance(entry, Posting)
    assert entry.pair == Pair(*pair)
    assert splice_level(text, 5, replace=entry.has_level) == text[:-1] + b', "seniority": 5}\n'


@pytest.mark.parametrize("extra", [b"", b',"x":"\\ud800"'])
def test_existing_seniority_is_replaced(extra: bytes) -> None:
    """A line's own `seniority` is found and replaced, whichever parser read the line."""
    text = b'{"\\u0073eniority":"high",' + _GOOD + extra + b"}"
    entry = _parse_line(text)
    assert isinstance(entry, Posting)
    assert splice_level(text, 5, replace=entry.has_level) == b"{" + _GOOD + extra + b', "seniority": 5}\n'


def test_blank_line_is_no_posting() -> None:
    """A line that is empty once stripped is blank: neither sent nor rejected."""
    assert _parse_line(b"") is None


@given(st.binary(max_size=12), st.integers(0, 40), st.integers(0, 12))
@example(b"\xef\xbb\xbf", 0, 0)
def test_accepted_line_is_valid_for_a_strict_parser(noise: bytes, start: int, length: int) -> None:
    """Whatever bytes damage a line, if it is accepted, `json` reads the same pair in it."""
    good = b'{"company":"Acme","title":"Clerk","x":[1,2e3,true,null,"y"]}'
    text = good[:start] + noise.replace(b"\n", b"") + good[start + length :]
    entry = _parse_lines(text)[0]
    if isinstance(entry, Posting):
        # A byte order mark before the line is allowed, and is not part of it.
        value = json.loads(jsonl.strip_line(text).decode())
        assert entry.pair == Pair(value["company"], value["title"])


@given(
    st.lists(
        st.sampled_from(
            [
                b'{"company":"Acme","title":"Clerk"}',
                b'{"company":"a","title":"}"}',
                b'{"company":"a","title":"b"} ',
                b'{"company":"a","title":"b"}{"company":"c","title":"d"}',
                b'{"company":"a","title":"b","x":{"y":1}',
                b'{"company":"a",',
                b'"title":"b"}',
                b'{"z":"',
                b'{"company":"a","title":"b","seniority":1}',
                b'{"company":"a","title":"b","x":"\xff"}',
                b"{}",
                b"",
            ]
        ),
        min_size=1,
        max_size=5,
    )
)
@example([b'{"company":"a",', b'"title":"b"}'])
@example([b'{"company":"a","title":"b"}{"company":"c","title":"d"}', b'{"company":"a",', b'"title":"b"}'])
def test_block_gives_same_result_as_its_lines_alone(lines: list[bytes]) -> None:
    """Each line of a block is parsed as if alone, also if JSON values share a line or span two."""
    for line, entry in zip(lines, _parse_lines(*lines), strict=True):
        alone = _parse_lines(line)[0]
        if isinstance(alone, Posting):
            assert isinstance(entry, Posting)
            assert entry.pair == alone.pair
        else:
            assert entry == alone
