"""Counters of a run: one mutable object, changed only on the event loop and never across an await."""

from dataclasses import dataclass, field
from typing import Any

from services.common.storage.input_listing import NameCounts

# A run with --watch may go on for months, so the number of failed files that it remembers is bounded.
MAX_NAMED_FAILURES = 1000


@dataclass(slots=True)
class LineCounts:
    """Counts of lines by outcome.

    `read` is counted where lines are read, the others where they are written. Both `replaced` and `kept`
    lines are among the augmented ones: the former had a level that was replaced, the latter keep theirs.
    """

    read: int = 0
    augmented: int = 0
    rejected: int = 0
    blank: int = 0
    replaced: int = 0
    kept: int = 0

    @property
    def accounted(self) -> int:
        """Return the number of lines whose outcome is known."""
        return self.augmented + self.rejected + self.blank

    @property
    def is_balanced(self) -> bool:
        """Return whether every line that was read is accounted for."""
        return self.read == self.accounted

    def add(self, other: "LineCounts") -> None:
        """Add the counts of another file."""
        self.read += other.read
        self.augmented += other.augmented
        self.rejected += other.rejected
        self.blank += other.blank
        self.replaced += other.replaced
        self.kept += other.kept


@dataclass(slots=True)
class Failures:
    """Failed files.

    `reasons_by_file` holds the reasons of the first MAX_NAMED_FAILURES of them. The others are only counted,
    in `unnamed_count`: each time they fail, and even if they are processed at last.
    """

    reasons_by_file: dict[str, str] = field(default_factory=dict)
    unnamed_count: int = 0

    @property
    def count(self) -> int:
        """Return the number of failures."""
        return len(self.reasons_by_file) + self.unnamed_count

    def add(self, file: str, reason: str) -> bool:
        """Record a failure, and return whether it will be named at the end."""
        if file not in self.reasons_by_file and len(self.reasons_by_file) >= MAX_NAMED_FAILURES:
            self.unnamed_count += 1
            return False
        self.reasons_by_file[file] = reason
        return True

    def mark_resolved(self, file: str) -> None:
        """Forget an earlier failure of a file that is now processed."""
        self.reasons_by_file.pop(file, None)


@dataclass(slots=True)
class RunStats:
    """Counters of one run. `lines` covers files that are done."""

    files_done: int = 0
    files_skipped: int = 0
    # Among the skipped files: in cold storage and not restored.
    files_archived: int = 0
    # Among the skipped files: gone before they were read.
    files_missing: int = 0
    failures: Failures = field(default_factory=Failures)
    input_names: NameCounts = field(default_factory=NameCounts)
    # Keys outside INPUT in messages of the queue.
    foreign_keys: int = 0
    # Messages left in the queue: not about INPUT, or not understood.
    messages_left: int = 0
    messages_not_understood: int = 0
    lines: LineCounts = field(default_factory=LineCounts)
    pairs_sent: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    rpcs: int = 0
    seconds: float = 0.0
    # Live counters for the progress bar.
    files_found: int = 0
    bytes_found: int = 0
    bytes_read: int = 0
    lines_read: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Return the share of pairs found in the proxy's cache. None if the target did not report it."""
        counted = self.cache_hits + self.cache_misses
        return self.cache_hits / counted if counted else None

    @property
    def lines_per_second(self) -> float:
        """Return the average rate over the whole run."""
        return self.lines.read / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the content of `--summary-json`."""
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
