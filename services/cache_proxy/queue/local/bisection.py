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

_OTHERS_PER_PROBE = 3

_E = TypeVar("_E")
_Group = dict[_E, None]  # an ordered set


class Suspects(Generic[_E]):
    """State: `_groups`, oldest first, ready to be probed; `_held`, the unsent rest of each probe in flight.

    An entry is in at most one of them; one in flight is in neither, its claim has it.
    """

    def __init__(self, caller: Callable[[_E], str]) -> None:
        self._caller = caller
        self._groups: deque[_Group[_E]] = deque()
        self._held: dict[Claim, _Group[_E]] = {}
        self._others_since_probe = 0

    def due(self, *, others_wait: bool) -> list[_E]:
        """The entries to send as a probe now; none if it is others' turn."""
        if not self._groups or (others_wait and self._others_since_probe < _OTHERS_PER_PROBE):
            return []
        group = sorted(self._groups[0], key=self._caller)
        return group[: self._half(group)]

    def sent(self, claim: Claim, probe: list[_E]) -> None:
        """Note a claim: of the probe that `due` returned, or, with none, of others."""
        if not probe:
            self._others_since_probe += 1
            return
        self._others_since_probe = 0
        group = self._groups.popleft()
        for entry in probe:
            del group[entry]
        self._held[claim] = group

    def cleared(self, claim: Claim) -> None:
        """The batch passed: if it was a probe, the rest of its group is suspect still."""
        rest = self._held.pop(claim, None)
        if rest:
            self._groups.appendleft(rest)

    def refused(self, claim: Claim, entries: Iterable[_E]) -> list[_E]:
        """The batch was refused for one of `entries`; those that are no longer suspect."""
        rest = self._held.pop(claim, None)
        group = dict.fromkeys(entries)
        if (
            group and rest is None
        ):  # behind those that were refused before it: else new ones would starve them
            self._groups.append(group)
        elif group:
            self._groups.appendleft(group)
        return list(rest or ())

    def undo(self, claim: Claim, entries: Iterable[_E], *, apart: bool = False) -> bool:
        """The batch was not judged: if it was a probe, `entries` are suspects again. Whether it was.

        `apart`: the rest of the group is probed before them, for if it passes the model is well.
        """
        rest = self._held.pop(claim, None)
        if rest is None:
            return False
        if apart and rest:
            self._groups.extendleft(group for group in (dict.fromkeys(entries), rest) if group)
            return True
        group = dict.fromkeys(entries) | rest
        if group:
            self._groups.appendleft(group)
        return True

    def drop(self, entry: _E) -> bool:
        """Forget an entry, unless it is in flight. Whether it was here."""
        for group in (*self._groups, *self._held.values()):
            if entry in group:
                del group[entry]
                if not group and group in self._groups:
                    self._groups.remove(group)
                return True
        return False

    def _half(self, group: list[_E]) -> int:
        """How many make about a half; between two callers if there are any, the nearest to the middle."""
        callers = [self._caller(entry) for entry in group]
        between = [at for at in range(1, len(group)) if callers[at - 1] != callers[at]]
        middle = (len(group) + 1) // 2
        return min(between, key=lambda at: abs(at - middle), default=middle)

    def clear(self) -> list[_E]:
        """Forget all but those in flight; what was forgotten."""
        forgotten = [entry for group in (*self._groups, *self._held.values()) for entry in group]
        self._groups.clear()
        for rest in self._held.values():
            rest.clear()
        return forgotten
