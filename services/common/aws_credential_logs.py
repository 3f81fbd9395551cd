"""The library's own lines about credentials, shortened."""

import logging
import time

from services.common.aws_errors import error_reason

_REPEAT_INTERVAL_SECONDS = 600.0


def shorten_credential_logs() -> None:
    """Log why credentials could not be refreshed in one line, without the library's own stack, and once."""
    for name in ("botocore", "aiobotocore"):
        for module in ("credentials", "tokens", "utils"):
            logger = logging.getLogger(f"{name}.{module}")
            if not any(isinstance(known, _CredentialErrorFilter) for known in logger.filters):
                logger.addFilter(_CredentialErrorFilter())


class _CredentialErrorFilter(logging.Filter):
    """State: `_last`, the last line, and `_again_at`, when it may be logged again.

    The library logs a failed refresh with every request, for a quarter of an hour before it is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_message = ""
        self._repeat_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be logged."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        is_raised = "mandatory" in (record.args or ())
        if is_raised:
            error.add_note("credentials could not be refreshed")
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            return True
        record.msg, record.args = f"{record.getMessage().rstrip('.')}: {error_reason(error)}", ()
        record.exc_info = None
        now = time.monotonic()
        if is_raised or (record.msg == self._last_message and now < self._repeat_at):
            return False
        self._last_message, self._repeat_at = record.msg, now + _REPEAT_INTERVAL_SECONDS
        return True
