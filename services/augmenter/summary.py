"""Texts that a run prints at its end."""

import json
import sys
from pathlib import Path

from services.augmenter.stats import RunStats
from services.common.errors import CommandError
from services.common.printable import escape_unprintable

# The model takes this many pairs in one call, and one call a second.
_MODEL_BATCH_PAIRS = 1000


def format_summary(stats: RunStats, *, rejects_uri: str) -> str:
    """Return the summary of a run as text."""
    lines = stats.lines
    breakdown = f"{lines.augmented:,} augmented + {lines.rejected:,} rejected + {lines.blank:,} blank"
    rows = [
        (
            "Files",
            f"{stats.files_done:,} done, {stats.files_skipped:,} skipped, {stats.failures.count:,} failed",
        ),
        ("Lines", f"{lines.read:,} in = {breakdown}"),
        (
            "Pairs",
            f"{stats.pairs_sent:,} distinct pairs sent in {stats.rpcs:,} RPCs; {_format_hit_rate(stats)}",
        ),
        ("Time", f"{stats.seconds:.1f} s, {stats.lines_per_second:,.0f} lines/s"),
    ]
    if lines.replaced or lines.kept:
        rows.append(("Existing", f"{lines.replaced:,} levels replaced, {lines.kept:,} kept"))
    if lines.rejected:
        rows.append(("Rejects", f"{rejects_uri} (the lines, and why)"))
    rows += _skipped_rows(stats)
    rows += _ignored_rows(stats)
    if stats.messages_left:
        not_understood = stats.messages_not_understood
        kinds = f"{stats.messages_left - not_understood:,} not about INPUT, {not_understood:,} not understood"
        rows.append(("Left", f"{stats.messages_left:,} messages left in the queue: {kinds}"))
    return "".join(f"{name:<8} {text}\n" for name, text in rows)


def format_dry_run_summary(stats: RunStats, *, distinct_pairs: int) -> str:
    """Return the summary of a dry run as text: an upper bound on what a run would cost."""
    already_done = stats.files_skipped - stats.files_archived - stats.files_missing
    calls = -(-distinct_pairs // _MODEL_BATCH_PAIRS)
    rows = [
        (
            "Files",
            f"{stats.files_done:,} to do, {already_done:,} already done, {stats.failures.count:,} unreadable",
        ),
        ("Lines", f"{stats.lines.read:,}, {stats.lines.rejected:,} of them to be rejected"),
        ("Pairs", f"{distinct_pairs:,} distinct"),
        ("Cost", f"at most {calls:,} calls to the model, {_format_duration(calls)} at one call a second"),
    ]
    rows += _skipped_rows(stats)
    rows += _ignored_rows(stats)
    return "".join(f"{name:<8} {text}\n" for name, text in rows) + "Dry run: nothing was written or sent.\n"


def write_failures(stats: RunStats, *, program: str) -> None:
    """Write one line to standard error for each failed file that is still remembered."""
    for name, error in stats.failures.reasons_by_file.items():
        sys.stderr.write(escape_unprintable(f"{program}: {name}: {' '.join(error.split())}") + "\n")
    if stats.failures.unnamed_count:
        sys.stderr.write(f"{program}: and {stats.failures.unnamed_count:,} more, named when they failed\n")


def write_summary_json(stats: RunStats, path: str) -> None:
    """Write the summary as JSON. Raises CommandError."""
    try:
        Path(path).write_text(json.dumps(stats.as_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"--summary-json {path}: {error.strerror}"
        raise CommandError(message) from error


def _format_hit_rate(stats: RunStats) -> str:
    if stats.hit_rate is None:
        return "hit rate not reported by the target"
    return f"hit rate {stats.hit_rate:.1%}"


def _skipped_rows(stats: RunStats) -> list[tuple[str, str]]:
    """Return rows for files that were skipped although they have no output."""
    rows = []
    if stats.files_archived:
        rows.append(
            (
                "Archived",
                f"{stats.files_archived:,} objects in cold storage were skipped; restore them and run again",
            )
        )
    if stats.files_missing:
        rows.append(
            ("Missing", f"{stats.files_missing:,} objects were gone before they were read, and skipped")
        )
    return rows


def _ignored_rows(stats: RunStats) -> list[tuple[str, str]]:
    described = stats.input_names.describe_ignored()
    return [("Ignored", f"{described} (by name)")] if described else []


def _format_duration(seconds: int) -> str:
    hours, seconds = divmod(seconds, 3600)
    minutes, seconds = divmod(seconds, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"
