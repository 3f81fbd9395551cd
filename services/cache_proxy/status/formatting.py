"""Figures as people read them. None, which is unknown, is said in words."""

import math
import time

_UNKNOWN, _NONE = "unknown", "\u2013"
_THOUSAND = 1000
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_ABBREVIATE_FROM = 10_000_000
_SHORT_SECONDS, _AT_ONCE_SECONDS = 10, 0.05


def format_count(value: int | None) -> str:
    """1,256,110; from ten million on 12.6 M."""
    if value is None:
        return _UNKNOWN
    if value < _ABBREVIATE_FROM:
        return f"{value:,}"
    units = iter("MGTP")
    scaled, unit = value / _THOUSAND**2, next(units)
    while scaled >= _THOUSAND:
        scaled, unit = scaled / _THOUSAND, next(units)
    return f"{scaled:.1f}\u00a0{unit}"


def format_quantity(value: int, noun: str) -> str:
    """1 pair, 2 pairs."""
    return f"{format_count(value)}\u00a0{noun}{'' if value == 1 else 's'}"


def format_percent(share: float | None, *, digits: int = 1) -> str:
    """Rounded towards zero, so that 100 % are all; what is little and not nothing is <0.1."""
    if share is None:
        return _NONE
    step = 10**digits
    if 0 < share * 100 * step < 1:
        return f"<{1 / step:.{digits}f}"
    return f"{math.floor(share * 100 * step + 1e-6) / step:.{digits}f}"


def format_duration(seconds: float | None) -> str:
    """At once, 0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return _UNKNOWN
    if seconds < _AT_ONCE_SECONDS:
        return "at once"
    if seconds < _SHORT_SECONDS:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    for unit, name, less, less_name in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // less
            return f"{whole // unit:,}\u00a0{name}" + (f" {rest}\u00a0{less_name}" if rest else "")
    return f"{whole}\u00a0s"


def format_ago(seconds: float) -> str:
    """How long ago, when ten seconds make no difference."""
    return "just now" if seconds < 2 * _SHORT_SECONDS else f"{format_duration(seconds)} ago"


def format_clock(at_seconds: float) -> str:
    """15:42:07, UTC."""
    return time.strftime("%H:%M:%S", time.gmtime(at_seconds))
