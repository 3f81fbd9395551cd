"""One file: read, parse, ask, splice, write, all at once; how far ahead is bounded by the room for text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial

from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.retry import RetryBudget
from services.augmenter.errors import AccountingError, NoLineAugmentedError
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.file_reader import FileReader, ReadLimits
from services.augmenter.pipeline.line_blocks import STANDARD, Answers, PostingFormat, Window
from services.augmenter.pipeline.writers import Output, Rejects
from services.augmenter.stats import LineCounts, Totals
from services.augmenter.tasks import worked_ahead
from services.common.codec import PLAIN, Format
from services.common.line_reader import Block, LongLinePart, Piece
from services.common.memory_budget import Room
from services.common.storage.errors import DoneElsewhereError
from services.common.storage.protocol import Item, Store
from services.common.tracing import OFF, Tracing

ROOM_BYTES = 24 * 2**20
_FILES_BYTES = 48 * 2**20
_FILE_BYTES, _COMPRESSED_BYTES = 8 * 2**20, 12 * 2**20  # at most: what reads and writes it holds no more
_UNPACKED = 10  # bytes of text in a compressed one, about: little of it is as much to hold as its text
_LINE_BYTES = 128  # in the room, at least: a line of 30 takes ten times as much with what is parsed of it


@dataclass(frozen=True, slots=True)
class _Block:
    """Lines that are given room, or a part of one that is over the limit.

    Their pieces are there until they are parsed.
    """

    count: int
    size_bytes: int
    pieces: list[Piece]
    long_line: LongLinePart | None = None

    @property
    def held_bytes(self) -> int:
        """What it counts in the room."""
        return max(self.size_bytes, self.count * _LINE_BYTES)


class Pipeline:
    """What every file's way through has in common."""

    def __init__(
        self, *, source: Store, sink: Store, rejects: Store, client: ProxyClient, totals: Totals,
        tracing: Tracing = OFF, limits: ReadLimits | None = None,
        form: PostingFormat = STANDARD,
    ) -> None:  # fmt: skip
        self._source = source
        self._sink = sink
        self._rejects = rejects
        self._client = client
        self._totals = totals
        self._tracing = tracing
        self._form = form
        self._limits = limits or ReadLimits()
        self._room = Room(limit_bytes=ROOM_BYTES)
        self._files_room = Room(limit_bytes=_FILES_BYTES)

    async def augment(
        self, item: Item, *, output_name: str, onto: str, lines_format: Format, budget: RetryBudget
    ) -> LineCounts:
        """Make the output of one file, whole, its rejects before it. Raises FileError.

        However many may be in work: of large files only so many as there is memory for what each holds
        beside the text, a part of its upload and the windows of its compression.
        """
        if lines_format is PLAIN:
            held_bytes = min(item.size_bytes, _FILE_BYTES)
        else:
            held_bytes = min(_UNPACKED * item.size_bytes, _COMPRESSED_BYTES)
        async with self._files_room.held(held_bytes):
            return await self._augment(item, output_name, onto, lines_format, budget)

    async def _augment(
        self, item: Item, output_name: str, onto: str, lines_format: Format, budget: RetryBudget
    ) -> LineCounts:
        counts = LineCounts()
        reader = FileReader(self._source, item, lines_format, self._totals, self._limits)
        with self._client.file_in_work(), closing(_InHand(self._room, self._totals)) as in_hand:
            async with (
                Output(self._sink.create(output_name, item, onto=onto), lines_format) as output,
                Rejects(self._rejects, item, lines_format) as rejects,
                aclosing(reader.blocks()) as read,
                aclosing(in_hand.let_in(read)) as let_in,
                aclosing(worked_ahead(let_in, partial(self._ask, budget=budget))) as asked,
            ):
                async for block, (windows, answers) in asked:
                    if block.long_line is not None:
                        await self._reject(block.long_line, rejects, counts)
                        in_hand.done_with(block.held_bytes)
                        continue
                    in_hand.count(sum(one.extra for one in windows))
                    augmented, rejected = line_blocks.settled(windows, answers, counts)
                    del windows, answers  # while it is written, only the text of it is held
                    if rejected:
                        await rejects.write(rejected)
                    del rejected
                    await output.write(augmented)
                    del augmented
                    in_hand.done_with(block.held_bytes)
                counts.read = in_hand.lines_read
                _check(counts)
                if rejects.first and not counts.augmented:
                    raise NoLineAugmentedError(
                        rejected=counts.rejected, first=rejects.first, hint=reader.hint
                    )
                if rejects.any:
                    await self._see_that_nobody_was_faster(item, output_name, onto)
                await rejects.complete()
                await output.complete()
                await rejects.clear()
        return counts

    async def _see_that_nobody_was_faster(self, item: Item, output_name: str, onto: str) -> None:
        """Or our rejects would stand beside an output for which the model answered differently."""
        made = await self._sink.made(output_name, item)
        if made and made.from_this_input and made.version != onto:
            raise DoneElsewhereError

    async def _reject(self, part: LongLinePart, rejects: Rejects, counts: LineCounts) -> None:
        """Pass a line that is over the limit on to the rejects, part by part."""
        await rejects.write_part(part, number=counts.settled + 1, reason=self._limits.long_line_reason)
        counts.rejected += part.is_last

    async def _ask(self, block: _Block, *, budget: RetryBudget) -> tuple[list[Window], Answers]:
        windows: list[Window] = []
        if block.long_line is not None:
            return windows, Answers(b"")
        pairs = line_blocks.parsed(block.pieces, into=windows, form=self._form)
        with self._tracing.span("window", lines=block.count, bytes=block.size_bytes):
            return windows, await self._client.ask(pairs, budget, text_bytes=block.size_bytes)


class _InHand:
    """A file's part of the room.

    State: `_taken_bytes`, all of which goes back in `close`, however the file ended; `lines_read`, counted
    from the text itself, so that it is what the file's books are checked against.
    """

    def __init__(self, room: Room, totals: Totals) -> None:
        self._room = room
        self._totals = totals
        self._taken_bytes = 0
        self.lines_read = 0

    async def let_in(self, all_blocks: AsyncGenerator[Block]) -> AsyncGenerator[_Block]:
        """The blocks, each as soon as there is room for it."""
        async for read in all_blocks:
            if isinstance(read, LongLinePart):
                block = _Block(int(read.is_last), len(read.text), [], read)
            else:
                size_bytes = sum(len(piece.text) for piece in read)
                block = _Block(sum(piece.count for piece in read), size_bytes, read)
            await self._room.take(block.held_bytes)
            self._taken_bytes += block.held_bytes
            self.count(block.count)
            yield block

    def count(self, lines: int) -> None:
        """So many lines were read, or one was found to be so many more."""
        self.lines_read += lines
        self._totals.lines_read += lines

    def done_with(self, size_bytes: int) -> None:
        """A block of this size is written."""
        self._taken_bytes -= size_bytes
        self._room.give_back(size_bytes)

    def close(self) -> None:
        """The file is done, or failed."""
        self.done_with(self._taken_bytes)


def _check(counts: LineCounts) -> None:
    if not counts.balanced:
        raise AccountingError(
            lines_in=counts.read,
            augmented=counts.augmented,
            rejected=counts.rejected,
            blank=counts.blank,
        )
