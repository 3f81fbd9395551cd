"""One file: read, parse, ask, splice, write; the next window is read while this one is asked."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter import jsonl
from services.augmenter.errors import AccountingError
from services.augmenter.object_store.protocol import Item, Store
from services.augmenter.outputs import Output, Rejects
from services.augmenter.proxy_client import Answers, ProxyClient
from services.augmenter.retry import RetryBudget
from services.augmenter.tasks import read_ahead
from services.augmenter.totals import LineCounts, Totals
from services.common.codec import Decoder, Format
from services.common.lines import BOM, windows


@dataclass(frozen=True, slots=True)
class Window:
    """Lines in hand: as they were, stripped, and what they hold. `first` is the first one's number."""

    first: int
    lines: list[bytes]
    texts: list[bytes]
    entries: list[jsonl.Entry]

    def pairs(self) -> dict[jsonl.Pair, None]:
        """The distinct pairs, in order of appearance."""
        return dict.fromkeys(entry.pair for entry in self.entries if isinstance(entry, jsonl.Posting))


class Pipeline:
    """What every file's way through has in common."""

    def __init__(
        self, *, source: Store, sink: Store, rejects: Store, client: ProxyClient, totals: Totals
    ) -> None:
        self._source = source
        self._sink = sink
        self._rejects = rejects
        self._client = client
        self._totals = totals

    async def augment(
        self, item: Item, *, output_name: str, lines_format: Format, budget: RetryBudget
    ) -> LineCounts:
        """Make the output of one file, whole, its rejects before it. Raises FileError."""
        counts = LineCounts()
        async with (
            Output(self._sink.create(output_name, item), lines_format.encoder()) as output,
            Rejects(self._rejects, item, lines_format) as rejects,
            aclosing(read_windows(self._source, item, lines_format, self._totals)) as all_windows,
            aclosing(read_ahead(all_windows)) as ready_windows,
        ):
            async for window in ready_windows:
                counts.read += len(window.lines)
                answers = await self._client.ask(window.pairs(), budget)
                augmented, rejected = _settled(window, answers, counts)
                if rejected:
                    await rejects.write(rejected)
                await output.write(b"".join(augmented))
            if not counts.balanced:
                raise AccountingError(
                    lines_in=counts.read,
                    augmented=counts.augmented,
                    rejected=counts.rejected,
                    blank=counts.blank,
                )
            await rejects.complete()
            await output.complete()
        return counts


def _settled(
    window: Window, answers: Answers, counts: LineCounts
) -> tuple[list[bytes], list[tuple[int, bytes, str]]]:
    """Output lines in order, and rejected ones (number, bytes, reason); counts what became of each."""
    augmented: list[bytes] = []
    rejected: list[tuple[int, bytes, str]] = []
    blank = 0
    for place, (text, entry) in enumerate(zip(window.texts, window.entries, strict=True)):
        if isinstance(entry, jsonl.Posting):
            level = answers.levels.get(entry.pair)
            if level is not None:
                augmented.append(jsonl.augmented_line(text, entry, level))
                continue
            reason = answers.refused[entry.pair]
        elif entry is None:
            blank += 1
            continue
        else:
            reason = entry.reason
        rejected.append((window.first + place, window.lines[place], reason))
    counts.augmented += len(augmented)
    counts.rejected += len(rejected)
    counts.blank += blank
    return augmented, rejected


async def read_windows(
    source: Store, item: Item, lines_format: Format, totals: Totals
) -> AsyncGenerator[Window]:
    """The file's lines, parsed, in windows. Raises FileError."""
    first = 1
    async with (
        aclosing(source.read(item)) as chunks,
        aclosing(_decoded(chunks, lines_format.decoder(), totals)) as decoded,
        aclosing(windows(decoded)) as all_lines,
    ):
        async for lines in all_lines:
            texts = [jsonl.strip(line) for line in lines]
            if first == 1:  # a byte order mark belongs to the file, not to its first line
                texts[0] = jsonl.strip(lines[0].removeprefix(BOM))
            yield Window(first, lines, texts, jsonl.parse(texts))
            first += len(lines)
            totals.lines_read += len(lines)


async def _decoded(chunks: AsyncIterator[bytes], decoder: Decoder, totals: Totals) -> AsyncGenerator[bytes]:
    async for chunk in chunks:
        totals.bytes_read += len(chunk)
        for decoded in decoder.feed(chunk):
            yield decoded
    decoder.finish()
