"""Shorten the log lines of botocore about credentials."""

import logging
import time

from services.common.aws_errors import error_reason

_REPEAT_INTERVAL_SECONDS = 600.0


def shorten_credential_logs() -> None:
    """Log in one line, once and without a traceback, why credentials could not be refreshed."""
    for name in ("botocore", "aiobotocore"):
        for module in ("credentials", "tokens", "utils"):
            logger = logging.getLogger(f"{name}.{module}")
            if not any(isinstance(known, _CredentialErrorFilter) for known in logger.filters):
                logger.addFilter(_CredentialErrorFilter())


class _CredentialErrorFilter(logging.Filter):
    """Suppresses repeated lines: a failed refresh is logged with every request for a quarter of an hour.

    State: `_last_message`; `_repeat_at`, from when on it may be logged again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_message = ""
        self._repeat_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
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
