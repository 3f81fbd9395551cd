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
    """Each pair that was asked is in exactly one of the two."""

    levels: dict[Pair, int] = field(default_factory=dict)
    refused: dict[Pair, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainWindow:
    """Lines that can all be asked, kept without their outer braces. `first` is the first one's number."""

    first: int
    inner: list[bytes]
    line_pairs: list[Pair]

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

    def pairs(self) -> dict[Pair, None]:
        """The distinct pairs, in order of appearance."""
        return dict.fromkeys(self.line_pairs)

    def settled(self, answers: Answers, counts: LineCounts) -> tuple[bytes, list[RejectedLine]]:
        """The output lines and the rejected ones; counts what became of each."""
        if answers.refused:
            block = b"{" + b"}\n{".join(self.inner) + b"}"
            return _mixed(block, first=self.first).settled(answers, counts)
        counts.augmented += len(self.inner)
        return all_spliced(self.inner, map(answers.levels.__getitem__, self.line_pairs)), []


@dataclass(frozen=True, slots=True)
class MixedWindow:
    """Lines of any kind: as they were, stripped, and what they hold."""

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

    def pairs(self) -> dict[Pair, None]:
        """The distinct pairs, in order of appearance."""
        return dict.fromkeys(entry.pair for entry in self.entries if isinstance(entry, jsonl.Posting))

    def settled(self, answers: Answers, counts: LineCounts) -> tuple[bytes, list[RejectedLine]]:
        """The output lines and the rejected ones; counts what became of each."""
        augmented: list[bytes] = []
        rejected: list[RejectedLine] = []
        blank = 0
        for place, (text, entry) in enumerate(zip(self.texts, self.entries, strict=True)):
            if isinstance(entry, jsonl.Posting):
                level = answers.levels.get(entry.pair)
                if level is not None:
                    augmented.append(jsonl.augmented_line(text, entry, level))
                    continue
                reason = answers.refused[entry.pair]
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


def parsed(block: bytes, *, first: int) -> Window:
    """The block's lines, the first of which has this number in its file."""
    plain = jsonl.parse_plain(block)
    return _mixed(block, first=first) if plain is None else PlainWindow(first, *plain)


def _mixed(block: bytes, *, first: int) -> MixedWindow:
    lines = block.split(b"\n")
    texts = [jsonl.strip(line) for line in lines]
    if first == 1:  # a byte order mark belongs to the file, not to its first line
        texts[0] = jsonl.strip(lines[0].removeprefix(BOM))
    return MixedWindow(first, lines, texts, jsonl.parse(texts))
