"""What a run has done so far: one mutable object, changed only on the event loop, never across an await."""

from dataclasses import dataclass, field
from typing import Any

from services.common.storage.input_listing import NameCounts

MAX_NAMED_FAILURES = 1000
"""A run that goes on for months remembers so many of those that were never mended."""


@dataclass(slots=True)
class LineCounts:
    """What became of lines. `read` is counted where lines are read, the others where they are written.

    Of the augmented ones, `replaced` had a level before, and `kept` still have it: they are as they were.
    """

    read: int = 0
    augmented: int = 0
    rejected: int = 0
    blank: int = 0
    replaced: int = 0
    kept: int = 0

    @property
    def accounted(self) -> int:
        """How many lines it is known of what became of them."""
        return self.augmented + self.rejected + self.blank

    @property
    def is_balanced(self) -> bool:
        """Whether nothing was lost."""
        return self.read == self.accounted

    def add(self, other: "LineCounts") -> None:
        """Add another file's."""
        self.read += other.read
        self.augmented += other.augmented
        self.rejected += other.rejected
        self.blank += other.blank
        self.replaced += other.replaced
        self.kept += other.kept


@dataclass(slots=True)
class Failures:
    """Files that failed. Of the first, `named`, by their places, why; of the others only how many times.

    A file that is not among the named counts as often as it fails, also when it is done at last.
    """

    reasons_by_file: dict[str, str] = field(default_factory=dict)
    unnamed_count: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.reasons_by_file) + self.unnamed_count

    def add(self, file: str, reason: str) -> bool:
        """Note a failure; whether it will be named at the end."""
        if file not in self.reasons_by_file and len(self.reasons_by_file) >= MAX_NAMED_FAILURES:
            self.unnamed_count += 1
            return False
        self.reasons_by_file[file] = reason
        return True

    def mark_resolved(self, file: str) -> None:
        """It is done, whether or not an earlier try failed."""
        self.reasons_by_file.pop(file, None)


@dataclass(slots=True)
class RunStats:
    """The run's figures. `lines` are those of files that are done."""

    files_done: int = 0
    files_skipped: int = 0
    files_archived: int = 0  # of the skipped: in cold storage, not restored
    files_missing: int = 0  # of the skipped: gone before they were read
    failures: Failures = field(default_factory=Failures)
    input_names: NameCounts = field(default_factory=NameCounts)
    foreign_keys: int = 0  # keys outside INPUT in messages of the queue
    messages_left: int = 0  # in the queue: not about INPUT, or not understood
    messages_not_understood: int = 0
    lines: LineCounts = field(default_factory=LineCounts)
    pairs_sent: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    rpcs: int = 0
    seconds: float = 0.0
    # Live figures, for the progress bar.
    files_found: int = 0
    bytes_found: int = 0
    bytes_read: int = 0
    lines_read: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the pairs that the proxy had; None where nobody said (the model itself does not)."""
        counted = self.cache_hits + self.cache_misses
        return self.cache_hits / counted if counted else None

    @property
    def lines_per_second(self) -> float:
        """Over the whole run."""
        return self.lines.read / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The shape of `--summary-json`."""
        return {
            "files": {"done": self.files_done, "skipped": self.files_skipped, "failed": self.failures.count},
            "archived": self.files_archived,
            "missing": self.files_missing,
            "ignored": dict(self.input_names.ignored),
            "lines": {
                "in": self.lines.read,
                "augmented": self.lines.augmented,
                "rejected": self.lines.rejected,
                "blank": self.lines.blank,
                "replaced": self.lines.replaced,
                "kept": self.lines.kept,
            },
            "pairs": {"asked": self.pairs_sent, "hits": self.cache_hits, "misses": self.cache_misses},
            "rpcs": self.rpcs,
            "keys_outside": self.foreign_keys,
            "messages": {"left": self.messages_left, "not_understood": self.messages_not_understood},
            "seconds": round(self.seconds, 3),
            "failures": [
                {"file": name, "error": error} for name, error in self.failures.reasons_by_file.items()
            ],
        }
