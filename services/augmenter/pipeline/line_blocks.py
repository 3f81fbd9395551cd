"""Lines in hand: what they ask for, and what becomes of them once that is answered. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from services.augmenter.pipeline import jsonl
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.splice import Splicer
from services.augmenter.stats import LineCounts
from services.common import json_objects
from services.common.line_reader import LineBlock
from services.common.posting_fields import DEFAULT_FIELDS, PostingFields

NumberedReject: TypeAlias = tuple[int, bytes, str]  # number, bytes, reason
_MAX_MIXED_LINES = 32


class PostingFormat:
    """How lines of a run are read and written, by the names of their fields."""

    def __init__(self, fields: PostingFields = DEFAULT_FIELDS, *, keep_existing: bool = False) -> None:
        self.parser = jsonl.PostingParser(fields, keep_existing=keep_existing)
        self.splicer = Splicer(fields.level)


DEFAULT_FORMAT = PostingFormat()


@dataclass(slots=True)
class PairLevels:
    """To pairs in their order: the level, or 0 where the reason stands in `refused`, by the pair's place."""

    levels: bytes
    rejected: dict[int, str] = field(default_factory=dict)

    def select(self, start: int, count: int) -> "PairLevels":
        """Those to so many pairs."""
        end = start + count
        refused = {place - start: why for place, why in self.rejected.items() if start <= place < end}
        return PairLevels(self.levels[start:end], refused)


@dataclass(slots=True)
class AugmentedLines:
    """What became of lines: the output, to be joined, and those that were rejected."""

    augmented: list[bytes]
    rejected: list[NumberedReject]


@dataclass(frozen=True, slots=True)
class PlainBlock:
    """Lines that can all be asked, kept without their outer braces.

    Their pairs are not kept: what waits for its answer should be small.
    """

    unbraced_lines: list[bytes]
    posting_format: PostingFormat = DEFAULT_FORMAT

    @property
    def line_count(self) -> int:
        """How many lines."""
        return len(self.unbraced_lines)

    @property
    def extra_lines(self) -> int:
        """How many more they are than the text has line ends for."""
        return 0

    @property
    def blank_count(self) -> int:
        """How many of them are blank."""
        return 0

    @property
    def rejected_count(self) -> int:
        """How many of them cannot be asked."""
        return 0

    def first_rejected(self) -> tuple[int, str] | None:
        """The place of the first of those, and why."""
        return None

    @property
    def pair_count(self) -> int:
        """How many of them are asked."""
        return len(self.unbraced_lines)

    def apply_levels(self, levels: PairLevels, counts: LineCounts) -> AugmentedLines:
        """What becomes of the lines, each counted. The answers are to those asked."""
        if levels.rejected:
            text = b"{" + b"}\n{".join(self.unbraced_lines) + b"}"
            mixed, _ = _parse_mixed(text, self.posting_format)  # the same pairs in the same order
            return mixed.apply_levels(levels, counts)
        counts.augmented += len(self.unbraced_lines)
        return AugmentedLines(
            self.posting_format.splicer.splice_levels(self.unbraced_lines, levels.levels), []
        )


