"""Parse and format durations (`250ms`, `30s`, `5m`, `7d`) and sizes (`64MiB`)."""

import re

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([A-Za-z]*)", re.ASCII)


def parse_duration_seconds(text: str) -> float:
    """Return the seconds of a duration. `0` needs no unit. Raises ValueError."""
    number, unit = _parse_quantity(text)
    if unit == "" and number == 0:
        return 0.0
    if unit not in _SECONDS:
        message = f"{text!r} is not a duration such as 250ms, 30s, 5m, 24h or 7d"
        raise ValueError(message)
    return number * _SECONDS[unit]


def parse_size_bytes(text: str) -> int:
    """Return the bytes of a size. A number without unit means bytes. Raises ValueError."""
    number, unit = _parse_quantity(text)
    if unit not in _BYTES or number * _BYTES[unit] != int(number * _BYTES[unit]):
        message = f"{text!r} is not a size such as 4096, 512KiB or 64MiB"
        raise ValueError(message)
    return int(number * _BYTES[unit])


def format_size(size_bytes: int) -> str:
    """Return a size as text, in the largest unit that gives a whole number."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _BYTES[unit] == 0:
            return f"{size_bytes // _BYTES[unit]} {unit}"
    return f"{size_bytes} bytes"


def _parse_quantity(text: str) -> tuple[float, str]:
    found = _QUANTITY.fullmatch(text.strip())
    return (float(found[1]), found[2]) if found else (-1.0, "?")
