"""Cold storage: whether an object can be read, by what a listing or a HEAD answers about it.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/archived-objects.html
"""

from typing import Any

_COLD_CLASSES = {"GLACIER", "DEEP_ARCHIVE"}  # GLACIER_IR is read like any other


def is_archived(answer: Any) -> bool:
    """Return whether the object must be restored before it can be read.

    A HEAD knows the archive tiers of INTELLIGENT_TIERING and whether an object is restored; a listing knows
    neither, as a rule.
    """
    is_cold = answer.get("StorageClass") in _COLD_CLASSES or "ArchiveStatus" in answer
    return is_cold and not _is_restored(answer)


def _is_restored(answer: Any) -> bool:
    in_listing = answer.get("RestoreStatus", {})
    if in_listing.get("RestoreExpiryDate") and not in_listing.get("IsRestoreInProgress"):
        return True
    return 'ongoing-request="false"' in answer.get("Restore", "")