@dataclass(frozen=True, slots=True)
class MixedBlock:
    """Lines of any kind: as they were, stripped, and what is to become of them.

    That is, of a line that is asked, whether it has a level to be replaced; None of a blank one.
    """

    lines: list[bytes]
    stripped_lines: list[bytes]
    line_statuses: list[bool | jsonl.KeptLine | jsonl.RejectedLine | None]
    extra_lines: int
    posting_format: PostingFormat = DEFAULT_FORMAT

    @property
    def line_count(self) -> int:
        """How many lines."""
        return len(self.lines)

    @property
    def blank_count(self) -> int:
        """How many of them are blank."""
        return self.line_statuses.count(None)

    @property
    def rejected_count(self) -> int:
        """How many of them cannot be asked."""
        return sum(isinstance(fate, jsonl.RejectedLine) for fate in self.line_statuses)

    def first_rejected(self) -> tuple[int, str] | None:
        """The place of the first of those, and why."""
        return next(
            (
                (place, fate.reason)
                for place, fate in enumerate(self.line_statuses)
                if isinstance(fate, jsonl.RejectedLine)
            ),
            None,
        )

    @property
    def pair_count(self) -> int:
        """How many of them are asked."""
        return sum(isinstance(fate, bool) for fate in self.line_statuses)

    def apply_levels(self, levels: PairLevels, counts: LineCounts) -> AugmentedLines:
        """What becomes of the lines, each counted. The answers are to those asked."""
        augmented: list[bytes] = []
        rejected: list[NumberedReject] = []
        blank = 0
        first = counts.accounted + 1
        asked = enumerate(levels.levels)
        for place, (text, fate) in enumerate(zip(self.stripped_lines, self.line_statuses, strict=True)):
            if isinstance(fate, bool):
                pair, level = next(asked)
                if level:
                    augmented.append(self.posting_format.splicer.splice_level(text, level, replace=fate))
                    counts.replaced += fate
                    continue
                reason = levels.rejected[pair]
            elif fate is None:
                blank += 1
                continue
            elif isinstance(fate, jsonl.KeptLine):
                augmented.append(text + b"\n")
                counts.kept += 1
                continue
            else:
                reason = fate.reason
            rejected.append((first + place, self.lines[place], reason))
        counts.augmented += len(augmented)
        counts.rejected += len(rejected)
        counts.blank += blank
        return AugmentedLines(augmented, rejected)


ParsedBlock: TypeAlias = PlainBlock | MixedBlock


def parse_block(
    pieces: list[LineBlock],
    *,
    parsed_blocks: list[ParsedBlock],
    posting_format: PostingFormat = DEFAULT_FORMAT,
) -> Iterator[list[Pair]]:
    """The pair of each line that is to be asked, piece by piece; adds the piece's window to `into`.

    What is parsed is still in the processor's cache, if whoever takes it looks at it at once. The block is
    emptied: the windows replace it.
    """
    pieces.reverse()
    while pieces:
        piece = pieces.pop()
        plain = posting_format.parser.parse_plain(piece.text, piece.line_count)
        made: ParsedBlock
        if plain is not None:
            inner, pairs = plain
            made = PlainBlock(inner, posting_format)
        elif (
            piece.line_count > _MAX_MIXED_LINES
        ):  # the odd ones are few, as a rule: those beside them go the fast way
            pieces += reversed(piece.split_in_half())
            continue
        else:
            made, pairs = _parse_mixed(piece.text, posting_format)
        parsed_blocks.append(made)
        yield pairs


def apply_levels(
    blocks: Iterable[ParsedBlock], levels: PairLevels, counts: LineCounts
) -> tuple[bytes, list[NumberedReject]]:
    """The output lines and the rejected ones; counts what became of each.

    The windows are in the order of the file: a line's number is how many were counted before it, and one.
    """
    augmented: list[bytes] = []
    rejected: list[NumberedReject] = []
    place = 0
    for window in blocks:
        asked = window.pair_count
        became = window.apply_levels(levels.select(place, asked), counts)
        place += asked
        augmented += became.augmented
        rejected += became.rejected
    return b"".join(augmented), rejected


def _parse_mixed(text: bytes, posting_format: PostingFormat) -> tuple[MixedBlock, list[Pair]]:
    ends = text.split(b"\n")
    lines = [part for line in ends for part in json_objects.split_objects(line)]
    texts = [jsonl.strip_line(line) for line in lines]
    entries = posting_format.parser.parse(texts)
    pairs = [entry.pair for entry in entries if isinstance(entry, jsonl.Posting)]
    fates = [entry.has_level if isinstance(entry, jsonl.Posting) else entry for entry in entries]
    return MixedBlock(lines, texts, fates, len(lines) - len(ends), posting_format), pairs
