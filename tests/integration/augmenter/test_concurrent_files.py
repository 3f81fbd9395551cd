"""What files in work share: the pairs on their way, and the room for text."""

import asyncio
import gzip
import time
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.channel import open_channel
from services.augmenter.client.retry import OutageLogger, RetryBudget
from services.augmenter.client.rpc import SeniorityClient
from services.augmenter.errors import RpcFailedError
from services.augmenter.metrics import Metrics
from services.augmenter.pipeline import file_pipeline
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.line_blocks import PairLevels
from services.augmenter.stats import RunStats
from services.common.memory_budget import MemoryBudget
from tests.integration.augmenter.conftest import RunAugmenter, make_posting
from tests.support.model_server import (
    AbortCallError,
    ReceivedCall,
    answer_all,
    scripted_level,
    scripted_model,
)
from tests.support.model_server import Answers as Levels


def _pairs(*companies: str) -> list[Pair]:
    return [Pair(company, "Clerk") for company in companies]


def test_pairs_of_files_in_work_are_asked_once(augment: RunAugmenter, tmp_path: Path) -> None:
    """Four files of the same postings, in work together, cost the model each pair once."""
    source = tmp_path / "in"
    source.mkdir()
    lines = [make_posting(f"C{i}") for i in range(50)]
    for i in range(4):
        (source / f"{i}.jsonl").write_bytes(b"\n".join(lines[i:] + lines[:i]))

    def behave(call: ReceivedCall) -> Levels:
        time.sleep(0.2)  # long enough for all four to be read
        return answer_all(call)

    with scripted_model(behave) as model:
        assert augment(source, tmp_path / "out", "--target", model.target).exit_code == 0
        assert len(model.received_pairs()) == 50
    for i in range(4):
        levels = [scripted_level(f"C{(i + n) % 50}", "Clerk") for n in range(50)]
        made = (tmp_path / "out" / f"{i}.jsonl").read_bytes().splitlines()
        assert [int(line[-2:-1]) for line in made] == levels


def test_a_pair_of_the_text_in_hand_is_asked_once(augment: RunAugmenter, tmp_path: Path) -> None:
    """In the windows of one file each pair is one question, answered or not; the next run asks it again."""
    lines = b"".join(make_posting(f"C{i % 50}", filler="x" * 1000) + b"\n" for i in range(3000))
    (tmp_path / "in.jsonl").write_bytes(lines)
    with scripted_model(answer_all) as model:
        for asked in (50, 100):
            args = (tmp_path / "in.jsonl", f"{tmp_path}/out/", "--overwrite", "--target", model.target)
            assert augment(*args).exit_code == 0
            assert len(model.received_pairs()) == asked


@pytest.mark.parametrize(
    ("name", "kind", "most"), [("_MAX_FILE_BYTES", "", 30), ("_MAX_COMPRESSED_FILE_BYTES", ".gz", 300)]
)
def test_of_large_files_only_some_are_in_work(
    augment: RunAugmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, most: int
) -> None:
    """As many as there is memory for, compressed ones by about their text, and all of them in the end."""
    monkeypatch.setattr(file_pipeline, "_FILES_BUDGET_BYTES", 3 * most)
    monkeypatch.setattr(file_pipeline, name, most)
    source, sink = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(10):
        line = make_posting(f"C{i}")
        (source / f"{i}.jsonl{kind}").write_bytes(gzip.compress(line) if kind else line)
    in_work: list[int] = []

    def behave(call: ReceivedCall) -> Levels:
        in_work.append(len(list(sink.glob(".*"))))
        time.sleep(0.02)  # so that others would have begun
        return answer_all(call)

    with scripted_model(behave) as model:
        assert augment(source, sink, "--concurrency", "10", "--target", model.target).exit_code == 0
    assert max(in_work) == 3
    assert len(list(sink.glob("*.jsonl*"))) == 10


async def test_what_another_file_got_no_answer_to_is_asked_again() -> None:
    """A file whose budget is spent fails alone: who joined its pairs asks them on a budget of its own."""
    first_came = asyncio.Event()
    loop = asyncio.get_running_loop()

    def behave(call: ReceivedCall) -> Levels:
        if call.number == 0:
            loop.call_soon_threadsafe(first_came.set)
            time.sleep(0.2)
            raise AbortCallError(grpc.StatusCode.UNIMPLEMENTED)
        return answer_all(call)

    with scripted_model(behave) as model:
        async with open_channel(model.target) as channel:
            totals, metrics = RunStats(), Metrics(CollectorRegistry())
            rpc = SeniorityClient(
                channel, caller="t", priority="bulk", deadline_seconds=9, stats=totals, metrics=metrics
            )
            client, health = ProxyClient(rpc, batch_size=1000, stats=totals), OutageLogger(model.target)

            def ask(*companies: str) -> "asyncio.Task[PairLevels]":
                budget = RetryBudget(seconds=9, outage_logger=health)
                return asyncio.create_task(client.get_levels([_pairs(*companies)], budget, text_bytes=1))

            failing = ask("a", "b")
            await first_came.wait()
            joining = ask("b", "c")
            with pytest.raises(RpcFailedError):
                await failing
            answers = await joining
    assert answers.levels == bytes([scripted_level("b", "Clerk"), scripted_level("c", "Clerk")])
    assert sorted(model.received_pairs()) == [("a", "Clerk"), ("b", "Clerk"), ("b", "Clerk"), ("c", "Clerk")]


async def test_room_is_given_in_order_and_comes_back() -> None:
    """What does not fit waits, behind it everybody; what is larger than all of it gets in alone."""
    room = MemoryBudget(limit_bytes=10)
    await room.acquire(6)
    waiting = [asyncio.create_task(room.acquire(size)) for size in (50, 1)]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [False, False]
    room.release(6)
    await waiting[0]
    assert not waiting[1].done()
    room.release(50)
    await waiting[1]


async def test_who_is_cancelled_in_front_lets_the_others_in() -> None:
    """Cancelled while waiting, or just admitted: the room is there for the next."""
    room = MemoryBudget(limit_bytes=10)
    await room.acquire(6)
    first, second = asyncio.create_task(room.acquire(9)), asyncio.create_task(room.acquire(4))
    await asyncio.sleep(0)
    first.cancel()
    await second
    third = asyncio.create_task(room.acquire(6))
    await asyncio.sleep(0)
    room.release(6)
    third.cancel()  # admitted, and cancelled before it knew
    with pytest.raises(asyncio.CancelledError):
        await third
    await asyncio.wait_for(room.acquire(6), 5)
