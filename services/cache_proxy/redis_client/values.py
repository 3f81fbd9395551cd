"""Numbers as they are read from Redis, where anybody who may write can have put anything."""

import math

_MAX_DIGITS = 40


def read_number(value: object, *, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
    """Return the finite number in range that `value` (bytes, int or float) stands for, or None."""
    if isinstance(value, bytes) and len(value) > _MAX_DIGITS:
        return None
    if not isinstance(value, bytes | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and minimum <= number <= maximum else None


def read_integer(value: object, *, minimum: int, maximum: int) -> int | None:
    """Return the integer that `value` (bytes or int) stands for in decimal digits, or None."""
    if isinstance(value, bytes):
        digits = value.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > _MAX_DIGITS:
            return None
    elif not isinstance(value, int) or isinstance(value, bool):
        return None
    number = int(value)
    return number if minimum <= number <= maximum else None
