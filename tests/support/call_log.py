"""Analysis of the model stub's call log: repeated inferences, how full calls are, and rate limits."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """A call that the model received."""

    unix_seconds: float
    code: str
    pairs: tuple[tuple[str, str], ...]


def read_calls(log: Path) -> list[LoggedCall]:
    """Return the calls in the order in which they arrived. An incomplete last line is ignored."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    calls = [LoggedCall(line["at"], line["code"], tuple(map(tuple, line["pairs"]))) for line in lines]
    return sorted(calls, key=lambda call: call.unix_seconds)


def count_inferences(calls: Sequence[LoggedCall]) -> Counter[tuple[str, str]]:
    """Return how often each pair was sent."""
    return Counter(pair for call in calls for pair in call.pairs)


def inferences_per_pair(calls: Sequence[LoggedCall]) -> float:
    """Return the average number of inferences of a pair. 1.0 is the optimum."""
    counts = count_inferences(calls)
    return counts.total() / len(counts) if counts else 0.0


def fill_ratio(calls: Sequence[LoggedCall], batch_pairs: int) -> float:
    """Return the average size of a call as a fraction of the batch size."""
    return sum(len(call.pairs) for call in calls) / (len(calls) * batch_pairs) if calls else 0.0


def max_limit_excess_seconds(
    calls: Sequence[LoggedCall], *, pairs_per_second: float, calls_per_second: float
) -> tuple[float, float]:
    """Return by how many seconds calls came too early, at most: by the call limit and by the pair limit.

    A window of T seconds may hold `calls * T + 1` calls and `rate * T + one batch` pairs, where `rate` is the
    lower of the pair rate and calls x batch. Hence the n-th call after another one may come n intervals after
    it at the earliest.
    """
    calls_excess, pairs_excess = 0.0, 0.0
    for first, opening in enumerate(calls):
        pairs = 0
        for further, call in enumerate(calls[first + 1 :], start=1):
            pairs += len(call.pairs)
            window_seconds = call.unix_seconds - opening.unix_seconds
            if calls_per_second:
                calls_excess = max(calls_excess, further / calls_per_second - window_seconds)
            pairs_excess = max(pairs_excess, pairs / pairs_per_second - window_seconds)
    return calls_excess, pairs_excess


def rate_utilization(calls: Sequence[LoggedCall], *, pairs_per_second: float) -> float:
    """Return the fraction of the rate limit that was used between the first and the last call."""
    window_seconds = calls[-1].unix_seconds - calls[0].unix_seconds
    return sum(len(call.pairs) for call in calls[1:]) / (window_seconds * pairs_per_second)
