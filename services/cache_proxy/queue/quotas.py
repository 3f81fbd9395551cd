"""The file of quotas: how much of the model each caller may have, and how much of the queue.

    {"callers": {"pricing": {"pairs_per_second": 50, "queued_pairs": 1000}, "search": {}},
     "others": {"pairs_per_second": 100}}

A caller that it names has an account of its own. All whom it does not name share one, `others`, if the file
has that: a name may be made up, and so that gets nobody more than a share of that one. Without `others` they
are bound by nothing.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from services.common.errors import UsageError
from services.common.file_reload import read_file

_FLAG_NAME = "--caller-quotas-file"
_MAX_NAME_LENGTH = 255  # characters of a caller's that a certificate or a token names
_MAX_CALLERS = 1000  # each is a turn of its own in every call to the model
_MAX_VALUE = 1e9
_MIN_RATE = 1e-6  # a pair in eleven days; at a rate of almost nothing the wait for one is no number
DEFAULT_ACCOUNT = ""
"""The account of those whom the file does not name: no caller's name is empty."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What an account may have, of all replicas together; 0: as much as there is."""

    account: str
    pairs_per_second: float = 0.0
    queued_pairs: int = 0


@dataclass(frozen=True, slots=True)
class Quotas:
    """Who may have how much."""

    callers: Mapping[str, Quota] = field(default_factory=dict)
    others: Quota | None = None

    def for_caller(self, caller: str) -> Quota | None:
        """The quota of a caller; None: it is bound by nothing but its turn."""
        return self.callers.get(caller, self.others)

    def for_account(self, name: str) -> Quota:
        """What an account may have; as much as there is, if the file has it no more."""
        found = self.others if name == DEFAULT_ACCOUNT else self.callers.get(name)
        return found or Quota(name)


NO_QUOTAS = Quotas()
QuotaProvider = Callable[[], Quotas]
"""The quotas as they are by now; the same object as long as they are the same."""


def no_quotas() -> Quotas:
    """Where there is no file."""
    return NO_QUOTAS


def read_quotas(path: str) -> Quotas:
    """What the file says. Raises UsageError, with one line that names the place."""
    content = read_file(path, flag_name=_FLAG_NAME)
    try:
        found = _decode(content, _File)
        _check_names(found.callers)
        callers = {
            name: _parse_quota(name, item, f"callers: {name!r}") for name, item in found.callers.items()
        }
        others = (
            None if bytes(found.others) == b"null" else _parse_quota(DEFAULT_ACCOUNT, found.others, "others")
        )
    except _InvalidFileError as error:
        message = f"{_FLAG_NAME} {path}: {error}"
        raise UsageError(message) from error
    return Quotas(callers, others)


class _InvalidFileError(Exception):
    """Why the file cannot be meant."""


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
