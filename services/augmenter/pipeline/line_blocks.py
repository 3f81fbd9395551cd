"""Lines in hand: what they ask for, and what becomes of them once that is answered. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from services.augmenter.pipeline import jsonl
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.splice import Splicer
from services.augmenter.stats import LineCounts
from services.common import json_objects
from services.common.line_reader import Piece
from services.common.posting_fields import DEFAULT, PostingFields

RejectedLine: TypeAlias = tuple[int, bytes, str]  # number, bytes, reason
_FEW_LINES = 32


class PostingFormat:
    """How lines of a run are read and written, by the names of their fields."""

    def __init__(self, fields: PostingFields = DEFAULT, *, keep_existing: bool = False) -> None:
        self.parser = jsonl.PostingParser(fields, keep_existing=keep_existing)
        self.splicer = Splicer(fields.level)


STANDARD = PostingFormat()


@dataclass(slots=True)
class Answers:
    """To pairs in their order: the level, or 0 where the reason stands in `refused`, by the pair's place."""

    levels: bytes
    refused: dict[int, str] = field(default_factory=dict)

    def part(self, start: int, count: int) -> "Answers":
        """Those to so many pairs."""
        end = start + count
        refused = {place - start: why for place, why in self.refused.items() if start <= place < end}
        return Answers(self.levels[start:end], refused)


@dataclass(slots=True)
class Settled:
    """What became of lines: the output, to be joined, and those that were rejected."""

    augmented: list[bytes]
    rejected: list[RejectedLine]


@dataclass(frozen=True, slots=True)
class PlainWindow:
    """Lines that can all be asked, kept without their outer braces.

    Their pairs are not kept: what waits for its answer should be small.
    """

    inner: list[bytes]
    form: PostingFormat = STANDARD

    @property
    def count(self) -> int:
        """How many lines."""
        return len(self.inner)

    @property
    def extra(self) -> int:
        """How many more they are than the text has line ends for."""
        return 0

    @property
    def blank(self) -> int:
        """How many of them are blank."""
        return 0

    @property
    def bad(self) -> int:
        """How many of them cannot be asked."""
        return 0

    def first_bad(self) -> tuple[int, str] | None:
        """The place of the first of those, and why."""
        return None

    @property
    def asked(self) -> int:
        """How many of them are asked."""
        return len(self.inner)

    def settled(self, answers: Answers, counts: LineCounts) -> Settled:
        """What becomes of the lines, each counted. The answers are to those asked."""
        if answers.refused:
            text = b"{" + b"}\n{".join(self.inner) + b"}"
            mixed, _ = _mixed(text, self.form)  # the same pairs in the same order
            return mixed.settled(answers, counts)
        counts.augmented += len(self.inner)
        return Settled(self.form.splicer.all_spliced(self.inner, answers.levels), [])


@dataclass(frozen=True, slots=True)
class MixedWindow:
    """Lines of any kind: as they were, stripped, and what is to become of them.

    That is, of a line that is asked, whether it has a level to be replaced; None of a blank one.
    """

    lines: list[bytes]
    texts: list[bytes]
    fates: list[bool | jsonl.Kept | jsonl.Rejected | None]
    extra: int
    form: PostingFormat = STANDARD

    @property
    def count(self) -> int:
        """How many lines."""
        return len(self.lines)

    @property
    def blank(self) -> int:
        """How many of them are blank."""
        return self.fates.count(None)

    @property
    def bad(self) -> int:
        """How many of them cannot be asked."""
        return sum(isinstance(fate, jsonl.Rejected) for fate in self.fates)

    def first_bad(self) -> tuple[int, str] | None:
        """The place of the first of those, and why."""
        return next(
            (
                (place, fate.reason)
                for place, fate in enumerate(self.fates)
                if isinstance(fate, jsonl.Rejected)
            ),
            None,
        )

    @property
    def asked(self) -> int:
        """How many of them are asked."""
        return sum(isinstance(fate, bool) for fate in self.fates)

    def settled(self, answers: Answers, counts: LineCounts) -> Settled:
        """What becomes of the lines, each counted. The answers are to those asked."""
        augmented: list[bytes] = []
        rejected: list[RejectedLine] = []
        blank = 0
        first = counts.settled + 1
        asked = enumerate(answers.levels)
        for place, (text, fate) in enumerate(zip(self.texts, self.fates, strict=True)):
            if isinstance(fate, bool):
                pair, level = next(asked)
                if level:
                    augmented.append(self.form.splicer.spliced(text, level, replace=fate))
                    counts.replaced += fate
                    continue
                reason = answers.refused[pair]
            elif fate is None:
                blank += 1
                continue
            elif isinstance(fate, jsonl.Kept):
                augmented.append(text + b"\n")
                counts.kept += 1
                continue
            else:
                reason = fate.reason
            rejected.append((first + place, self.lines[place], reason))
        counts.augmented += len(augmented)
        counts.rejected += len(rejected)
        counts.blank += blank
        return Settled(augmented, rejected)


Window: TypeAlias = PlainWindow | MixedWindow


def parsed(block: list[Piece], *, into: list[Window], form: PostingFormat = STANDARD) -> Iterator[list[Pair]]:
    """The pair of each line that is to be asked, piece by piece; adds the piece's window to `into`.

    What is parsed is still in the processor's cache, if whoever takes it looks at it at once. The block is
    emptied: the windows replace it.
    """
    block.reverse()
    while block:
        piece = block.pop()
        plain = form.parser.parse_plain(piece.text, piece.count)
        made: Window
        if plain is not None:
            inner, pairs = plain
            made = PlainWindow(inner, form)
        elif piece.count > _FEW_LINES:  # the odd ones are few, as a rule: those beside them go the fast way
            block += reversed(piece.halves())
            continue
        else:
            made, pairs = _mixed(piece.text, form)
        into.append(made)
        yield pairs


def settled(
    windows: Iterable[Window], answers: Answers, counts: LineCounts
) -> tuple[bytes, list[RejectedLine]]:
    """The output lines and the rejected ones; counts what became of each.

    The windows are in the order of the file: a line's number is how many were counted before it, and one.
    """
    augmented: list[bytes] = []
    rejected: list[RejectedLine] = []
    place = 0
    for window in windows:
        asked = window.asked
        became = window.settled(answers.part(place, asked), counts)
        place += asked
        augmented += became.augmented
        rejected += became.rejected
    return b"".join(augmented), rejected


def _mixed(text: bytes, form: PostingFormat) -> tuple[MixedWindow, list[Pair]]:
    ends = text.split(b"\n")
    lines = [part for line in ends for part in json_objects.split(line)]
    texts = [jsonl.strip(line) for line in lines]
    entries = form.parser.parse(texts)
    pairs = [entry.pair for entry in entries if isinstance(entry, jsonl.Posting)]
    fates = [entry.has_level if isinstance(entry, jsonl.Posting) else entry for entry in entries]
    return MixedWindow(lines, texts, fates, len(lines) - len(ends), form), pairs
