"""What has just ended: answers for a minute, refusals for ten."""

from collections import OrderedDict

from services.cache_proxy.errors import Nonsense, Refused
from services.cache_proxy.queue import Outcome

_ANSWER_SECONDS = 60.0
_REFUSAL_SECONDS = 600.0  # each time a refused pair is asked again, it costs the batch that it is in
_MAX_ANSWERS = 200_000
_MAX_REFUSALS = 20_000


class Recent:
    """Bounded in time and number; the oldest go first. Nonsense is not kept: the model may do better."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()
        self._refusals: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()

    def add(self, digest: bytes, outcome: Outcome, *, now: float) -> None:
        """Keep how a pair ended."""
        if isinstance(outcome, Nonsense):
            return
        refused = isinstance(outcome, Refused)
        kept, seconds = (self._refusals, _REFUSAL_SECONDS) if refused else (self._answers, _ANSWER_SECONDS)
        kept[digest] = (outcome, now + seconds)
        kept.move_to_end(digest)
        while len(kept) > (_MAX_REFUSALS if refused else _MAX_ANSWERS) or next(iter(kept.values()))[1] < now:
            kept.popitem(last=False)

    def get(self, digest: bytes, *, now: float) -> Outcome | None:
        """How it ended, if that was lately."""
        outcome, until = self._answers.get(digest) or self._refusals.get(digest) or (None, 0.0)
        return outcome if until >= now else None
