"""What a replica keeps of each pair for which it has waiting requests: enough to enqueue the pair again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.observability.metrics import LANES
from services.cache_proxy.queue.interface import Asker, Pair

_MAX_TURNS = 8  # of one pair, as it has places in Redis (MAX_PLACES)


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a pair waits for one of its callers: `account` is None where no quota binds the caller."""

    account: str | None
    caller: str
    priority: str


@dataclass(slots=True)
class WaitingPair:
    """A pair that waits: in the best turn of each account, until the latest deadline of its requests."""

    pair: Pair
    turns: tuple[Turn, ...]  # shared by all pairs of a request, as long as no other joins them
    deadline: float
    trace: bytes
    shared: bool = False  # by more than one request

    @property
    def priority(self) -> str:
        """Return the best priority of all requests that wait."""
        return min((turn.priority for turn in self.turns), key=LANES.index)

    def join(self, turn: Turn) -> None:
        """Have the pair wait in this turn too, unless it has one of that account that is as good."""
        for at, known in enumerate(self.turns):
            if known.account == turn.account:
                if LANES.index(turn.priority) < LANES.index(known.priority):
                    self.turns = (*self.turns[:at], turn, *self.turns[at + 1 :])
                return
        if len(self.turns) < _MAX_TURNS:
            self.turns = (*self.turns, turn)

    def askers(self) -> Iterator[Asker]:
        """Yield an asker for each turn: enqueued for all of them, the pair waits as it did."""
        for turn in self.turns:
            yield Asker(turn.caller, turn.priority, self.deadline, self.trace)


Noted = Mapping[bytes, tuple[WaitingPair, tuple[Turn, ...], float]]
"""What was known of each pair at some time: see `RedisQueue.noted`."""
