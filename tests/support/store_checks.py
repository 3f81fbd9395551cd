"""What callers of a proxy and its metrics show about its store."""

import time

from tests.support.caller import Caller, make_pairs, read_metrics
from tests.support.model_server import scripted_level
from tests.support.processes import ServiceProcess


def infer_new_pairs(caller: Caller, company: str, *, count: int = 20) -> float:
    """Request new pairs, check that the model answered them, and return the seconds that it took."""
    pairs = make_pairs(company, count)
    started_at = time.monotonic()
    result = caller.infer(pairs, timeout_seconds=30)
    seconds = time.monotonic() - started_at
    assert result.levels == [scripted_level(*pair) for pair in pairs], (result.code, result.message)
    assert result.misses == len(pairs)
    return seconds


def is_store_up(proxy: ServiceProcess) -> bool:
    """Return whether the store of a proxy replied to its last operation."""
    return read_metrics(proxy.http_url)["cache_proxy_store_up",] == 1


def has_stored_answers(proxy: ServiceProcess) -> bool:
    """Return whether a proxy has written answers; callers get them before they are written."""
    return read_metrics(proxy.http_url).get(("cache_proxy_store_duration_seconds_count", "put"), 0) > 0
