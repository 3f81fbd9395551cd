"""Fixtures of the augmenter's tests: a model stub, S3 and SQS servers, and the command in this process."""

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from services.augmenter.cli import cli
from services.common import options
from tests.support.processes import ServiceProcess, model_stub
from tests.support.s3_bucket import Bucket
from tests.support.s3_server import S3Server, s3_server
from tests.support.sqs_server import SqsQueue, SqsServer, sqs_server


@dataclass(frozen=True)
class RunResult:
    """Exit code and output of a run."""

    exit_code: int
    stdout: str
    stderr: str


RunAugmenter: TypeAlias = Callable[..., RunResult]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove flags and credentials of the developer from the environment."""
    for name in [name for name in os.environ if name.startswith(("AUGMENTER_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)


@pytest.fixture
def augment(capsys: pytest.CaptureFixture[str]) -> RunAugmenter:
    """Return a function that runs `augmenter run` with its arguments.

    It runs in this process, since a process takes a second to start.
    """

    def run(*args: object) -> RunResult:
        capsys.readouterr()
        level = logging.root.level
        try:
            with pytest.raises(SystemExit) as exit_info:
                options.run_command(cli, program="augmenter", args=["run", *map(str, args)])
        finally:
            # Otherwise, a run with --log-level error would hide log lines from other tests.
            logging.root.setLevel(level)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return RunResult(int(exit_info.value.code or 0), out, err)

    return run


@dataclass(frozen=True)
class RunningStub:
    """A running model stub and the log of its calls."""

    target: str
    log_path: Path


StartStub: TypeAlias = Callable[..., RunningStub]


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStub]:
    """Start a model without a limit that answers in scrambled order.

    It rejects pairs with POISON, and names the index of those with NAMED.
    """
    log = tmp_path_factory.mktemp("stub") / "calls.jsonl"
    with _start_stub(log, "--fail", "scramble,poison=POISON,poison-named=NAMED") as running:
        yield RunningStub(running.target, log)


@pytest.fixture
def stub_with(tmp_path: Path) -> Iterator[StartStub]:
    """Return a function that starts a stub with the given faults."""
    with ExitStack() as stack:

        def start(*args: str) -> RunningStub:
            log = tmp_path / f"calls-{len(args)}.log"
            return RunningStub(stack.enter_context(_start_stub(log, *args)).target, log)

        yield start


def _start_stub(log: Path, *args: str) -> AbstractContextManager[ServiceProcess]:
    return model_stub("--rate", "0", "--latency", "0s", "--log", str(log), *args)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start an S3 server for the whole session."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Create a bucket for one test, and set its credentials in the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(s3, f"test-{random.SystemRandom().randrange(2**40):x}")


@pytest.fixture(scope="session")
def sqs(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqsServer]:
    """Start an SQS server for the whole session."""
    with sqs_server(tmp_path_factory.mktemp("sqs"), s3.environment) as server:
        yield server


MakeQueue: TypeAlias = Callable[..., SqsQueue]


@pytest.fixture
def make_queue(sqs: SqsServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> MakeQueue:
    """Return a function that creates a queue, with its server in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", sqs.endpoint_url)

    def make(**settings: Any) -> SqsQueue:
        return sqs.create_queue(f"test-{random.SystemRandom().randrange(2**40):x}", **settings)

    return make


def sqs_run_args(bucket: Bucket, queue: SqsQueue, target: str) -> list[str]:
    """Return the arguments of a run that takes the bucket's files from a queue."""
    return [
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--endpoint-url",
        bucket.endpoint_url,
        "--sqs-queue-url",
        queue.url,
        "--target",
        target,
    ]


def read_reasons(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the reasons that were written for a file's rejected lines."""
    path = folder / f"{name}.reasons.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
