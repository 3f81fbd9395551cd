"""Tests of blocks of lines that are parsed block by block and receive their levels afterwards."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.domain import PairLevels
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.line_blocks import ParsedBlock
from services.augmenter.stats import LineCounts
from services.common.line_reader import LineBlock
from tests.support.postings import make_posting

_INVALID = {b"": None, b"bad": "not JSON: Expecting value (character 1)", b"[]": "not a JSON object"}
_LINES = st.lists(
    st.tuples(
        st.sampled_from([*_INVALID, *(make_posting(company) for company in "abc"), make_posting("d") + b" "]),
        # The level, or 0 if the pair was rejected.
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(scope="module", autouse=True)
def max_two_mixed_lines() -> object:
    """Split blocks of more than two lines if one of them is unusual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_blocks, "_MAX_MIXED_LINES", 2)
        yield


@given(_LINES, st.lists(st.integers(1, 5), min_size=20, max_size=20))
def test_each_line_gets_its_own_level_or_reason(
    given_lines: list[tuple[bytes, int]], sizes: list[int]
) -> None:
    """Each line of a file gets its own level or reason, however the file is cut into blocks."""
    parsed: list[ParsedBlock] = []
    lines = iter([line for line, _ in given_lines])
    chunks = [list(itertools.islice(lines, size)) for size in sizes]
    blocks = [LineBlock(b"\n".join(chunk), len(chunk)) for chunk in chunks if chunk]
    sent = [pair for pairs in line_blocks.parse_blocks(blocks, parsed_blocks=parsed) for pair in pairs]
    assert blocks == []
    levels = [level for line, level in given_lines if line not in _INVALID]
    assert len(sent) == len(levels)
    rejected_pairs = {index: f"refused {index}" for index, level in enumerate(levels) if not level}
    counts = LineCounts(read=len(given_lines))
    output, rejected = line_blocks.apply_levels(parsed, PairLevels(bytes(levels), rejected_pairs), counts)

    expected = b""
    reasons = []
    index = 0
    for number, (line, level) in enumerate(given_lines, 1):
        if line in _INVALID:
            if line:
                reasons.append((number, line, _INVALID[line]))
            continue
        if level:
            expected += line.strip()[:-1] + b', "seniority": %d}\n' % level
        else:
            reasons.append((number, line, f"refused {index}"))
        index += 1
    assert (output, rejected) == (expected, reasons)
    assert counts.is_balanced
