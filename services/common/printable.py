"""Escape text of unknown origin, such as file names, for a log line or a terminal."""


def escape_unprintable(text: str) -> str:
    """Return the text with line ends and control characters escaped, so that it is one line."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
