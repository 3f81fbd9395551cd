"""Bearer tokens of callers, as a caller list holds them and as a caller sends them."""

import hashlib

CALLER_TOKENS = {name: f"s3cret-of-{name}" for name in ("pricing", "gone", "unknown", "the-proxy")}


def caller_list_line(name: str) -> str:
    """Return the line of a caller list that admits the caller with this token."""
    return f"{name} sha256:{hashlib.sha256(CALLER_TOKENS[name].encode()).hexdigest()}\n"


def bearer_metadata(name: str) -> list[tuple[str, str]]:
    """Return the metadata by which the caller sends its token."""
    return [("authorization", f"Bearer {CALLER_TOKENS[name]}")]
