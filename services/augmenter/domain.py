"""Domain types of the augmenter: a pair, the levels of pairs, and a file to process."""

from dataclasses import dataclass, field

import msgspec

from services.common.codec import Format
from services.common.storage.errors import StorageError
from services.common.storage.protocol import ABSENT, FileInfo


class Pair(msgspec.Struct, frozen=True, gc=False):
    """The company and title to classify.

    Created, hashed and compared without executing Python code, and not tracked by the garbage collector. No
    value of `seniority` is valid, so a line that has such a member cannot be decoded as this type.
    """

    company: str
    title: str
    seniority: msgspec.UnsetType = msgspec.UNSET


@dataclass(slots=True)
class PairLevels:
    """The levels of pairs, in their order.

    A pair without a level has 0 in `levels`, and its reason, by index, in `rejected`.
    """

    levels: bytes
    rejected: dict[int, str] = field(default_factory=dict)

    def select(self, start: int, count: int) -> "PairLevels":
        """Return the levels of `count` pairs from `start` on."""
        end = start + count
        rejected = {index - start: reason for index, reason in self.rejected.items() if start <= index < end}
        return PairLevels(self.levels[start:end], rejected)


@dataclass(frozen=True, slots=True)
class FileTask:
    """One file to process.

    `expected_version` is the version of the output that may be replaced, or ABSENT. `is_done`: the output
    exists already. `error`: the output could not be checked.
    """

    file: FileInfo
    output_name: str
    lines_format: Format
    expected_version: str = ABSENT
    is_done: bool = False
    error: StorageError | None = None
