"""Find the pair for which the model rejects a whole batch, by bisection.

A rejected batch becomes a group of suspects. Half of a group is sent alone, as a probe. If the probe passes,
the poison pair is in the other half. If it is rejected, the poison pair is in this half, and the other half
goes back to ordinary batches. A group is split between callers first, so that callers whose pairs are fine
do not wait for those of others.

One poison pair in 1000 costs ten probes, and every probe that passes answers its pairs. While other pairs
wait, at most every fourth call is a probe, so that a poison pair cannot block the model for all.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from services.cache_proxy.queue.interface import Claim

_BATCHES_BETWEEN_PROBES = 3

_Entry = TypeVar("_Entry")
# An ordered set.
_Group = dict[_Entry, None]


class BatchBisector(Generic[_Entry]):
    """Holds the groups of suspects.

    State:

    - `_groups`: groups that wait to be probed, oldest first.
    - `_unsent_halves`: the other half of each probe that was sent.

    An entry is in at most one of them. An entry that was sent is in neither, only in its claim.
    """

    def __init__(self, caller_of: Callable[[_Entry], str]) -> None:
        self._caller_of = caller_of
        self._groups: deque[_Group[_Entry]] = deque()
        self._unsent_halves: dict[Claim, _Group[_Entry]] = {}
        self._batches_since_probe = 0

    def next_probe(self, *, others_waiting: bool) -> list[_Entry]:
        """Return the entries to send as a probe now, none if it is the turn of ordinary batches."""
        if not self._groups or (others_waiting and self._batches_since_probe < _BATCHES_BETWEEN_PROBES):
            return []
        group = sorted(self._groups[0], key=self._caller_of)
        return group[: self._split_point(group)]

    def claim_sent(self, claim: Claim, probe: list[_Entry]) -> None:
        """Record a claim.

        `probe` has the entries that `next_probe` returned, or none for an ordinary batch.
        """
        if not probe:
            self._batches_since_probe += 1
            return
        self._batches_since_probe = 0
        group = self._groups.popleft()
        for entry in probe:
            del group[entry]
        self._unsent_halves[claim] = group

    def claim_passed(self, claim: Claim) -> None:
        """Record that a batch passed. If it was a probe, the other half of its group stays suspected."""
        rest = self._unsent_halves.pop(claim, None)
        if rest:
            self._groups.appendleft(rest)

    def claim_rejected(self, claim: Claim, entries: Iterable[_Entry]) -> list[_Entry]:
        """Record that a batch was rejected for one of `entries`.

        Return the entries that are no longer suspected.
        """
        rest = self._unsent_halves.pop(claim, None)
        group = dict.fromkeys(entries)
        if group and rest is None:
            # A new group goes behind the older ones, which it would starve otherwise.
            self._groups.append(group)
        elif group:
            self._groups.appendleft(group)
        return list(rest or ())

    def claim_undecided(self, claim: Claim, entries: Iterable[_Entry], *, separate: bool = False) -> bool:
        """Record that a call failed without showing anything about its pairs. Return whether it was a probe.

        If it was, `entries` are suspected again. With `separate`, the other half of the group is probed
        first: if it passes, the model works.
        """
        rest = self._unsent_halves.pop(claim, None)
        if rest is None:
            return False
        if separate and rest:
            self._groups.extendleft(group for group in (dict.fromkeys(entries), rest) if group)
            return True
        group = dict.fromkeys(entries) | rest
        if group:
            self._groups.appendleft(group)
        return True

    def discard(self, entry: _Entry) -> bool:
        """Remove an entry unless it was sent. Return whether it was here."""
        for group in (*self._groups, *self._unsent_halves.values()):
            if entry in group:
                del group[entry]
                if not group and group in self._groups:
                    self._groups.remove(group)
                return True
        return False

    def _split_point(self, group: list[_Entry]) -> int:
        """Return the size of the first half: a boundary between callers near the middle, else the middle."""
        callers = [self._caller_of(entry) for entry in group]
        boundaries = [index for index in range(1, len(group)) if callers[index - 1] != callers[index]]
        middle = (len(group) + 1) // 2
        return min(boundaries, key=lambda index: abs(index - middle), default=middle)

    def clear(self) -> list[_Entry]:
        """Remove and return all entries except those that were sent."""
        removed = [entry for group in (*self._groups, *self._unsent_halves.values()) for entry in group]
        self._groups.clear()
        for rest in self._unsent_halves.values():
            rest.clear()
        return removed
