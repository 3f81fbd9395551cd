"""INPUT that holds nothing to augment: why, in one line."""

import logging

from services.augmenter.stats import Totals
from services.common.codec import NAMES
from services.common.storage.protocol import Store

_log = logging.getLogger("augmenter")


async def reason(source: Store, totals: Totals) -> str:
    """Return why nothing was found, "" if something was, of any shard. Raises UsageError."""
    if totals.listing.files:
        return ""
    hint = await source.hint()
    ignored = totals.listing.describe_ignored()
    why = f"no name ends in one of {NAMES}; ignored: {ignored}" if ignored else f"no file is there; {hint}"
    return f"{source.place('')}: nothing to augment: {why.removesuffix('; ')}"


async def warn(source: Store, totals: Totals) -> None:
    """Log it, for a run that waits for files. Raises UsageError."""
    if why := await reason(source, totals):
        _log.warning("%s; waiting for files", why)
