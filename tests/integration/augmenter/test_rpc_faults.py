"""Tests of error statuses, trailers and invalid responses of the server."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.augmenter.conftest import RunAugmenter, RunResult, StartStub, read_reasons
from tests.support.model_server import (
    AbortWith,
    Behaviour,
    Response,
    answer_threes,
    bad_request_details,
    in_sequence,
    scripted_model,
)
from tests.support.postings import make_posting
from tests.support.processes import read_stub_log
from tests.support.redis_server import wait_for

Run = Callable[..., RunResult]
_PUSHBACK = "grpc-retry-pushback-ms"


@pytest.fixture
def run(augment: RunAugmenter, tmp_path: Path) -> Run:
    """Return a function that augments a file of five postings, C0 to C4, into out/a.jsonl."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(make_posting(f"C{i}") + b"\n" for i in range(5)))

    def run(target: str, *args: str) -> RunResult:
        return augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", target, *args)

    return run


@pytest.mark.parametrize(
    "step",
    [
        *(
            AbortWith(code)
            for code in (
                StatusCode.UNAVAILABLE,
                StatusCode.DEADLINE_EXCEEDED,
                StatusCode.ABORTED,
                StatusCode.INTERNAL,
                StatusCode.UNKNOWN,
                StatusCode.CANCELLED,
            )
        ),
        AbortWith(StatusCode.RESOURCE_EXHAUSTED, trailers=((_PUSHBACK, "10"),)),
        lambda call: answer_threes(call)[1:],
        lambda call: [*answer_threes(call)[1:], (call.ids[0] + 1, 3)],
        lambda call: [*answer_threes(call), (99, 3)],
        lambda call: [*answer_threes(call)[1:], (0, 3)],
        lambda call: [(uuid, 8) for uuid, _ in answer_threes(call)],
        lambda call: [(uuid, 0) for uuid, _ in answer_threes(call)],
    ],
)
def test_transient_failure_is_retried_and_logged_once(run: Run, tmp_path: Path, step: Behaviour) -> None:
    """A transient status or an invalid response is retried, and failure and recovery are logged once each."""
    with scripted_model(in_sequence(step, step)) as model:
        result = run(model.target)
    assert result.exit_code == 0
    assert [call.companies for call in model.calls] == [[f"C{i}" for i in range(5)]] * 3
    assert b'"seniority": 3}' in (tmp_path / "out" / "a.jsonl").read_bytes()
    assert [("retrying" in line, "answers again" in line) for line in result.stderr.splitlines()] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    "step",
    [
        AbortWith(StatusCode.RESOURCE_EXHAUSTED),
        AbortWith(StatusCode.UNAUTHENTICATED),
        AbortWith(StatusCode.PERMISSION_DENIED),
        AbortWith(StatusCode.UNIMPLEMENTED),
        AbortWith(StatusCode.NOT_FOUND),
        AbortWith(StatusCode.UNAVAILABLE, trailers=((_PUSHBACK, "-1"),)),
        AbortWith(StatusCode.UNAVAILABLE, trailers=((_PUSHBACK, "soon"),)),
        AbortWith(StatusCode.RESOURCE_EXHAUSTED, trailers=((_PUSHBACK, "3600000"),)),
    ],
)
def test_permanent_failure_fails_the_file_without_retry(run: Run, tmp_path: Path, step: AbortWith) -> None:
    """A permanent status, or a pushback beyond the retry budget, fails the file after one call.

    The server's text is not shown, since it may quote a pair.
    """
    with scripted_model(in_sequence(step)) as model:
        result = run(model.target)
    assert result.exit_code == 1
    assert len(model.calls) == 1
    failure = result.stderr.splitlines()[-1]
    prefix = f"augmenter: {tmp_path}/a.jsonl"
    assert failure.startswith(f"{prefix}: {model.target} answered {step.code.name}")
    assert "scripted" not in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_pushback_is_honoured(run: Run) -> None:
    """A failed RPC is not retried before the delay that the server demanded."""
    with scripted_model(
        in_sequence(AbortWith(StatusCode.UNAVAILABLE, trailers=((_PUSHBACK, "600"),)))
    ) as model:
        started = time.monotonic()
        assert run(model.target).exit_code == 0
    assert time.monotonic() - started > 0.6


def test_budget_ends_retries(run: Run) -> None:
    """A server that never recovers costs a file its retry budget, and the last status is reported."""
    steps = [AbortWith(StatusCode.UNAVAILABLE, message=f"no {i}") for i in range(100)]
    with scripted_model(in_sequence(*steps)) as model:
        started = time.monotonic()
        result = run(model.target, "--retry-budget", "500ms")
    assert result.exit_code == 1
    assert 0.5 <= time.monotonic() - started < 30
    [seconds] = re.findall(r"answered UNAVAILABLE \(retried for (\d+\.\d) s\)", result.stderr)
    assert float(seconds) >= 0.5


