"""What a log of calls proves: how often each pair was inferred, how full the calls were, and how paced."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """A call as the model saw it; `at` is unix seconds."""

    unix_seconds: float
    code: str
    pairs: tuple[tuple[str, str], ...]


def read_calls(log: Path) -> list[LoggedCall]:
    """The calls in the order in which they came; a line that is being written is none yet."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    calls = [LoggedCall(line["at"], line["code"], tuple(map(tuple, line["pairs"]))) for line in lines]
    return sorted(calls, key=lambda call: call.unix_seconds)


def count_inferences(calls: Sequence[LoggedCall]) -> Counter[tuple[str, str]]:
    """How often each pair was sent."""
    return Counter(pair for call in calls for pair in call.pairs)


def inferences_per_pair(calls: Sequence[LoggedCall]) -> float:
    """Inferences for each pair that was sent at all: 1.0 is what no system can be better than."""
    sent = count_inferences(calls)
    return sent.total() / len(sent) if sent else 0.0


def fill_ratio(calls: Sequence[LoggedCall], batch_pairs: int) -> float:
    """The share of the places in these calls that held a pair."""
    return sum(len(call.pairs) for call in calls) / (len(calls) * batch_pairs) if calls else 0.0


def max_limit_excess_seconds(
    calls: Sequence[LoggedCall], *, pairs_per_second: float, calls_per_second: float
) -> tuple[float, float]:
    """The most seconds by which any window of the log is too short: for its calls, and for its pairs.

    A window may hold `calls * T + 1` calls and `rate * T + one batch` pairs, where `rate` is the lesser of
    rate and calls x batch; so n calls after a first may come n intervals after it at the earliest.
    """
    late_calls, late_pairs = 0.0, 0.0
    for first, opening in enumerate(calls):
        pairs = 0
        for further, call in enumerate(calls[first + 1 :], start=1):
            pairs += len(call.pairs)
            lasts = call.unix_seconds - opening.unix_seconds
            if calls_per_second:
                late_calls = max(late_calls, further / calls_per_second - lasts)
            late_pairs = max(late_pairs, pairs / pairs_per_second - lasts)
    return late_calls, late_pairs


def rate_utilization(calls: Sequence[LoggedCall], *, pairs_per_second: float) -> float:
    """The share of the rate that a backlog used: pairs after the first call, over the time they had."""
    lasts = calls[-1].unix_seconds - calls[0].unix_seconds
    return sum(len(call.pairs) for call in calls[1:]) / (lasts * pairs_per_second)
