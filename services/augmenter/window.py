"""A block of lines in hand: what it asks for, and what becomes of it once that is answered. Pure."""

from dataclasses import dataclass, field
from typing import TypeAlias

from services.augmenter import jsonl
from services.augmenter.jsonl import Pair
from services.augmenter.splice import all_spliced
from services.augmenter.totals import LineCounts
from services.common.lines import BOM

RejectedLine: TypeAlias = tuple[int, bytes, str]  # number, bytes, reason


@dataclass(slots=True)
class Answers:
    """To pairs in their order: the level, or 0 where the reason stands in `refused`, by the pair's place."""

    levels: bytes
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainWindow:
    """Lines that can all be asked, kept without their outer braces. `first` is the first line's number.

    Their pairs are not kept: what waits for its answer should be small.
    """

    first: int
    inner: list[bytes]

    @property
    def count(self) -> int:
        """How many lines."""
        return len(self.inner)

    @property
    def blank(self) -> int:
        """How many of them are blank."""
        return 0

    @property
    def bad(self) -> int:
        """How many of them cannot be asked."""
        return 0

    def settled(self, answers: Answers, counts: LineCounts) -> tuple[bytes, list[RejectedLine]]:
        """The output lines and the rejected ones; counts what became of each."""
        if answers.refused:
            block = b"{" + b"}\n{".join(self.inner) + b"}"
            mixed, _ = _mixed(block, first=self.first)  # the same pairs in the same order
            return mixed.settled(answers, counts)
        counts.augmented += len(self.inner)
        return all_spliced(self.inner, answers.levels), []


@dataclass(frozen=True, slots=True)
class MixedWindow:
    """Lines of any kind: as they were, stripped, what they hold, and the pairs of those to be asked."""

    first: int
    lines: list[bytes]
    texts: list[bytes]
    entries: list[jsonl.Entry]

    @property
    def count(self) -> int:
        """How many lines."""
        return len(self.lines)

    @property
    def blank(self) -> int:
        """How many of them are blank."""
        return self.entries.count(None)

    @property
    def bad(self) -> int:
        """How many of them cannot be asked."""
        return sum(isinstance(entry, jsonl.Rejected) for entry in self.entries)

    def settled(self, answers: Answers, counts: LineCounts) -> tuple[bytes, list[RejectedLine]]:
        """The output lines and the rejected ones; counts what became of each."""
        augmented: list[bytes] = []
        rejected: list[RejectedLine] = []
        blank = 0
        asked = enumerate(answers.levels)
        for place, (text, entry) in enumerate(zip(self.texts, self.entries, strict=True)):
            if isinstance(entry, jsonl.Posting):
                pair, level = next(asked)
                if level:
                    augmented.append(jsonl.augmented_line(text, entry, level))
                    continue
                reason = answers.refused[pair]
            elif entry is None:
                blank += 1
                continue
            else:
                reason = entry.reason
            rejected.append((self.first + place, self.lines[place], reason))
        counts.augmented += len(augmented)
        counts.rejected += len(rejected)
        counts.blank += blank
        return b"".join(augmented), rejected


Window: TypeAlias = PlainWindow | MixedWindow


def parsed(block: bytes, count: int, *, first: int) -> tuple[Window, list[Pair]]:
    """The block's lines, and the pair of each that is to be asked. `first` is the first line's number."""
    plain = jsonl.parse_plain(block, count)
    if plain is None:
        return _mixed(block, first=first)
    inner, postings = plain
    return PlainWindow(first, inner), postings


def _mixed(block: bytes, *, first: int) -> tuple[MixedWindow, list[Pair]]:
    lines = block.split(b"\n")
    texts = [jsonl.strip(line) for line in lines]
    if first == 1:  # a byte order mark belongs to the file, not to its first line
        texts[0] = jsonl.strip(lines[0].removeprefix(BOM))
    entries = jsonl.parse(texts)
    pairs = [entry.pair for entry in entries if isinstance(entry, jsonl.Posting)]
    return MixedWindow(first, lines, texts, entries), pairs
