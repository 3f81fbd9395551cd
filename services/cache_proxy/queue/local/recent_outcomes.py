"""What has just ended: answers for a minute, refusals for ten, nonsense that comes again for a while."""

from collections import OrderedDict

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import InvalidModelResponseError, PairRejectedError
from services.cache_proxy.queue.interface import INVALID_RESPONSE_TTL_SECONDS

_ANSWER_SECONDS = 60.0
_REJECTION_SECONDS = 600.0  # each time a refused pair is asked again, it costs the batch that it is in
_MAX_ANSWERS = 200_000
_MAX_ERRORS = 20_000


class _ExpiringOutcomes:
    """Outcomes of one kind, kept so long; the oldest go first."""

    def __init__(self, *, seconds: float, max_items: int) -> None:
        self._seconds = seconds
        self._max_items = max_items
        self._outcomes: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        self._outcomes[digest] = (outcome, now + self._seconds)
        self._outcomes.move_to_end(digest)
        while len(self._outcomes) > self._max_items or next(iter(self._outcomes.values()))[1] < now:
            self._outcomes.popitem(last=False)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        outcome, until = self._outcomes.get(digest, (None, 0.0))
        return outcome if until >= now else None

    def remove(self, digest: bytes) -> None:
        self._outcomes.pop(digest, None)

    def clear(self) -> None:
        self._outcomes.clear()


class RecentOutcomes:
    """Bounded in time and number.

    Nonsense may have been a whim of the model's, so whoever comes back at once is asked for again; but what
    is nonsense again and again is remembered, each time twice as long, or it would be in every batch.
    """

    def __init__(self) -> None:
        self._answers = _ExpiringOutcomes(seconds=_ANSWER_SECONDS, max_items=_MAX_ANSWERS)
        self._rejections = _ExpiringOutcomes(seconds=_REJECTION_SECONDS, max_items=_MAX_ERRORS)
        self._invalid_responses: OrderedDict[bytes, tuple[int, InvalidModelResponseError, float]] = (
            OrderedDict()
        )  # times, what, at

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        """Keep how a pair ended."""
        if isinstance(outcome, InvalidModelResponseError):
            self._add_invalid_response(digest, outcome, now)
        else:
            kept = self._rejections if isinstance(outcome, PairRejectedError) else self._answers
            kept.add(digest, outcome, now=now)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        """How it ended, if that was lately."""
        outcome = self._answers.get(digest, now=now) or self._rejections.get(digest, now=now)
        if outcome is None and digest in self._invalid_responses:
            times, nonsense, at = self._invalid_responses[digest]
            return nonsense if now < at + _retention_seconds(times) else None
        return outcome

    def remove(self, digest: bytes) -> None:
        """Keep its answer no longer."""
        self._answers.remove(digest)

    def clear(self) -> None:
        """Keep no answer."""
        self._answers.clear()

    def _add_invalid_response(self, digest: bytes, nonsense: InvalidModelResponseError, now: float) -> None:
        times, _, at = self._invalid_responses.get(digest, (0, nonsense, now))
        self._invalid_responses[digest] = (times + 1 if now - at <= 2 * _ANSWER_SECONDS else 1, nonsense, now)
        self._invalid_responses.move_to_end(digest)
        if len(self._invalid_responses) > _MAX_ERRORS:
            self._invalid_responses.popitem(last=False)


def _retention_seconds(times: int) -> float:
    return (
        min(_ANSWER_SECONDS, INVALID_RESPONSE_TTL_SECONDS * 2 ** (min(times, 10) - 2)) if times > 1 else 0.0
    )
