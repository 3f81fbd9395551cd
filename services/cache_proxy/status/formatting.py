"""Format numbers of the status page for people. None means unknown and is shown as a word."""

import math
import time

_UNKNOWN = "unknown"
_NONE = "\u2013"
_THOUSAND = 1000
_MINUTE = 60
_HOUR = 3600
_DAY = 86_400
_ABBREVIATE_FROM = 10_000_000
_SHORT_SECONDS = 10
_AT_ONCE_SECONDS = 0.05


def format_count(value: int | None) -> str:
    """Format a count, as in 1,256,110, and from ten million on as in 12.6 M."""
    if value is None:
        return _UNKNOWN
    if value < _ABBREVIATE_FROM:
        return f"{value:,}"
    units = iter("MGTP")
    unit = next(units)
    scaled = value / _THOUSAND**2
    while scaled >= _THOUSAND:
        scaled /= _THOUSAND
        unit = next(units)
    return f"{scaled:.1f}\u00a0{unit}"


def format_quantity(value: int, noun: str) -> str:
    """Format a count with its noun, as in 1 pair or 2 pairs."""
    return f"{format_count(value)}\u00a0{noun}{'' if value == 1 else 's'}"


def format_percent(share: float | None, *, digits: int = 1) -> str:
    """Format a share as a percentage, without the sign.

    It is rounded down, so that only a whole is 100. A share above 0 that would round to 0 is <0.1.
    """
    if share is None:
        return _NONE
    step = 10**digits
    if 0 < share * 100 * step < 1:
        return f"<{1 / step:.{digits}f}"
    return f"{math.floor(share * 100 * step + 1e-6) / step:.{digits}f}"


def format_duration(seconds: float | None) -> str:
    """Format a duration, as in at once, 0.4 s, 12 s, 3 min 20 s, 2 h 5 min or 3 d 4 h."""
    if seconds is None:
        return _UNKNOWN
    if seconds < _AT_ONCE_SECONDS:
        return "at once"
    if seconds < _SHORT_SECONDS:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    for unit, name, smaller_unit, smaller_name in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // smaller_unit
            return f"{whole // unit:,}\u00a0{name}" + (f" {rest}\u00a0{smaller_name}" if rest else "")
    return f"{whole}\u00a0s"


def format_ago(seconds: float) -> str:
    """Format how long ago something was, with a precision of ten seconds."""
    return "just now" if seconds < 2 * _SHORT_SECONDS else f"{format_duration(seconds)} ago"


def format_clock(at_seconds: float) -> str:
    """Format a Unix time as a time of day in UTC, as in 15:42:07."""
    return time.strftime("%H:%M:%S", time.gmtime(at_seconds))
