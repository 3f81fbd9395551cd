"""The library's own lines about credentials, shortened."""

import logging
import time

from services.common.aws_errors import reason_of

_REPEAT_SECONDS = 600.0


def keep_logs_short() -> None:
    """Log why credentials could not be refreshed in one line, without the library's own stack, and once."""
    for name in ("botocore", "aiobotocore"):
        for module in ("credentials", "tokens", "utils"):
            logger = logging.getLogger(f"{name}.{module}")
            if not any(isinstance(known, _InOneLine) for known in logger.filters):
                logger.addFilter(_InOneLine())


class _InOneLine(logging.Filter):
    """State: `_last`, the last line, and `_again_at`, when it may be logged again.

    The library logs a failed refresh with every request, for a quarter of an hour before it is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._again_at = 0.0

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
        record.msg, record.args = f"{record.getMessage().rstrip('.')}: {reason_of(error)}", ()
        record.exc_info = None
        now = time.monotonic()
        if is_raised or (record.msg == self._last and now < self._again_at):
            return False
        self._last, self._again_at = record.msg, now + _REPEAT_SECONDS
        return True
