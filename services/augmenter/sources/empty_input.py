"""Explains why INPUT has nothing to augment, in one line."""

import logging

from services.augmenter.stats import RunStats
from services.common.codec import SUFFIX_HELP
from services.common.storage.protocol import Storage

_log = logging.getLogger(__name__)


async def explain_empty_input(source: Storage, stats: RunStats) -> str:
    """Return why no file was found, or "" if one was, in any shard. Raises UsageError."""
    if stats.input_names.files:
        return ""
    hint = await source.explain_empty()
    ignored = stats.input_names.describe_ignored()
    cause = (
        f"no name ends in one of {SUFFIX_HELP}; ignored: {ignored}"
        if ignored
        else f"no file is there; {hint}"
    )
    return f"{source.uri('')}: nothing to augment: {cause.removesuffix('; ')}"


async def warn_if_empty(source: Storage, stats: RunStats) -> None:
    """Log a warning that INPUT is empty, when the run waits for files. Raises UsageError."""
    if cause := await explain_empty_input(source, stats):
        _log.warning("%s; waiting for files", cause)
