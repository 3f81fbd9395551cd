"""A file's books: what was read is what was written, rejected or blank, or there is no output."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.line_blocks import MixedBlock, ParsedBlock, PlainBlock
from services.common.line_reader import LineBlock
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, make_posting

Parse = Callable[..., Iterator[list[Pair]]]


def _losing_a_line(parse: Parse) -> Parse:
    """As `parse`, but of each piece it forgets the last line."""

    def lose(
        blocks: list[LineBlock], *, parsed_blocks: list[ParsedBlock], **options: Any
    ) -> Iterator[list[Pair]]:
        for pairs in parse(blocks, parsed_blocks=parsed_blocks, **options):
            made = parsed_blocks.pop()
            if isinstance(made, PlainBlock):
                parsed_blocks.append(PlainBlock(made.unbraced_lines[:-1]))
                yield pairs[:-1]
            else:
                lines, texts, fates = made.lines[:-1], made.stripped_lines[:-1], made.line_statuses[:-1]
                parsed_blocks.append(MixedBlock(lines, texts, fates, made.extra_lines))
                yield pairs

    return lose


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([make_posting(), make_posting()], "2 lines in, but 1 augmented + 0 rejected + 0 blank"),
        ([b"bad", b"", make_posting(), b"bad"], "4 lines in, but 1 augmented + 1 rejected + 1 blank"),
    ],
)
def test_a_file_whose_lines_do_not_add_up_has_no_output(
    augment: RunAugmenter,
    stub: RunningStub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[bytes],
    said: str,
) -> None:
    """A line that a defect lost fails its file, with the figures; neither output nor rejects appear."""
    monkeypatch.setattr(line_blocks, "parse_blocks", _losing_a_line(line_blocks.parse_blocks))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    ended = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert (ended.exit_code, ended.stderr) == (1, f"augmenter: {tmp_path}/a.jsonl: {said}\n")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
