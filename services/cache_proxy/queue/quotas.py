"""The quota file: the rate at which each caller's pairs are sent to the model, and its share of the queue.

    {"callers": {"pricing": {"pairs_per_second": 50, "queued_pairs": 1000}, "search": {}},
     "others": {"pairs_per_second": 100}}

Each caller under `callers` has a separate account. All other callers share one account, with the limits of
`others`: a caller may send any name, and would otherwise get a quota for each name that it makes up. Without
`others` they have no quota.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from services.common.errors import UsageError
from services.common.file_reload import read_file

_FLAG_NAME = "--caller-quotas-file"

# In characters, as for callers that a certificate or a token names.
_MAX_NAME_LENGTH = 255

# Each account takes a turn in every call to the model.
_MAX_CALLERS = 1000

_MAX_VALUE = 1e9

# A pair in eleven days. At still lower rates the wait for a pair overflows.
_MIN_RATE = 1e-6

DEFAULT_ACCOUNT = ""
"""The account of all callers that the file does not name. A caller's name is never empty."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one account over all replicas; 0 means no limit."""

    account: str
    pairs_per_second: float = 0.0
    queued_pairs: int = 0


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of all callers."""

    callers: Mapping[str, Quota] = field(default_factory=dict)
    others: Quota | None = None

    def for_caller(self, caller: str) -> Quota | None:
        """Return the quota of a caller, None if it has none."""
        return self.callers.get(caller, self.others)

    def for_account(self, name: str) -> Quota:
        """Return the quota of an account, one without limits if the file has no such account any more."""
        found = self.others if name == DEFAULT_ACCOUNT else self.callers.get(name)
        return found or Quota(name)


NO_QUOTAS = Quotas()
QuotaProvider = Callable[[], Quotas]
"""Returns the current quotas: the same object until the file changes."""


def no_quotas() -> Quotas:
    """Return the quotas of a proxy without a quota file."""
    return NO_QUOTAS


def read_quotas(path: str) -> Quotas:
    """Return the quotas in a file. Raises `UsageError` with one line that names the invalid entry."""
    content = read_file(path, flag_name=_FLAG_NAME)
    try:
        found = _decode(content, _File)
        _check_names(found.callers)
        callers = {
            name: _parse_quota(name, item, f"callers: {name!r}") for name, item in found.callers.items()
        }
        others = None
        if bytes(found.others) != b"null":
            others = _parse_quota(DEFAULT_ACCOUNT, found.others, "others")
    except _InvalidFileError as error:
        message = f"{_FLAG_NAME} {path}: {error}"
        raise UsageError(message) from error
    return Quotas(callers, others)


class _InvalidFileError(Exception):
    """The file has another form than a quota file."""


class _QuotaEntry(msgspec.Struct, forbid_unknown_fields=True):
    pairs_per_second: Annotated[float, msgspec.Meta(ge=_MIN_RATE, le=_MAX_VALUE)] | None = None
    queued_pairs: Annotated[int, msgspec.Meta(gt=0, le=int(_MAX_VALUE))] | None = None


_NULL = msgspec.Raw(b"null")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    callers: dict[str, msgspec.Raw] = {}
    others: msgspec.Raw = _NULL


def _check_names(names: Collection[str]) -> None:
    if len(names) > _MAX_CALLERS:
        message = f"it names {len(names)} callers, the limit is {_MAX_CALLERS}"
        raise _InvalidFileError(message)
    for name in names:
        if not (name.isprintable() and 0 < len(name) <= _MAX_NAME_LENGTH):
            message = (
                f"callers: {name[:80]!r} is no caller's name: 1 to {_MAX_NAME_LENGTH} printable characters"
            )
            raise _InvalidFileError(message)


def _parse_quota(account: str, item: msgspec.Raw, location: str) -> Quota:
    try:
        found = _decode(bytes(item), _QuotaEntry)
    except _InvalidFileError as error:
        message = f"{location}: {error}"
        raise _InvalidFileError(message) from error
    return Quota(account, found.pairs_per_second or 0.0, found.queued_pairs or 0)


def _decode(content: bytes, target_type: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=target_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise _InvalidFileError(message) from error
