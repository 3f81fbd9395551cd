"""What has just ended: answers for a minute, refusals for ten, nonsense that comes again for a while."""

from collections import OrderedDict

from services.cache_proxy.errors import Nonsense, Refused
from services.cache_proxy.queue.interface import NONSENSE_SECONDS, Outcome

_ANSWER_SECONDS = 60.0
_REFUSAL_SECONDS = 600.0  # each time a refused pair is asked again, it costs the batch that it is in
_MAX_ANSWERS = 200_000
_MAX_ERRORS = 20_000


class _Kept:
    """Outcomes of one kind, kept so long; the oldest go first."""

    def __init__(self, *, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._ends: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        self._ends[digest] = (outcome, now + self._seconds)
        self._ends.move_to_end(digest)
        while len(self._ends) > self._most or next(iter(self._ends.values()))[1] < now:
            self._ends.popitem(last=False)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        outcome, until = self._ends.get(digest, (None, 0.0))
        return outcome if until >= now else None

    def remove(self, digest: bytes) -> None:
        self._ends.pop(digest, None)

    def clear(self) -> None:
        self._ends.clear()


class Recent:
    """Bounded in time and number.

    Nonsense may have been a whim of the model's, so whoever comes back at once is asked for again; but what
    is nonsense again and again is remembered, each time twice as long, or it would be in every batch.
    """

    def __init__(self) -> None:
        self._answers = _Kept(seconds=_ANSWER_SECONDS, most=_MAX_ANSWERS)
        self._refusals = _Kept(seconds=_REFUSAL_SECONDS, most=_MAX_ERRORS)
        self._nonsense: OrderedDict[bytes, tuple[int, Nonsense, float]] = OrderedDict()  # times, what, at

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        """Keep how a pair ended."""
        if isinstance(outcome, Nonsense):
            self._add_nonsense(digest, outcome, now)
        else:
            kept = self._refusals if isinstance(outcome, Refused) else self._answers
            kept.add(digest, outcome, now=now)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        """How it ended, if that was lately."""
        outcome = self._answers.get(digest, now=now) or self._refusals.get(digest, now=now)
        if outcome is None and digest in self._nonsense:
            times, nonsense, at = self._nonsense[digest]
            return nonsense if now < at + _remembered_seconds(times) else None
        return outcome

    def remove(self, digest: bytes) -> None:
        """Keep its answer no longer."""
        self._answers.remove(digest)

    def clear(self) -> None:
        """Keep no answer."""
        self._answers.clear()

    def _add_nonsense(self, digest: bytes, nonsense: Nonsense, now: float) -> None:
        times, _, at = self._nonsense.get(digest, (0, nonsense, now))
        self._nonsense[digest] = (times + 1 if now - at <= 2 * _ANSWER_SECONDS else 1, nonsense, now)
        self._nonsense.move_to_end(digest)
        if len(self._nonsense) > _MAX_ERRORS:
            self._nonsense.popitem(last=False)


def _remembered_seconds(times: int) -> float:
    return min(_ANSWER_SECONDS, NONSENSE_SECONDS * 2 ** (min(times, 10) - 2)) if times > 1 else 0.0
