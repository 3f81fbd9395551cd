"""`model-stub serve`: capacity, faults, the log that judges."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from services.common import options
from services.model_stub.cli import cli
from services.model_stub.levels import infer_level
from tests.support.caller import Caller, make_pairs, open_caller
from tests.support.processes import model_stub, read_stub_log, run_command
from tests.support.redis_server import wait_for


@dataclass(frozen=True)
class Stub:
    """A running stub, a caller of it, and its log."""

    caller: Caller
    log: Path

    def calls(self) -> list[dict[str, Any]]:
        """What it logged."""
        return read_stub_log(self.log)


StubWith = Callable[..., Stub]
FAST = ("--rate", "0", "--latency", "0s")


@pytest.fixture
def stub_with(tmp_path: Path) -> Iterator[StubWith]:
    """Start a stub with these flags."""
    with ExitStack() as stack:

        def start(*args: str) -> Stub:
            log = tmp_path / "calls.jsonl"
            running = stack.enter_context(model_stub("--log", str(log), *args))
            return Stub(stack.enter_context(open_caller(running.target)), log)

        yield start


def test_stub_answers_by_uuid_and_logs_every_call(stub_with: StubWith) -> None:
    """Levels for each uuid; a line a call with its time, pairs and levels."""
    stub = stub_with(*FAST)
    pairs = [("Acme", "Ünicode\n"), ("", ""), ("Acme", "CEO")]
    before = time.time()
    reply = stub.caller.infer(pairs, uuids=[5, -1, 5])
    levels = [infer_level(*pair) for pair in pairs]
    assert (reply.uuids, reply.levels) == ([5, -1, 5], levels)
    [call] = stub.calls()
    assert before <= call["at"] <= time.time()
    assert (call["code"], call["levels"], call["queued_seconds"]) == ("OK", levels, 0)
    assert call["pairs"] == [list(pair) for pair in pairs]


def test_concurrent_batches_wait_for_capacity(stub_with: StubWith) -> None:
    """Five calls at once, each a slot of 100 ms: the last waits for four, one pair or many."""
    stub = stub_with("--rate", "10000", "--latency", "0s")
    started_at = time.monotonic()
    requests = [stub.caller.start_infer(make_pairs("c", size)) for size in (1, 1000, 1, 500, 1)]
    assert all(one.result().code is StatusCode.OK for one in requests)
    assert time.monotonic() - started_at >= 0.4
    waits = sorted(call["queued_seconds"] for call in stub.calls())
    assert all(wait <= 0.1 * ahead + 1e-6 for ahead, wait in enumerate(waits))


def test_batch_over_limit_is_rejected(stub_with: StubWith) -> None:
    """As the model refuses it, naming the limit."""
    stub = stub_with(*FAST)
    reply = stub.caller.infer(make_pairs("c", 1001))
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert "1000" in reply.message
    assert stub.caller.infer(make_pairs("c", 1000)).code is StatusCode.OK


def test_each_fault_is_simulated_and_logged(stub_with: StubWith) -> None:
    """Poison refuses, named or not, in any spelling; scrambled answers still join; the log has the codes."""
    stub = stub_with(*FAST, "--fail", "scramble,poison=BAD,poison-named=WORSE")
    reply = stub.caller.infer([("fine", "t"), ("So Ｂａｄ", "t")])  # noqa: RUF001
    assert (reply.code, reply.violations) == (StatusCode.INVALID_ARGUMENT, {})
    named = stub.caller.infer([("fine", "t"), ("fine", "t"), ("c", "worse still")])
    assert (named.code, list(named.violations)) == (StatusCode.INVALID_ARGUMENT, ["batch[2]"])
    pairs = make_pairs("scrambled", 200)
    mixed = stub.caller.infer(pairs)
    assert mixed.uuids != list(range(200))
    assert dict(zip(mixed.uuids, mixed.levels, strict=True)) == {
        number: infer_level(*pair) for number, pair in enumerate(pairs)
    }
    assert [call["code"] for call in stub.calls()] == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "OK"]


@pytest.mark.parametrize("fault", ["missing@0.3", "range@0.3", "code=UNAVAILABLE@0.3"])
def test_fault_share_applies_to_that_share_of_calls(stub_with: StubWith, fault: str) -> None:
    """Of many, about as many as told: answers for `missing` and `range`, calls for `code`."""
    stub = stub_with(*FAST, "--fail", fault)
    if fault.startswith("code"):
        codes = [stub.caller.infer([("c", "t")]).code for _ in range(200)]
        assert set(codes) == {StatusCode.OK, StatusCode.UNAVAILABLE}
        hit = codes.count(StatusCode.UNAVAILABLE) * 5
    else:
        levels = dict(
            zip(*((reply := stub.caller.infer(make_pairs("c", 1000))).uuids, reply.levels), strict=True)
        )
        assert set(levels.values()) <= {*range(1, 8), 9}
        hit = 1000 - len(levels) + list(levels.values()).count(9)
    assert 150 < hit < 450


def test_hanging_call_ends_with_its_caller(stub_with: StubWith) -> None:
    """`hang`: never answered, and logged as cancelled once the caller is gone."""
    stub = stub_with(*FAST, "--fail", "hang")
    assert stub.caller.infer([("c", "t")], timeout_seconds=2).code is StatusCode.DEADLINE_EXCEEDED
    wait_for(
        lambda: [call["code"] for call in stub.calls()] == ["CANCELLED"], description="the call is logged"
    )


@pytest.mark.parametrize(
    "args",
    [
        ("--fail", "nothing"),
        ("--fail", "code=NOPE"),
        ("--fail", "missing@2"),
        ("--fail", "hang@nan"),
        ("--fail", "poison="),
        ("--fail", "scramble@0.5"),
        ("--rate", "-1"),
        ("--rate", "nan"),
        ("--latency", "slow"),
        ("--max-batch", "0"),
        ("--listen", "nowhere"),
        ("--listen", "127.0.0.1:70000"),
    ],
    ids=" ".join,
)
def test_invalid_value_is_exit_code_2_and_one_line(
    args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Named by its flag."""
    with pytest.raises(SystemExit) as end:
        options.run_command(cli, program="model-stub", args=["serve", *args])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert args[0] in err


def test_unwritable_log_is_one_line(tmp_path: Path) -> None:
    """Exit code 1, before it listens."""
    ended = run_command("services.model_stub", "serve", "--log", str(tmp_path / "no" / "log"))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "--log" in ended.stderr
