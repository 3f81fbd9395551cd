"""Check the flags that limit memory for reading: `--max-line-bytes` and `--max-zstd-window`."""

from services.common.errors import UsageError
from services.common.units import format_size

_MIN_LINE_BYTES = 2**10
_MAX_LINE_BYTES = 2**30
# The limits of zstd itself.
_MIN_WINDOW_BYTES = 2**10
_MAX_WINDOW_BYTES = 2**31


def check_limits(max_line_bytes: int, max_zstd_window_bytes: int) -> None:
    """Raise UsageError if one of the two is out of range."""
    for name, value, low, high in (
        ("--max-line-bytes", max_line_bytes, _MIN_LINE_BYTES, _MAX_LINE_BYTES),
        ("--max-zstd-window", max_zstd_window_bytes, _MIN_WINDOW_BYTES, _MAX_WINDOW_BYTES),
    ):
        if not low <= value <= high:
            message = (
                f"{name}: {format_size(value)} is out of range "
                f"(must be from {format_size(low)} to {format_size(high)})"
            )
            raise UsageError(message)
