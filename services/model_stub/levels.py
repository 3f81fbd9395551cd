"""The level that the stub infers: a pure function of the pair."""

import hashlib
import unicodedata

from services.common.levels import MAX_LEVEL, MIN_LEVEL

_DEFAULT_BASE = 3
_BASE_BY_WORD = {
    1: ("intern", "internship", "trainee", "apprentice", "student", "praktikant", "werkstudent"),
    2: ("junior", "jr", "graduate", "grad", "entry", "assistant", "associate", "clerk"),
    4: ("senior", "sr", "specialist", "expert"),
    5: ("lead", "principal", "staff", "manager", "architect", "supervisor"),
    6: ("director", "head", "vp", "leiter", "partner"),
    7: ("chief", "ceo", "cto", "cfo", "coo", "president", "founder"),
}
_BASES = {word: base for base, words in _BASE_BY_WORD.items() for word in words}


def infer_level(company: str, title: str) -> int:
    """Return the level, 1 to 7: the highest-ranking word of the title gives a base, the company shifts it.

    Case, width and spacing of either text never matter.
    """
    words = "".join(char if char.isalnum() else " " for char in fold(title)).split()
    base = max((_BASES[word] for word in words if word in _BASES), default=_DEFAULT_BASE)
    shift = hashlib.sha256(fold(company).encode()).digest()[0] % 3 - 1
    return min(MAX_LEVEL, max(MIN_LEVEL, base + shift))


def fold(text: str) -> str:
    """Return the text without differences of case, width and spacing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())
