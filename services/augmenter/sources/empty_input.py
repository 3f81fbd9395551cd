"""INPUT that holds nothing to augment: why, in one line."""

import logging

from services.augmenter.stats import RunStats
from services.common.codec import SUFFIX_HELP
from services.common.storage.protocol import Storage

_log = logging.getLogger("augmenter")


async def explain_empty_input(source: Storage, stats: RunStats) -> str:
    """Return why nothing was found, "" if something was, of any shard. Raises UsageError."""
    if stats.input_names.files:
        return ""
    hint = await source.explain_empty()
    ignored = stats.input_names.describe_ignored()
    why = (
        f"no name ends in one of {SUFFIX_HELP}; ignored: {ignored}"
        if ignored
        else f"no file is there; {hint}"
    )
    return f"{source.uri('')}: nothing to augment: {why.removesuffix('; ')}"


async def warn_if_empty(source: Storage, stats: RunStats) -> None:
    """Log it, for a run that waits for files. Raises UsageError."""
    if why := await explain_empty_input(source, stats):
        _log.warning("%s; waiting for files", why)
