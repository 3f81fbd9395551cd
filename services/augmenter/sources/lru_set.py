"""A set that forgets: what is remembered of a stream that never ends."""

from collections import OrderedDict


class LruSet:
    """Names that were noted, or asked for and found, last. State: `_names`, the longest ago in front."""

    def __init__(self, *, max_size: int) -> None:
        self._max_size = max_size
        self._names: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        """Note a name; the one of longest ago makes room for it."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._max_size:
            self._names.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        found = name in self._names
        if found:
            self._names.move_to_end(name)
        return found
