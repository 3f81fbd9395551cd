"""Keep secrets out of the process list, error messages and world-readable files."""

import logging
import re
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl

# Up to the last @: a password may contain others, and slashes.
_USERINFO = re.compile(r"(?<=://)[^\s'\"]*@")
_SECRET_PARAMETERS = {"password", "passwd", "secret", "token"}
_log = logging.getLogger(__name__)


def has_password(url: str) -> bool:
    """Return whether a URL (or a list of hosts after its scheme) contains a password."""
    address, _, query = url.partition("?")
    user = address.partition("://")[2].rpartition("@")[0]
    return ":" in user or any(name.lower() in _SECRET_PARAMETERS for name, _ in parse_qsl(query))


def strip_userinfo(text: str) -> str:
    """Return a text with user and password of its URLs replaced by `***`."""
    return _USERINFO.sub("***@", text)


@cache
def warn_if_world_readable(path: Path, *, flag_name: str) -> None:
    """Log a warning, once, if the file of a secret is world-readable."""
    # The file may have been replaced since it was read.
    with suppress(OSError):
        if not path.stat().st_mode & stat.S_IROTH:
            return
        _log.warning("%s %s: everybody on this machine may read it; chmod o-r", flag_name, path)
