"""Recognises objects in cold storage by the fields of a listing or a HEAD.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/archived-objects.html
"""

from typing import Any

# Objects of class GLACIER_IR can be read at any time.
_COLD_CLASSES = {"GLACIER", "DEEP_ARCHIVE"}


def is_archived(response: Any) -> bool:
    """Return whether the object must be restored before it can be read.

    A HEAD shows the archive tiers of INTELLIGENT_TIERING, and whether an object is restored. A listing
    usually shows neither.
    """
    is_cold = response.get("StorageClass") in _COLD_CLASSES or "ArchiveStatus" in response
    return is_cold and not _is_restored(response)


def _is_restored(response: Any) -> bool:
    restore_status = response.get("RestoreStatus", {})
    if restore_status.get("RestoreExpiryDate") and not restore_status.get("IsRestoreInProgress"):
        return True
    return 'ongoing-request="false"' in response.get("Restore", "")
