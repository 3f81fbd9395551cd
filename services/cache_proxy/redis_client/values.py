"""Parse numbers read from Redis, where any client with write access can have stored anything."""

import math

_MAX_DIGITS = 40


def read_number(value: object, *, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
    """Return `value` (bytes, int or float) as a number, or None if it is not finite or out of range."""
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
    """Return `value` (decimal digits in bytes, or an int) as an integer, or None if it is out of range."""
    if isinstance(value, bytes):
        digits = value.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > _MAX_DIGITS:
            return None
    elif not isinstance(value, int) or isinstance(value, bool):
        return None
    number = int(value)
    return number if minimum <= number <= maximum else None
