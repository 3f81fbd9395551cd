"""Parses blocks of lines into pairs, and applies the levels of the pairs to the lines. No I/O."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from services.augmenter.domain import Pair, PairLevels
from services.augmenter.pipeline import jsonl
from services.augmenter.pipeline.splice import Splicer
from services.augmenter.stats import LineCounts
from services.common import json_objects
from services.common.line_reader import LineBlock
from services.common.posting_fields import DEFAULT_FIELDS, PostingFields

# Number, bytes and reason of a rejected line.
NumberedReject: TypeAlias = tuple[int, bytes, str]
_MAX_MIXED_LINES = 32


class PostingFormat:
    """How the lines of a run are parsed and written, given the names of their fields."""

    def __init__(self, fields: PostingFields = DEFAULT_FIELDS, *, keep_existing: bool = False) -> None:
        self.parser = jsonl.PostingParser(fields, keep_existing=keep_existing)
        self.splicer = Splicer(fields.level)


DEFAULT_FORMAT = PostingFormat()


@dataclass(slots=True)
class AugmentedLines:
    """The result of a block: output lines as parts to be joined, and rejected lines."""

    augmented: list[bytes]
    rejected: list[NumberedReject]


@dataclass(frozen=True, slots=True)
class PlainBlock:
    """Lines that all hold a pair and no level, kept without their outer braces.

    Their pairs are not kept, since a block should be small while it waits for its levels.
    """

    unbraced_lines: list[bytes]
    posting_format: PostingFormat = DEFAULT_FORMAT

    @property
    def line_count(self) -> int:
        """Return the number of lines."""
        return len(self.unbraced_lines)

    @property
    def extra_lines(self) -> int:
        """Return the number of lines in excess of the text's line ends."""
        return 0

    @property
    def blank_count(self) -> int:
        """Return the number of blank lines."""
        return 0

    @property
    def rejected_count(self) -> int:
        """Return the number of lines that hold no pair and are rejected."""
        return 0

    def first_rejected(self) -> tuple[int, str] | None:
        """Return the index of the first rejected line, and the reason."""
        return None

    @property
    def pair_count(self) -> int:
        """Return the number of lines that hold a pair."""
        return len(self.unbraced_lines)

    def apply_levels(self, levels: PairLevels, counts: LineCounts) -> AugmentedLines:
        """Return the result of the lines, given the levels of their pairs, and add it to `counts`."""
        if levels.rejected:
            text = b"{" + b"}\n{".join(self.unbraced_lines) + b"}"
            # Parsed again line by line, the text has the same pairs in the same order.
            mixed, _ = _parse_mixed(text, self.posting_format)
            return mixed.apply_levels(levels, counts)
        counts.augmented += len(self.unbraced_lines)
        return AugmentedLines(
            self.posting_format.splicer.splice_levels(self.unbraced_lines, levels.levels), []
        )


