"""Tests of lines that are parsed and augmented with any field names."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.augmenter.domain import PairLevels
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.line_blocks import ParsedBlock, PostingFormat
from services.augmenter.stats import LineCounts
from services.common.line_reader import LineBlock
from services.common.posting_fields import PostingFields


class _Members(list[tuple[str, Any]]):
    """The members of an object, in order, repeated ones too."""


_NAMES = st.sampled_from(["level", "l\u00e9v", "content", "company", "title", "x"])


_SPELLED = {"level": ['"level"', '"l\\u0065vel"'], "lév": ['"lév"', '"l\\u00e9v"']}


_VALUES = st.recursive(
    st.none() | st.integers() | st.sampled_from(["Acme", '"level": 1', "}{", "é"]),
    lambda inner: st.lists(st.tuples(_NAMES, inner), max_size=4).map(_Members) | st.lists(inner, max_size=2),
    max_leaves=10,
)


def _write(draw: st.DrawFn, value: Any) -> str:
    """Draw JSON text of a value, with any white space, repeated members and escaped names."""
    space = draw(st.sampled_from(["", " ", "\t"]))
    if isinstance(value, _Members):
        names = [draw(st.sampled_from(_SPELLED.get(name, [json.dumps(name)]))) for name, _ in value]
        members = (
            f"{space}{name}{space}:{_write(draw, inner)}"
            for name, (_, inner) in zip(names, value, strict=True)
        )
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + f",{space}".join(_write(draw, inner) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    members = draw(st.lists(st.tuples(_NAMES, _VALUES), max_size=6))
    content = _Members(
        draw(st.permutations([("company", "Acme"), ("title", draw(st.sampled_from(["a", "b"])))]))
    )
    members.insert(draw(st.integers(0, len(members))), ("content", content))
    return _write(draw, _Members(members)).encode()


def _value_at(value: Any, path: tuple[str, ...]) -> Any:
    """Return the value that `json` finds at a path of member names."""
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


@settings(max_examples=50)
@given(
    st.lists(_lines(), min_size=1, max_size=4),
    st.sampled_from([("company",), ("content", "company"), ("x", "content", "company")]),
    st.sampled_from([("title",), ("content", "title")]),
    st.sampled_from(["level", "lév"]),
    st.booleans(),
)
def test_lines_are_augmented_as_json_reads_them(
    given_lines: list[bytes], company: tuple[str, ...], title: tuple[str, ...], level: str, keep: bool
) -> None:
    """With any field names, a line is augmented if `json` finds a pair in it, and rejected otherwise.

    Only the level is replaced.
    """
    posting_format = PostingFormat(PostingFields(company, title, level), keep_existing=keep)
    for lines in [given_lines, *([line] for line in given_lines)]:
        parsed_blocks: list[ParsedBlock] = []
        blocks = [LineBlock(b"\n".join(lines), len(lines))]
        pairs = [
            pair
            for chunk in line_blocks.parse_blocks(
                blocks, parsed_blocks=parsed_blocks, posting_format=posting_format
            )
            for pair in chunk
        ]
        counts = LineCounts(read=len(lines))
        output, rejected = line_blocks.apply_levels(
            parsed_blocks, PairLevels(bytes([4]) * len(pairs)), counts
        )
        assert counts.is_balanced
        expected: list[tuple[str, str]] = []
        output_lines = iter(output.splitlines())
        rejected_lines = iter(rejected)
        for line in lines:
            value = json.loads(line)
            pair = (_value_at(value, company), _value_at(value, title))
            if keep and level in value:
                assert next(output_lines) == line.strip(b" \t")
            elif isinstance(pair[0], str) and isinstance(pair[1], str):
                expected.append(pair)
                others = [
                    member for member in json.loads(line, object_pairs_hook=_Members) if member[0] != level
                ]
                assert json.loads(next(output_lines), object_pairs_hook=_Members) == [*others, (level, 4)]
            else:
                assert next(rejected_lines)[1] == line
        assert [(pair.company, pair.title) for pair in pairs] == expected
        assert (next(output_lines, None), next(rejected_lines, None)) == (None, None)
