"""Tests of what files in progress share: the in-flight pairs, and the memory budget."""

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
from services.augmenter.domain import Pair, PairLevels
from services.augmenter.errors import RpcFailedError
from services.augmenter.metrics import Metrics
from services.augmenter.pipeline import file_pipeline
from services.augmenter.stats import RunStats
from tests.integration.augmenter.conftest import RunAugmenter
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    answer_all,
    scripted_level,
    scripted_model,
)
from tests.support.postings import make_posting


def _pairs(*companies: str) -> list[Pair]:
    return [Pair(company, "Clerk") for company in companies]


def test_pairs_of_concurrent_files_are_sent_once(augment: RunAugmenter, tmp_path: Path) -> None:
    """Four concurrent files of the same postings send each pair to the model once."""
    source = tmp_path / "in"
    source.mkdir()
    lines = [make_posting(f"C{i}") for i in range(50)]
    for i in range(4):
        (source / f"{i}.jsonl").write_bytes(b"\n".join(lines[i:] + lines[:i]))

    def behave(call: ReceivedCall) -> Answers:
        # Long enough for all four files to be read.
        time.sleep(0.2)
        return answer_all(call)

    with scripted_model(behave) as model:
        assert augment(source, tmp_path / "out", "--target", model.target).exit_code == 0
        assert len(model.received_pairs()) == 50
    for i in range(4):
        levels = [scripted_level(f"C{(i + n) % 50}", "Clerk") for n in range(50)]
        output_lines = (tmp_path / "out" / f"{i}.jsonl").read_bytes().splitlines()
        assert [int(line[-2:-1]) for line in output_lines] == levels


def test_repeated_pair_of_a_file_is_sent_once(augment: RunAugmenter, tmp_path: Path) -> None:
    """A pair that occurs in many blocks of a file is sent once in a run, and once more in the next run."""
    lines = b"".join(make_posting(f"C{i % 50}", filler="x" * 1000) + b"\n" for i in range(3000))
    (tmp_path / "in.jsonl").write_bytes(lines)
    with scripted_model(answer_all) as model:
        for expected in (50, 100):
            args = (tmp_path / "in.jsonl", f"{tmp_path}/out/", "--overwrite", "--target", model.target)
            assert augment(*args).exit_code == 0
            assert len(model.received_pairs()) == expected


@pytest.mark.parametrize(
    ("name", "suffix", "size"), [("_MAX_FILE_BYTES", "", 30), ("_MAX_COMPRESSED_FILE_BYTES", ".gz", 300)]
)
def test_number_of_large_files_in_progress_is_bounded(
    augment: RunAugmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, size: int
) -> None:
    """Only as many large files are processed at a time as fit into the memory budget, and all in the end.

    A compressed file counts by the approximate size of its text.
    """
    monkeypatch.setattr(file_pipeline, "_FILES_BUDGET_BYTES", 3 * size)
    monkeypatch.setattr(file_pipeline, name, size)
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    for i in range(10):
        line = make_posting(f"C{i}")
        (source / f"{i}.jsonl{suffix}").write_bytes(gzip.compress(line) if suffix else line)
    in_progress: list[int] = []

    def behave(call: ReceivedCall) -> Answers:
        in_progress.append(len(list(sink.glob(".*"))))
        # Long enough for other files to begin.
        time.sleep(0.02)
        return answer_all(call)

    with scripted_model(behave) as model:
        assert augment(source, sink, "--concurrency", "10", "--target", model.target).exit_code == 0
    assert max(in_progress) == 3
    assert len(list(sink.glob("*.jsonl*"))) == 10


async def test_pair_that_failed_for_another_file_is_sent_again() -> None:
    """When a file fails, another file that waits for the same pairs sends them with its own retry budget."""
    first_call_received = asyncio.Event()
    loop = asyncio.get_running_loop()

    def behave(call: ReceivedCall) -> Answers:
        if call.number == 0:
            loop.call_soon_threadsafe(first_call_received.set)
            time.sleep(0.2)
            raise AbortCallError(grpc.StatusCode.UNIMPLEMENTED)
        return answer_all(call)

    with scripted_model(behave) as model:
        async with open_channel(model.target) as channel:
            stats = RunStats()
            metrics = Metrics(CollectorRegistry())
            rpc = SeniorityClient(
                channel, caller="t", priority="bulk", deadline_seconds=9, stats=stats, metrics=metrics
            )
            client = ProxyClient(rpc, batch_size=1000, stats=stats)
            outage_logger = OutageLogger(model.target)

            def request(*companies: str) -> "asyncio.Task[PairLevels]":
                budget = RetryBudget(seconds=9, outage_logger=outage_logger)
                return asyncio.create_task(client.get_levels([_pairs(*companies)], budget, text_bytes=1))

            failing = request("a", "b")
            await first_call_received.wait()
            joining = request("b", "c")
            with pytest.raises(RpcFailedError):
                await failing
            answers = await joining
    assert answers.levels == bytes([scripted_level("b", "Clerk"), scripted_level("c", "Clerk")])
    assert sorted(model.received_pairs()) == [("a", "Clerk"), ("b", "Clerk"), ("b", "Clerk"), ("c", "Clerk")]
