"""A set of bounded size, for names from a stream that does not end."""

from collections import OrderedDict


class LruSet:
    """A set that drops the least recently added or found name when it is full.

    State: `_names`, the least recently used first.
    """

    def __init__(self, *, max_size: int) -> None:
        self._max_size = max_size
        self._names: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        """Add a name, and drop the least recently used one if the set is over its size."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._max_size:
            self._names.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        found = name in self._names
        if found:
            self._names.move_to_end(name)
        return found
