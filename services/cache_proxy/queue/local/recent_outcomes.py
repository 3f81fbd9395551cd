"""Outcomes of the last minutes: answers for one minute, rejections for ten."""

from collections import OrderedDict

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import InvalidModelResponseError, PairRejectedError
from services.cache_proxy.queue.interface import INVALID_RESPONSE_TTL_SECONDS

_ANSWER_SECONDS = 60.0
# A rejected pair that is sent again makes the model reject the batch that it is in.
_REJECTION_SECONDS = 600.0
_MAX_ANSWERS = 200_000
_MAX_ERRORS = 20_000


class _ExpiringOutcomes:
    """Outcomes of one kind with a maximum age and number. The oldest are removed first."""

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
        outcome, expires_at = self._outcomes.get(digest, (None, 0.0))
        return outcome if expires_at >= now else None

    def remove(self, digest: bytes) -> None:
        self._outcomes.pop(digest, None)

    def clear(self) -> None:
        self._outcomes.clear()


class RecentOutcomes:
    """Outcomes of pairs that ended recently, bounded in time and number.

    An invalid response may be a single fault of the model, so the first one is not remembered: the pair is
    sent again. A pair with repeated invalid responses is remembered each time twice as long. Otherwise it
    would be in every batch.

    State:

    - `_answers` and `_rejections`: outcomes by digest.
    - `_invalid_responses`: by digest, how many there were in a row, and the error and time of the last one.
    """

    def __init__(self) -> None:
        self._answers = _ExpiringOutcomes(seconds=_ANSWER_SECONDS, max_items=_MAX_ANSWERS)
        self._rejections = _ExpiringOutcomes(seconds=_REJECTION_SECONDS, max_items=_MAX_ERRORS)
        self._invalid_responses: OrderedDict[bytes, tuple[int, InvalidModelResponseError, float]] = (
            OrderedDict()
        )

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        """Remember how a pair ended."""
        if isinstance(outcome, InvalidModelResponseError):
            self._add_invalid_response(digest, outcome, now)
        else:
            kept = self._rejections if isinstance(outcome, PairRejectedError) else self._answers
            kept.add(digest, outcome, now=now)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        """Return how a pair ended, None if that was too long ago or is not remembered."""
        outcome = self._answers.get(digest, now=now) or self._rejections.get(digest, now=now)
        if outcome is None and digest in self._invalid_responses:
            times, error, last_at = self._invalid_responses[digest]
            return error if now < last_at + _retention_seconds(times) else None
        return outcome

    def remove(self, digest: bytes) -> None:
        """Forget the answer of a pair."""
        self._answers.remove(digest)

    def clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()

    def _add_invalid_response(self, digest: bytes, error: InvalidModelResponseError, now: float) -> None:
        times, _, last_at = self._invalid_responses.get(digest, (0, error, now))
        times = times + 1 if now - last_at <= 2 * _ANSWER_SECONDS else 1
        self._invalid_responses[digest] = (times, error, now)
        self._invalid_responses.move_to_end(digest)
        if len(self._invalid_responses) > _MAX_ERRORS:
            self._invalid_responses.popitem(last=False)


def _retention_seconds(times: int) -> float:
    """Return how long the given number of invalid responses in a row is remembered."""
    if times <= 1:
        return 0.0
    return min(_ANSWER_SECONDS, INVALID_RESPONSE_TTL_SECONDS * 2.0 ** (min(times, 10) - 2))
