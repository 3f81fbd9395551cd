"""Text that others chose, such as names of files, as one line of a log or a terminal."""


def escape_unprintable(text: str) -> str:
    """Return the text with line ends and control characters escaped, so that it is one line."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
