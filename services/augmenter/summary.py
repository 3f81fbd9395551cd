"""What a run tells people at its end."""

import json
import sys
from pathlib import Path

from services.augmenter.stats import Totals
from services.common.errors import CommandError
from services.common.printable import printable

_MODEL_BATCH = 1000  # what the model takes in one call, one call a second


def summary(totals: Totals, *, rejects_place: str) -> str:
    """The totals in people's words."""
    lines = totals.lines
    fates = f"{lines.augmented:,} augmented + {lines.rejected:,} rejected + {lines.blank:,} blank"
    rows = [
        ("Files", f"{totals.done:,} done, {totals.skipped:,} skipped, {totals.failures.count:,} failed"),
        ("Lines", f"{lines.read:,} in = {fates}"),
        ("Pairs", f"{totals.pairs_asked:,} distinct pairs asked in {totals.rpcs:,} RPCs; {_hits(totals)}"),
        ("Time", f"{totals.seconds:.1f} s, {totals.lines_per_second:,.0f} lines/s"),
    ]
    if lines.replaced or lines.kept:
        rows.append(("Existing", f"{lines.replaced:,} levels replaced, {lines.kept:,} kept"))
    if lines.rejected:
        rows.append(("Rejects", f"{rejects_place} (the lines, and why)"))
    rows += _skipped(totals)
    rows += _ignored(totals)
    if totals.messages_left:
        not_understood = totals.messages_not_understood
        kinds = (
            f"{totals.messages_left - not_understood:,} not about INPUT, {not_understood:,} not understood"
        )
        rows.append(("Left", f"{totals.messages_left:,} messages left in the queue: {kinds}"))
    return "".join(f"{name:<8} {text}\n" for name, text in rows)


def dry_run_summary(totals: Totals, *, distinct: int) -> str:
    """What a run could cost at most, in people's words."""
    already_done = totals.skipped - totals.archived - totals.missing
    calls = -(-distinct // _MODEL_BATCH)
    rows = [
        (
            "Files",
            f"{totals.done:,} to do, {already_done:,} already done, {totals.failures.count:,} unreadable",
        ),
        ("Lines", f"{totals.lines.read:,}, {totals.lines.rejected:,} of them to be rejected"),
        ("Pairs", f"{distinct:,} distinct"),
        ("Cost", f"at most {calls:,} calls to the model, {_duration(calls)} at one call a second"),
    ]
    rows += _skipped(totals)
    rows += _ignored(totals)
    return "".join(f"{name:<8} {text}\n" for name, text in rows) + "Dry run: nothing was written or asked.\n"


def write_failures(totals: Totals, *, program: str) -> None:
    """One line on standard error for each file that failed, as far as they are remembered."""
    for name, error in totals.failures.named.items():
        sys.stderr.write(printable(f"{program}: {name}: {' '.join(error.split())}") + "\n")
    if totals.failures.more:
        sys.stderr.write(f"{program}: and {totals.failures.more:,} more, named when they failed\n")


def write_summary_json(totals: Totals, path: str) -> None:
    """The totals for machines. Raises CommandError."""
    try:
        Path(path).write_text(json.dumps(totals.as_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"--summary-json {path}: {error.strerror}"
        raise CommandError(message) from error


def _hits(totals: Totals) -> str:
    if totals.hit_rate is None:
        return "hit rate not told by the target"
    return f"hit rate {totals.hit_rate:.1%}"


def _skipped(totals: Totals) -> list[tuple[str, str]]:
    """Rows for what was skipped though its output is not there."""
    rows = []
    if totals.archived:
        rows.append(
            (
                "Archived",
                f"{totals.archived:,} objects in cold storage were skipped; restore them and run again",
            )
        )
    if totals.missing:
        rows.append(("Missing", f"{totals.missing:,} objects were gone before they were read, and skipped"))
    return rows


def _ignored(totals: Totals) -> list[tuple[str, str]]:
    described = totals.listing.describe_ignored()
    return [("Ignored", f"{described} (by name)")] if described else []


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
