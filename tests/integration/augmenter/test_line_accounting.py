"""A file's books: what was read is what was written, rejected or blank, or there is no output."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.line_blocks import MixedWindow, PlainWindow, Window
from services.common.line_reader import Piece
from tests.integration.augmenter.conftest import Augment, Stub, posting

Parse = Callable[..., Iterator[list[Pair]]]


def _losing_a_line(parse: Parse) -> Parse:
    """As `parse`, but of each piece it forgets the last line."""

    def lose(block: list[Piece], *, into: list[Window], **how: Any) -> Iterator[list[Pair]]:
        for pairs in parse(block, into=into, **how):
            made = into.pop()
            if isinstance(made, PlainWindow):
                into.append(PlainWindow(made.inner[:-1]))
                yield pairs[:-1]
            else:
                lines, texts, fates = made.lines[:-1], made.texts[:-1], made.fates[:-1]
                into.append(MixedWindow(lines, texts, fates, made.extra))
                yield pairs

    return lose


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([posting(), posting()], "2 lines in, but 1 augmented + 0 rejected + 0 blank"),
        ([b"bad", b"", posting(), b"bad"], "4 lines in, but 1 augmented + 1 rejected + 1 blank"),
    ],
)
def test_a_file_whose_lines_do_not_add_up_has_no_output(
    augment: Augment, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lines: list[bytes], said: str,
) -> None:  # fmt: skip
    """A line that a defect lost fails its file, with the figures; neither output nor rejects appear."""
    monkeypatch.setattr(line_blocks, "parsed", _losing_a_line(line_blocks.parsed))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    ended = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert (ended.code, ended.err) == (1, f"augmenter: {tmp_path}/a.jsonl: {said}\n")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
