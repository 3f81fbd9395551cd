"""The list of who may call: names, and how each is known. Tokens are in it as hashes only.

One line each, `#` begins a comment:

    NAME sha256:HEX     by a bearer token with this SHA-256; several lines give a name several tokens
    NAME certificate    by a certificate with this name
    NAME denied         by no means, whatever other lines say
"""

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import UsageError
from services.common.file_reload import ReloadingFile, ReloadResult, read_file

_FLAG = "--caller-tokens-file"
MAX_NAME_LENGTH = 255
_NAME_PATTERN = re.compile(rf"[\x21-\x7e]{{1,{MAX_NAME_LENGTH}}}")
_TOKEN_HASH_PATTERN = re.compile(r"sha256:([0-9a-f]{64})")
# Looked up under a key of this process alone: how long a look-up takes tells nobody how near a guess was.
_LOOKUP_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class CallerList:
    """Names by their token's keyed hash; those known by a certificate; those that are denied."""

    by_token: dict[bytes, str]
    by_certificate: frozenset[str]
    denied: frozenset[str]

    def name_for_token(self, token: str) -> str | None:
        """The name of whoever has it."""
        return self.by_token.get(
            _keyed_digest(hashlib.sha256(token.encode(errors="backslashreplace")).digest())
        )


def watch_caller_list(
    path: str, *, on_reload: Callable[[ReloadResult], None] = lambda _: None
) -> ReloadingFile[CallerList]:
    """The list, now and later. Raises UsageError."""
    return ReloadingFile([path], lambda: _parse(path), on_reload=on_reload)


def _parse(path: str) -> CallerList:
    by_token: dict[bytes, str] = {}
    by_certificate: set[str] = set()
    denied: set[str] = set()
    for number, line in enumerate(read_file(path, flag_name=_FLAG).splitlines(), start=1):
        words = line.partition(b"#")[0].decode(errors="replace").split()
        if not words:
            continue
        name, how = words if len(words) == 2 else ("", "")  # noqa: PLR2004 - a name and how it is known
        found = _TOKEN_HASH_PATTERN.fullmatch(how)
        token = _keyed_digest(bytes.fromhex(found[1])) if found else b""
        if not _NAME_PATTERN.fullmatch(name) or not (found or how in {"certificate", "denied"}):
            # Without the line itself: it may hold a token that was not hashed.
            message = f"{_FLAG} {path}: line {number} is not NAME sha256:HEX, NAME certificate or NAME denied"
            raise UsageError(message)
        if how == "certificate":
            by_certificate.add(name)
        elif how == "denied":
            denied.add(name)
        elif by_token.setdefault(token, name) != name:
            message = f"{_FLAG} {path}: line {number} has the token of {by_token[token]}"
            raise UsageError(message)
    if not by_token and not by_certificate:
        message = f"{_FLAG} {path}: it lets nobody in"
        raise UsageError(message)
    return CallerList(by_token, frozenset(by_certificate), frozenset(denied))


def _keyed_digest(digest: bytes) -> bytes:
    return hashlib.blake2b(digest, key=_LOOKUP_KEY, digest_size=32).digest()
