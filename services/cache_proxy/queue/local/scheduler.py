"""Select the pairs of the next batch, by priority, quota account and caller.

The module is slightly longer than 250 lines: the estimate of a pair's turn must follow the selection of
batches, so both stand together.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.cache_proxy.domain import BULK, INTERACTIVE, PRIORITIES, PRIORITY_CLASSES, REFRESH
from services.cache_proxy.queue.expected_calls import BULK_SHARE_DIVISOR, bulk_reserve, calls_until
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.priority_class import CandidateHeap, PriorityClass
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota, QuotaProvider, no_quotas

# Of one pair. Later requests for it wait in the positions that it has.
_MAX_POSITIONS = 8


@dataclass(frozen=True, slots=True)
class ExpectedTurn:
    """When a position is expected to be sent: within `calls` calls, and not before its quota allows it."""

    calls: int
    quota_wait_seconds: float = 0.0


class BatchScheduler:
    """Holds the waiting pairs, and takes batches that are fair between callers and within all quotas.

    State:

    - `_classes`: the positions by priority.
    - `_waiting`: the entries that have these positions.
    - `size_bytes`: the size of all waiting pairs.
    """

    def __init__(self, quota_limiter: QuotaLimiter, quotas: QuotaProvider = no_quotas) -> None:
        self._quota_limiter = quota_limiter
        self._quotas = quotas
        self._classes = {name: PriorityClass(name) for name in PRIORITY_CLASSES}
        self._waiting: dict[bytes, QueuedPair] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, priority: str) -> int:
        """Return how many positions wait in one priority."""
        return len(self._classes[priority])

    def count_for_account(self, account: str) -> int:
        """Return how many positions wait for an account's quota."""
        return sum(priority_class.count(account) for priority_class in self._classes.values())

    def eligible_count(self, *, now: float) -> int:
        """Return how many positions may be sent now, within their quotas."""
        return sum(self._eligible(priority, now) for priority in PRIORITY_CLASSES)

    def quota_blocked_count(self, *, now: float) -> int:
        """Return how many positions wait because their account's quota is used up."""
        return sum(
            self.count_for_account(account)
            for account in self._account_names()
            if not self._available_quota(account, now)
        )

    def quota_wait_seconds(self, *, now: float) -> float:
        """Return the time until some account may send a pair, `inf` if no account has waiting pairs."""
        return min(
            (self._quota_wait_seconds(account, 1, now) for account in self._account_names()), default=math.inf
        )

    def expected_turn_of_new(
        self,
        *,
        priority: str,
        account: str | None,
        caller: str,
        count: int,
        batch_pairs: int,
        now: float,
        horizon_seconds: float,
    ) -> ExpectedTurn:
        """Return when the last of `count` new pairs of a caller would be sent."""
        queue = self._classes[priority].queue_for(account)
        last = queue.start_tag(caller) + count - 1
        ahead = queue.count_through(last) + count
        return self._expected_turn(priority, account, ahead, last, batch_pairs, now, horizon_seconds)

    def expected_turn(
        self, position: QueuePosition, *, batch_pairs: int, now: float, horizon_seconds: float
    ) -> ExpectedTurn:
        """Return when a waiting position is expected to be sent."""
        ahead = self._classes[position.priority].queue_for(position.account).count_through(position.start_tag)
        return self._expected_turn(
            position.priority, position.account, ahead, position.start_tag, batch_pairs, now, horizon_seconds
        )

    def _expected_turn(
        self,
        priority: str,
        account: str | None,
        ahead: int,
        last: float,
        batch_pairs: int,
        now: float,
        horizon_seconds: float,
    ) -> ExpectedTurn:
        """Return when the first `ahead` positions of a queue are sent, the last of which has the tag `last`.

        Positions of other queues count as ahead if their quotas allow them within the horizon.
        """
        priority_class = self._classes[priority]
        by = now + horizon_seconds
        quota_seconds = 0.0
        if account is not None:
            first = self._classes[INTERACTIVE].count(account) if priority == BULK else 0
            quota_seconds = self._quota_wait_seconds(account, first + ahead, now)
            last = priority_class.start_tag(account) + ahead - 1
            ahead += priority_class.default_queue.count_through(last)
        for other in priority_class.account_queues:
            if other != account:
                before = math.floor(last - priority_class.start_tag(other)) + 1
                ahead += max(0, min(before, self._eligible_of_account(priority_class, other, by)))
        return ExpectedTurn(self._calls_until(priority, ahead, batch_pairs, by), quota_seconds)

    def _calls_until(self, priority: str, ahead: int, batch_pairs: int, by: float) -> int:
        interactive, bulk = (self._eligible(name, by) for name in PRIORITIES)
        return calls_until(priority, ahead=ahead, interactive=interactive, bulk=bulk, batch_pairs=batch_pairs)

    def entries(self) -> list[QueuedPair]:
        """Return all waiting entries."""
        return list(self._waiting.values())

    def oldest_at(self, priorities: Iterable[str] = PRIORITY_CLASSES, *, now: float | None = None) -> float:
        """Return when the oldest pair at the front of a queue was enqueued, `inf` if nothing waits.

        With `now`, only queues whose quotas allow a pair then are counted.
        """
        times = []
        for priority in priorities:
            quotas_left = (
                dict.fromkeys(self._account_names(), math.inf)
                if now is None
                else self._remaining_quotas(priority, now)
            )
            times += [entry.enqueued_at for entry in self._classes[priority].oldest_eligible(quotas_left)]
        return min(times, default=math.inf)

    def is_waiting(self, entry: QueuedPair) -> bool:
        """Return whether an entry waits here, and is neither in a call nor being bisected."""
        return self._waiting.get(entry.pair.digest) is entry

    def add(self, entry: QueuedPair, *, at_front: bool = False) -> None:
        """Add an entry behind the other pairs of its callers, or at the front."""
        self._waiting[entry.pair.digest] = entry
        self.size_bytes += entry.pair.size_bytes
        for position in entry.positions:
            self._classes[position.priority].add(position, at_front=at_front)

    def discard(self, entry: QueuedPair) -> bool:
        """Remove an entry. Return whether it waited here."""
        if not self.is_waiting(entry):
            return False
        del self._waiting[entry.pair.digest]
        self.size_bytes -= entry.pair.size_bytes
        for position in entry.positions:
            self._classes[position.priority].remove(position)
        return True

    def position_for(
        self, entry: QueuedPair, *, priority: str, account: str | None, caller: str
    ) -> QueuePosition | None:
        """Return the position that a request which joins an entry adds to it, None if it has one as good.

        A position of the same account with a lower priority is replaced (see `add_position`). Otherwise the
        entry gets one more position, unless one without a quota is as good. It is sent with whichever
        position comes first, so that no caller waits for the quota of another.
        """
        same = next((position for position in entry.positions if position.account == account), None)
        if same is not None:
            better = PRIORITY_CLASSES.index(priority) < PRIORITY_CLASSES.index(same.priority)
            return QueuePosition(entry, priority, caller, account) if better else None
        unlimited = [
            PRIORITY_CLASSES.index(position.priority)
            for position in entry.positions
            if not self._is_rate_limited(position.account)
        ]
        if len(entry.positions) >= _MAX_POSITIONS:
            return None
        if unlimited and min(unlimited) <= PRIORITY_CLASSES.index(priority):
            return None
        return QueuePosition(entry, priority, caller, account)

    def add_position(self, entry: QueuedPair, position: QueuePosition) -> None:
        """Give an entry the position that `position_for` found.

        If the entry does not wait now, the position takes effect when it is added again.
        """
        is_waiting = self.is_waiting(entry)
        for index, known in enumerate(entry.positions):
            if known.account == position.account:
                if is_waiting:
                    self._classes[known.priority].remove(known)
                entry.positions[index] = position
                break
        else:
            entry.positions.append(position)
        if is_waiting:
            self._classes[position.priority].add(position)

    def reassign_quotas(self) -> None:
        """Move all waiting pairs to the accounts of changed quotas."""
        quotas = self._quotas()
        for entry in self.entries():
            self.discard(entry)
            by_account: dict[str | None, QueuePosition] = {}
            for old in entry.positions:
                quota = None if old.priority == REFRESH else quotas.for_caller(old.caller)
                account = None if quota is None else quota.account
                by_account.setdefault(account, QueuePosition(entry, old.priority, old.caller, account))
            entry.positions = list(by_account.values())
            self.add(entry)

    def take_batch(
        self, *, batch_pairs: int, batch_bytes: int, now: float
    ) -> tuple[list[QueuedPair], dict[Quota, int]]:
        """Remove and return the next batch: at least one pair, if any may be sent.

        The second value is how many pairs each quota must be charged for.
        """
        chosen = self._select_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=now)
        counts: dict[Quota, int] = {}
        for position, tag in chosen:
            self._classes[position.priority].advance(position, tag)
            # A pair that is sent again was charged before.
            if position.entry.charged_claim is None and self._is_rate_limited(position.account):
                quota = self._quota_for(position.account or DEFAULT_ACCOUNT)
                counts[quota] = counts.get(quota, 0) + 1
        for position, _ in chosen:
            self.discard(position.entry)
        return [position.entry for position, _ in chosen], counts

    def _select_batch(
        self, *, batch_pairs: int, batch_bytes: int, now: float
    ) -> list[tuple[QueuePosition, float]]:
        """Return the positions of the next batch with their start tags in the priority class."""
        candidates = {
            priority: CandidateHeap(self._classes[priority], self._remaining_quotas(priority, now))
            for priority in PRIORITY_CLASSES
        }
        chosen: dict[bytes, tuple[QueuePosition, float]] = {}
        remaining_bytes = batch_bytes

        def take_from(priority: str, *, max_pairs: int, max_bytes: int) -> None:
            nonlocal remaining_bytes
            while max_pairs > 0 and (position := candidates[priority].peek()) is not None:
                digest = position.entry.pair.digest
                size_bytes = position.entry.pair.size_bytes
                # The pair may have been chosen in another of its positions.
                if digest in chosen:
                    candidates[priority].skip()
                    continue
                if size_bytes > max_bytes:
                    return
                chosen[digest] = position, candidates[priority].pop()
                max_pairs -= 1
                max_bytes -= size_bytes
                remaining_bytes -= size_bytes

        # The reserve of bulk first, then every priority takes what the higher ones leave.
        take_from(BULK, max_pairs=bulk_reserve(batch_pairs), max_bytes=batch_bytes // BULK_SHARE_DIVISOR)
        for priority in PRIORITY_CLASSES:
            take_from(priority, max_pairs=batch_pairs - len(chosen), max_bytes=remaining_bytes)

        # A pair that is larger than a whole batch goes alone.
        if not chosen:
            first = next((name for name in PRIORITY_CLASSES if candidates[name].peek()), INTERACTIVE)
            take_from(first, max_pairs=1, max_bytes=2**63)
        return list(chosen.values())

    def _eligible(self, priority: str, now: float) -> int:
        priority_class = self._classes[priority]
        return len(priority_class.default_queue) + sum(
            self._eligible_of_account(priority_class, account, now)
            for account in priority_class.account_queues
        )

    def _eligible_of_account(self, priority_class: PriorityClass, account: str, now: float) -> int:
        # A pair at the front that was charged before may be sent whatever is left of the quota.
        oldest = priority_class.account_queues[account].oldest()
        min_count = 1 if oldest is not None and oldest.charged_claim is not None else 0
        return min(
            priority_class.count(account),
            max(min_count, self._remaining_quota(priority_class.priority, account, now)),
        )  # type: ignore[return-value]

    def _remaining_quotas(self, priority: str, now: float) -> dict[str, float]:
        return {
            account: self._remaining_quota(priority, account, now)
            for account in self._classes[priority].account_queues
        }

    def _remaining_quota(self, priority: str, account: str, now: float) -> float:
        """Return how many pairs of a priority an account may send: its interactive pairs go first."""
        first = self._classes[INTERACTIVE].count(account) if priority == BULK else 0
        return max(0, self._available_quota(account, now) - first)

    def _account_names(self) -> Sequence[str]:
        return list(dict.fromkeys(itertools.chain(*(one.account_queues for one in self._classes.values()))))

    def _quota_for(self, account: str) -> Quota:
        return self._quotas().for_account(account)

    def _is_rate_limited(self, account: str | None) -> bool:
        return account is not None and self._quota_for(account).pairs_per_second > 0

    def _available_quota(self, account: str, now: float) -> float:
        return self._quota_limiter.available(self._quota_for(account), now=now)

    def _quota_wait_seconds(self, account: str, count: int, now: float) -> float:
        return self._quota_limiter.wait_seconds(self._quota_for(account), count, now=now)
