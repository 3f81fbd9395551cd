"""What becomes of lines that are parsed piece by piece, once all of them are answered."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.line_blocks import PairLevels, ParsedBlock
from services.augmenter.stats import LineCounts
from services.common.line_reader import LineBlock
from tests.integration.augmenter.conftest import make_posting

_ODD = {b"": None, b"bad": "not JSON: Expecting value (character 1)", b"[]": "not a JSON object"}
_Lines = st.lists(
    st.tuples(
        st.sampled_from([*_ODD, *(make_posting(company) for company in "abc"), make_posting("d") + b" "]),
        st.integers(0, 7),  # the level, or that it was refused
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(scope="module", autouse=True)
def few() -> object:
    """Pieces of more than two lines are halved if one is odd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_blocks, "_MAX_MIXED_LINES", 2)
        yield


@given(_Lines, st.lists(st.integers(1, 5), min_size=20, max_size=20))
def test_each_line_has_its_own_answer(given_lines: list[tuple[bytes, int]], sizes: list[int]) -> None:
    """Whatever the lines are and wherever they are cut: its level, its reason or nothing; all are counted."""
    windows: list[ParsedBlock] = []
    lines = iter([line for line, _ in given_lines])
    cut = [list(itertools.islice(lines, size)) for size in sizes]
    block = [LineBlock(b"\n".join(some), len(some)) for some in cut if some]
    asked = [pair for pairs in line_blocks.parse_blocks(block, parsed_blocks=windows) for pair in pairs]
    assert block == []
    levels = [level for line, level in given_lines if line not in _ODD]
    assert len(asked) == len(levels)
    refused = {place: f"refused {place}" for place, level in enumerate(levels) if not level}
    counts = LineCounts(read=len(given_lines))
    output, rejected = line_blocks.apply_levels(windows, PairLevels(bytes(levels), refused), counts)

    expected, reasons, place = b"", [], 0
    for number, (line, level) in enumerate(given_lines, 1):
        if line in _ODD:
            if line:
                reasons.append((number, line, _ODD[line]))
            continue
        if level:
            expected += line.strip()[:-1] + b', "seniority": %d}\n' % level
        else:
            reasons.append((number, line, f"refused {place}"))
        place += 1
    assert (output, rejected) == (expected, reasons)
    assert counts.is_balanced
