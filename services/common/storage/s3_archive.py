"""Detect objects in cold storage from the response to a listing or a HEAD request.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/archived-objects.html
"""

from typing import Any

# Objects of GLACIER_IR are read like any other.
_COLD_CLASSES = {"GLACIER", "DEEP_ARCHIVE"}


def is_archived(response: Any) -> bool:
    """Return whether the object must be restored before it can be read.

    A HEAD request returns the archive tiers of INTELLIGENT_TIERING and the state of a restore. A listing
    usually returns neither.
    """
    is_cold = response.get("StorageClass") in _COLD_CLASSES or "ArchiveStatus" in response
    return is_cold and not _is_restored(response)


def _is_restored(response: Any) -> bool:
    restore_status = response.get("RestoreStatus", {})
    if restore_status.get("RestoreExpiryDate") and not restore_status.get("IsRestoreInProgress"):
        return True
    return 'ongoing-request="false"' in response.get("Restore", "")
