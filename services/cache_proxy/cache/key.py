"""From a pair to its key: normal form, then a keyed hash.

Two pairs share a key only if their normal forms are equal: both texts are length-prefixed before they
are hashed, and 128 bits of BLAKE2b leave a chance of 10^-24 that any two of 20 million collide.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence

DIGEST_BYTES = 16
_MAX_KEY_BYTES = 64

Digester = Callable[[str, str], bytes]
BatchDigester = Callable[[Sequence[bytes]], list[bytes]]
"""The same for many pairs: given company, title, company and so on, as UTF-8."""


def fold(text: str) -> str:
    """Compatibility-caseless form (Unicode 3.13, D146), white space collapsed: idempotent."""
    if text.isascii():  # the common case; NFKC leaves ASCII alone and casefold is lower
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


# What `fold` does to ASCII, byte by byte: all that str.split takes for white space is a space.
_ASCII_FOLD = bytes(
    ord(" ") if chr(code).isspace() else ord(chr(code).lower()) for code in range(128)
) + bytes(range(128, 256))


def _folded(text: str) -> bytes:
    if text.isascii():  # benchmarked: a quarter off the digest's time, against the same by way of str
        return b" ".join(text.encode().translate(_ASCII_FOLD).split())
    return fold(text).encode()


def _all_folded(texts: Sequence[bytes]) -> list[bytes]:
    """Of each what `_folded` gives, in a quarter of the time: all ASCII at once, NUL between texts."""
    joined = b"\0".join(texts)
    folded = joined.translate(_ASCII_FOLD)
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    found = folded.replace(b" \0", b"\0").replace(b"\0 ", b"\0").strip(b" ").split(b"\0")
    if len(found) != len(texts):  # one has a NUL of its own
        return [_folded(text.decode()) for text in texts]
    if not joined.isascii():
        for place, text in enumerate(texts):
            if not text.isascii():
                found[place] = _folded(text.decode())
    return found


NORMAL_FORMS: dict[str, Callable[[str], bytes]] = {"fold": _folded, "exact": str.encode}
_NORMAL_FORMS_OF_ALL: dict[str, Callable[[Sequence[bytes]], list[bytes]]] = {
    "fold": _all_folded,
    "exact": list,
}
NORMAL_FORM_VERSION = 1  # part of every key in the store: whoever changes a normal form changes this


def make_digester(*, normalize: str, secret: bytes | None) -> Digester:
    """A function from (company, title) to `DIGEST_BYTES` bytes; `secret` keeps others from aiming."""
    normal = NORMAL_FORMS[normalize]
    keyed = _keyed(secret)

    def digest(company: str, title: str) -> bytes:
        first = normal(company)
        hasher = keyed.copy()
        hasher.update(len(first).to_bytes(4, "little") + first + normal(title))
        return hasher.digest()

    return digest


def make_batch_digester(*, normalize: str, secret: bytes | None) -> BatchDigester:
    """A function that gives of each pair what `make_digester`'s does."""
    normal = _NORMAL_FORMS_OF_ALL[normalize]
    keyed = _keyed(secret)

    def digests(texts: Sequence[bytes]) -> list[bytes]:
        found: list[bytes] = []
        copy, add = keyed.copy, found.append
        normals = iter(normal(texts))
        for first, second in zip(normals, normals, strict=True):
            hasher = copy()
            hasher.update(len(first).to_bytes(4, "little") + first + second)
            add(hasher.digest())
        return found

    return digests


def fingerprint(secret: bytes | None) -> str:
    """By which a secret is known again, and nothing else is learnt of it."""
    hasher = hashlib.blake2b(key=_key_of(secret), digest_size=8, person=b"seniority-mark")
    return hasher.hexdigest() if secret else "none"


def _keyed(secret: bytes | None) -> "hashlib.blake2b":
    return hashlib.blake2b(key=_key_of(secret), digest_size=DIGEST_BYTES, person=b"seniority-pair")


def _key_of(secret: bytes | None) -> bytes:
    key = secret or b""
    return key if len(key) <= _MAX_KEY_BYTES else hashlib.blake2b(key).digest()
