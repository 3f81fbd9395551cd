"""Finding the pair for which the model refuses a whole batch, by halving, within a share of the slots.

A refused batch becomes a group of suspects. Half of a group is sent alone (a probe), split
by caller first, for whose pairs are fine should not wait for whose are not: if it passes, the bad
pair is in the other half; if it is refused, it is in this one, and the other half goes back to ordinary
batches. One bad pair in 1000 costs ten probes, and every probe that passes answers its pairs. While other
pairs wait, at most every fourth call is a probe, so a bad pair cannot take the model from everybody.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from services.cache_proxy.queue.interface import Claim

_BATCHES_BETWEEN_PROBES = 3

_Entry = TypeVar("_Entry")
_Group = dict[_Entry, None]  # an ordered set


class BatchBisector(Generic[_Entry]):
    """State: `_groups`, oldest first, ready to be probed; `_held`, the unsent rest of each probe in flight.

    An entry is in at most one of them; one in flight is in neither, its claim has it.
    """

    def __init__(self, caller_of: Callable[[_Entry], str]) -> None:
        self._caller_of = caller_of
        self._groups: deque[_Group[_Entry]] = deque()
        self._unsent_halves: dict[Claim, _Group[_Entry]] = {}
        self._batches_since_probe = 0

    def next_probe(self, *, others_waiting: bool) -> list[_Entry]:
        """The entries to send as a probe now; none if it is others' turn."""
        if not self._groups or (others_waiting and self._batches_since_probe < _BATCHES_BETWEEN_PROBES):
            return []
        group = sorted(self._groups[0], key=self._caller_of)
        return group[: self._split_point(group)]

    def claim_sent(self, claim: Claim, probe: list[_Entry]) -> None:
        """Note a claim: of the probe that `due` returned, or, with none, of others."""
        if not probe:
            self._batches_since_probe += 1
            return
        self._batches_since_probe = 0
        group = self._groups.popleft()
        for entry in probe:
            del group[entry]
        self._unsent_halves[claim] = group

    def claim_passed(self, claim: Claim) -> None:
        """The batch passed: if it was a probe, the rest of its group is suspect still."""
        rest = self._unsent_halves.pop(claim, None)
        if rest:
            self._groups.appendleft(rest)

    def claim_rejected(self, claim: Claim, entries: Iterable[_Entry]) -> list[_Entry]:
        """The batch was refused for one of `entries`; those that are no longer suspect."""
        rest = self._unsent_halves.pop(claim, None)
        group = dict.fromkeys(entries)
        if (
            group and rest is None
        ):  # behind those that were refused before it: else new ones would starve them
            self._groups.append(group)
        elif group:
            self._groups.appendleft(group)
        return list(rest or ())

    def claim_undecided(self, claim: Claim, entries: Iterable[_Entry], *, separate: bool = False) -> bool:
        """The batch was not judged: if it was a probe, `entries` are suspects again. Whether it was.

        `apart`: the rest of the group is probed before them, for if it passes the model is well.
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
        """Forget an entry, unless it is in flight. Whether it was here."""
        for group in (*self._groups, *self._unsent_halves.values()):
            if entry in group:
                del group[entry]
                if not group and group in self._groups:
                    self._groups.remove(group)
                return True
        return False

    def _split_point(self, group: list[_Entry]) -> int:
        """How many make about a half; between two callers if there are any, the nearest to the middle."""
        callers = [self._caller_of(entry) for entry in group]
        between = [at for at in range(1, len(group)) if callers[at - 1] != callers[at]]
        middle = (len(group) + 1) // 2
        return min(between, key=lambda at: abs(at - middle), default=middle)

    def clear(self) -> list[_Entry]:
        """Forget all but those in flight; what was forgotten."""
        forgotten = [entry for group in (*self._groups, *self._unsent_halves.values()) for entry in group]
        self._groups.clear()
        for rest in self._unsent_halves.values():
            rest.clear()
        return forgotten
