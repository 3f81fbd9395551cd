"""Read the allow-list of callers: their names, and how each is identified. It holds tokens as hashes only.

The file has one entry a line, and `#` begins a comment:

    NAME sha256:HEX     by a bearer token with this SHA-256; a name may have several tokens, one a line
    NAME certificate    by a client certificate with this name
    NAME denied         never, whatever other lines state
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
# Tokens are looked up by a hash with a key of this process, so that the time of a lookup reveals nothing
# about how close a guess is.
_LOOKUP_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class CallerList:
    """Names by the keyed hash of a token, names identified by a certificate, and names that are denied."""

    by_token: dict[bytes, str]
    by_certificate: frozenset[str]
    denied: frozenset[str]

    def name_for_token(self, token: str) -> str | None:
        """Return the name that this token identifies, None if it is unknown."""
        digest = hashlib.sha256(token.encode(errors="backslashreplace")).digest()
        return self.by_token.get(_keyed_digest(digest))


def watch_caller_list(
    path: str, *, on_reload: Callable[[ReloadResult], None] = lambda _: None
) -> ReloadingFile[CallerList]:
    """Read the list, and reload it when the file changes. Raise UsageError if the file is invalid."""
    return ReloadingFile([path], lambda: _parse(path), on_reload=on_reload)


def _parse(path: str) -> CallerList:
    by_token: dict[bytes, str] = {}
    by_certificate: set[str] = set()
    denied: set[str] = set()
    for number, line in enumerate(read_file(path, flag_name=_FLAG).splitlines(), start=1):
        fields = line.partition(b"#")[0].decode(errors="replace").split()
        if not fields:
            continue
        # A line has a name and how the name is identified.
        name, identified_by = fields if len(fields) == 2 else ("", "")  # noqa: PLR2004
        hash_match = _TOKEN_HASH_PATTERN.fullmatch(identified_by)
        token = _keyed_digest(bytes.fromhex(hash_match[1])) if hash_match else b""
        if not _NAME_PATTERN.fullmatch(name) or not (
            hash_match or identified_by in {"certificate", "denied"}
        ):
            # The message does not quote the line, which may hold a token that was not hashed.
            message = f"{_FLAG} {path}: line {number} is not NAME sha256:HEX, NAME certificate or NAME denied"
            raise UsageError(message)
        if identified_by == "certificate":
            by_certificate.add(name)
        elif identified_by == "denied":
            denied.add(name)
        elif by_token.setdefault(token, name) != name:
            message = f"{_FLAG} {path}: line {number} has the token of {by_token[token]}"
            raise UsageError(message)
    if not by_token and not by_certificate:
        message = f"{_FLAG} {path}: it admits no caller"
        raise UsageError(message)
    return CallerList(by_token, frozenset(by_certificate), frozenset(denied))


def _keyed_digest(digest: bytes) -> bytes:
    return hashlib.blake2b(digest, key=_LOOKUP_KEY, digest_size=32).digest()