@pytest.mark.slow
def test_slow_rpc_ends_at_its_deadline(run: Run, stub_with: StartStub) -> None:
    """An RPC without a response ends at --deadline, and is retried like one that failed."""
    stub = stub_with("--fail", "hang")
    result = run(stub.target, "--deadline", "100ms", "--retry-budget", "2s")
    assert result.exit_code == 1
    assert "DEADLINE_EXCEEDED" in result.stderr.splitlines()[-1]
    wait_for(lambda: len(read_stub_log(stub.log_path)) >= 2, description="two calls are logged")


@pytest.mark.parametrize(
    "code", [StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.FAILED_PRECONDITION]
)
def test_named_pairs_are_rejected_with_their_reasons(run: Run, tmp_path: Path, code: StatusCode) -> None:
    """Pairs that the status details name become rejected lines. The others are sent again, once."""
    first = bad_request_details(("batch[1]", "too odd"), ("batch[3].title", "too long"))
    second = bad_request_details(("batch[0].company", ""))
    with scripted_model(
        in_sequence(AbortWith(code, trailers=first), AbortWith(code, trailers=second))
    ) as model:
        assert run(model.target).exit_code == 3
    assert [call.companies for call in model.calls] == [
        ["C0", "C1", "C2", "C3", "C4"],
        ["C0", "C2", "C4"],
        ["C2", "C4"],
    ]
    assert read_reasons(tmp_path / "out" / "_rejects", "a.jsonl") == [
        {"line": 1, "reason": "scripted"},
        {"line": 2, "reason": "too odd"},
        {"line": 4, "reason": "too long"},
    ]


@pytest.mark.parametrize(
    "trailers",
    [
        (),
        (("grpc-status-details-bin", b"\xff\xff"),),
        bad_request_details(),
        bad_request_details(
            ("batch", "which?"), ("batch[5]", "none"), ("batch[-1]", "none"), ("x[1]", "none")
        ),
    ],
)
def test_rejection_without_named_pairs_is_bisected(
    run: Run, tmp_path: Path, trailers: tuple[tuple[str, bytes], ...]
) -> None:
    """If the server rejects a batch without naming pairs, the batch is bisected until the pair is found."""
    rejection = AbortWith(StatusCode.INVALID_ARGUMENT, message="no", trailers=trailers)
    good = answer_threes
    with scripted_model(in_sequence(rejection, good, rejection, good, rejection, rejection, good)) as model:
        assert run(model.target).exit_code == 3
    halves = [["C0", "C1", "C2", "C3", "C4"], ["C0", "C1"], ["C2", "C3", "C4"], ["C2"], ["C3", "C4"], ["C3"]]
    assert [call.companies for call in model.calls] == [*halves, ["C4"]]
    assert read_reasons(tmp_path / "out" / "_rejects", "a.jsonl") == [{"line": 4, "reason": "no"}]


def test_caller_and_priority_are_sent_and_cache_trailers_counted(run: Run, tmp_path: Path) -> None:
    """Each call has caller and priority as metadata. The proxy's cache hits are in the summary."""
    trailers = (("x-cache-hits", "4"), ("x-cache-misses", "1"))
    with scripted_model(in_sequence(lambda call: Response(answer_threes(call), trailers))) as model:
        summary = tmp_path / "s.json"
        result = run(
            model.target, "--caller", "me", "--priority", "interactive", "--summary-json", str(summary)
        )
    assert (model.calls[0].metadata["x-caller"], model.calls[0].metadata["x-priority"]) == (
        "me",
        "interactive",
    )
    assert json.loads(summary.read_text())["pairs"] == {"asked": 5, "hits": 4, "misses": 1}
    assert "hit rate 80.0%" in result.stdout


def test_cache_hits_of_a_retry_are_not_counted(run: Run, tmp_path: Path) -> None:
    """Cache hits of a retried call are not counted, since the failed call may have filled the cache."""
    trailers = (("x-cache-hits", "4"), ("x-cache-misses", "0"))
    rejection = AbortWith(StatusCode.INVALID_ARGUMENT, trailers=bad_request_details(("batch[1]", "too odd")))
    with scripted_model(
        in_sequence(rejection, lambda call: Response(answer_threes(call), trailers))
    ) as model:
        assert run(model.target, "--summary-json", str(tmp_path / "s.json")).exit_code == 3
    pairs = json.loads((tmp_path / "s.json").read_text())["pairs"]
    assert pairs == {"asked": 5, "hits": 0, "misses": 0}
