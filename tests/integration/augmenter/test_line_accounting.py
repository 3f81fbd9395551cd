"""Tests that every line that was read is written, rejected or blank, or else there is no output."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.augmenter.domain import Pair
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.line_blocks import MixedBlock, ParsedBlock, PlainBlock
from services.common.line_reader import LineBlock
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting

Parse = Callable[..., Iterator[list[Pair]]]


def _drop_last_lines(parse: Parse) -> Parse:
    """Return a parser that drops the last line of each block."""

    def parse_and_drop(
        blocks: list[LineBlock], *, parsed_blocks: list[ParsedBlock], **options: Any
    ) -> Iterator[list[Pair]]:
        for pairs in parse(blocks, parsed_blocks=parsed_blocks, **options):
            parsed = parsed_blocks.pop()
            if isinstance(parsed, PlainBlock):
                parsed_blocks.append(PlainBlock(parsed.unbraced_lines[:-1]))
                yield pairs[:-1]
            else:
                lines = parsed.lines[:-1]
                stripped_lines = parsed.stripped_lines[:-1]
                statuses = parsed.line_statuses[:-1]
                parsed_blocks.append(MixedBlock(lines, stripped_lines, statuses, parsed.extra_lines))
                yield pairs

    return parse_and_drop


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([make_posting(), make_posting()], "2 lines in, but 1 augmented + 0 rejected + 0 blank"),
        ([b"bad", b"", make_posting(), b"bad"], "4 lines in, but 1 augmented + 1 rejected + 1 blank"),
    ],
)
def test_lost_line_fails_the_file_without_output(
    augment: RunAugmenter,
    stub: RunningStub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[bytes],
    message: str,
) -> None:
    """If a defect loses a line, the file fails with its line counts, and has no output and no rejects."""
    monkeypatch.setattr(line_blocks, "parse_blocks", _drop_last_lines(line_blocks.parse_blocks))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert (result.exit_code, result.stderr) == (1, f"augmenter: {tmp_path}/a.jsonl: {message}\n")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