@dataclass(frozen=True, slots=True)
class MixedBlock:
    """Lines of any kind: as read, stripped, and the status of each.

    The status of a line that holds a pair is whether it has a level to be replaced. That of a blank line is
    None. `extra_lines`: several JSON objects on one line count as a line each.
    """

    lines: list[bytes]
    stripped_lines: list[bytes]
    line_statuses: list[bool | jsonl.KeptLine | jsonl.RejectedLine | None]
    extra_lines: int
    posting_format: PostingFormat = DEFAULT_FORMAT

    @property
    def line_count(self) -> int:
        """Return the number of lines."""
        return len(self.lines)

    @property
    def blank_count(self) -> int:
        """Return the number of blank lines."""
        return self.line_statuses.count(None)

    @property
    def rejected_count(self) -> int:
        """Return the number of lines that hold no pair and are rejected."""
        return sum(isinstance(status, jsonl.RejectedLine) for status in self.line_statuses)

    def first_rejected(self) -> tuple[int, str] | None:
        """Return the index of the first rejected line, and the reason."""
        return next(
            (
                (index, status.reason)
                for index, status in enumerate(self.line_statuses)
                if isinstance(status, jsonl.RejectedLine)
            ),
            None,
        )

    @property
    def pair_count(self) -> int:
        """Return the number of lines that hold a pair."""
        return sum(isinstance(status, bool) for status in self.line_statuses)

    def apply_levels(self, levels: PairLevels, counts: LineCounts) -> AugmentedLines:
        """Return the result of the lines, given the levels of their pairs, and add it to `counts`."""
        augmented: list[bytes] = []
        rejected: list[NumberedReject] = []
        blank = 0
        first_number = counts.accounted + 1
        numbered_levels = enumerate(levels.levels)
        for index, (text, status) in enumerate(zip(self.stripped_lines, self.line_statuses, strict=True)):
            if isinstance(status, bool):
                pair_index, level = next(numbered_levels)
                if level:
                    augmented.append(self.posting_format.splicer.splice_level(text, level, replace=status))
                    counts.replaced += status
                    continue
                reason = levels.rejected[pair_index]
            elif status is None:
                blank += 1
                continue
            elif isinstance(status, jsonl.KeptLine):
                augmented.append(text + b"\n")
                counts.kept += 1
                continue
            else:
                reason = status.reason
            rejected.append((first_number + index, self.lines[index], reason))
        counts.augmented += len(augmented)
        counts.rejected += len(rejected)
        counts.blank += blank
        return AugmentedLines(augmented, rejected)


ParsedBlock: TypeAlias = PlainBlock | MixedBlock


def parse_blocks(
    blocks: list[LineBlock],
    *,
    parsed_blocks: list[ParsedBlock],
    posting_format: PostingFormat = DEFAULT_FORMAT,
) -> Iterator[list[Pair]]:
    """Yield the pairs of each block of lines, and add the parsed block to `parsed_blocks`.

    A consumer that looks up the pairs at once finds them still in the processor's cache. `blocks` is emptied
    on the way: the parsed blocks replace it.
    """
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        plain_lines = posting_format.parser.parse_plain(block.text, block.line_count)
        parsed: ParsedBlock
        if plain_lines is not None:
            unbraced_lines, pairs = plain_lines
            parsed = PlainBlock(unbraced_lines, posting_format)
        elif block.line_count > _MAX_MIXED_LINES:
            # Unusual lines are rare. Split the block, so that most others can still be parsed as plain.
            blocks += reversed(block.split_in_half())
            continue
        else:
            parsed, pairs = _parse_mixed(block.text, posting_format)
        parsed_blocks.append(parsed)
        yield pairs


def apply_levels(
    blocks: Iterable[ParsedBlock], levels: PairLevels, counts: LineCounts
) -> tuple[bytes, list[NumberedReject]]:
    """Return the output lines and the rejected lines of all blocks, and add them to `counts`.

    The blocks are in the order of the file: a line's number is the number of lines counted before it, plus 1.
    """
    augmented: list[bytes] = []
    rejected: list[NumberedReject] = []
    start = 0
    for block in blocks:
        pair_count = block.pair_count
        result = block.apply_levels(levels.select(start, pair_count), counts)
        start += pair_count
        augmented += result.augmented
        rejected += result.rejected
    return b"".join(augmented), rejected


def _parse_mixed(text: bytes, posting_format: PostingFormat) -> tuple[MixedBlock, list[Pair]]:
    physical_lines = text.split(b"\n")
    lines = [part for line in physical_lines for part in json_objects.split_objects(line)]
    stripped_lines = [jsonl.strip_line(line) for line in lines]
    entries = posting_format.parser.parse(stripped_lines)
    pairs = [entry.pair for entry in entries if isinstance(entry, jsonl.Posting)]
    statuses = [entry.has_level if isinstance(entry, jsonl.Posting) else entry for entry in entries]
    return MixedBlock(
        lines, stripped_lines, statuses, len(lines) - len(physical_lines), posting_format
    ), pairs
