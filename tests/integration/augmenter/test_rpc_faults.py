"""Statuses, trailers and nonsense from the other side of the wire, and what the augmenter makes of them."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.augmenter.conftest import (
    RunAugmenter,
    RunResult,
    StartStub,
    make_posting,
    read_reasons,
)
from tests.support.model_server import (
    AbortWith,
    Behaviour,
    Response,
    answer_threes,
    bad_request_details,
    in_sequence,
    scripted_model,
)
from tests.support.processes import read_stub_log
from tests.support.redis_server import wait_for

Run = Callable[..., RunResult]
_PUSHBACK = "grpc-retry-pushback-ms"


@pytest.fixture
def run(augment: RunAugmenter, tmp_path: Path) -> Run:
    """Augment a file of five postings, C0 to C4, into out/a.jsonl."""
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
def test_passing_trouble_is_retried(run: Run, tmp_path: Path, step: Behaviour) -> None:
    """What may pass, and an answer that makes no sense, is asked again; told once, and once when over."""
    with scripted_model(in_sequence(step, step)) as model:
        ended = run(model.target)
    assert ended.exit_code == 0
    assert [call.companies for call in model.calls] == [[f"C{i}" for i in range(5)]] * 3
    assert b'"seniority": 3}' in (tmp_path / "out" / "a.jsonl").read_bytes()
    assert [("retrying" in line, "answers again" in line) for line in ended.stderr.splitlines()] == [
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
def test_lasting_trouble_fails_the_file_at_once(run: Run, tmp_path: Path, step: AbortWith) -> None:
    """What will not pass, or not within the budget, fails the file with its status after one call.

    The server's own words are left out: they may quote a pair.
    """
    with scripted_model(in_sequence(step)) as model:
        ended = run(model.target)
    assert ended.exit_code == 1
    assert len(model.calls) == 1
    failure = ended.stderr.splitlines()[-1]
    place = f"augmenter: {tmp_path}/a.jsonl"
    assert failure.startswith(f"{place}: {model.target} answered {step.code.name}")
    assert "scripted" not in ended.stderr
    assert not list((tmp_path / "out").iterdir())


def test_pushback_is_honoured(run: Run) -> None:
    """A retry does not come before the server wants it."""
    with scripted_model(
        in_sequence(AbortWith(StatusCode.UNAVAILABLE, trailers=((_PUSHBACK, "600"),)))
    ) as model:
        started = time.monotonic()
        assert run(model.target).exit_code == 0
    assert time.monotonic() - started > 0.6


def test_budget_ends_retries(run: Run) -> None:
    """A server that never recovers costs a file its retry budget, and the last status is told."""
    steps = [AbortWith(StatusCode.UNAVAILABLE, message=f"no {i}") for i in range(100)]
    with scripted_model(in_sequence(*steps)) as model:
        started = time.monotonic()
        ended = run(model.target, "--retry-budget", "500ms")
    assert ended.exit_code == 1
    assert 0.5 <= time.monotonic() - started < 30
    [seconds] = re.findall(r"answered UNAVAILABLE \(retried for (\d+\.\d) s\)", ended.stderr)
    assert float(seconds) >= 0.5


@pytest.mark.slow
def test_slow_rpc_ends_at_its_deadline(run: Run, stub_with: StartStub) -> None:
    """An RPC that is never answered ends at --deadline, and is retried like one that failed."""
    stub = stub_with("--fail", "hang")
    ended = run(stub.target, "--deadline", "100ms", "--retry-budget", "2s")
    assert ended.exit_code == 1
    assert "DEADLINE_EXCEEDED" in ended.stderr.splitlines()[-1]
    wait_for(lambda: len(read_stub_log(stub.log_path)) >= 2, description="two calls are logged")


@pytest.mark.parametrize(
    "code", [StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.FAILED_PRECONDITION]
)
def test_named_pairs_are_rejected_with_their_reasons(run: Run, tmp_path: Path, code: StatusCode) -> None:
    """Pairs that the refusal names become rejected lines with its words; the rest is asked again, once."""
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
def test_unnamed_refusal_is_halved(run: Run, tmp_path: Path, trailers: tuple[tuple[str, bytes], ...]) -> None:
    """A refusal that names no pair of the batch is narrowed down by halves to the one that causes it."""
    refused = AbortWith(StatusCode.INVALID_ARGUMENT, message="no", trailers=trailers)
    good = answer_threes
    with scripted_model(in_sequence(refused, good, refused, good, refused, refused, good)) as model:
        assert run(model.target).exit_code == 3
    halves = [["C0", "C1", "C2", "C3", "C4"], ["C0", "C1"], ["C2", "C3", "C4"], ["C2"], ["C3", "C4"], ["C3"]]
    assert [call.companies for call in model.calls] == [*halves, ["C4"]]
    assert read_reasons(tmp_path / "out" / "_rejects", "a.jsonl") == [{"line": 4, "reason": "no"}]


def test_caller_priority_and_cache_trailers(run: Run, tmp_path: Path) -> None:
    """Each call says who asks and how urgently; what the proxy says of its cache is in the summary."""
    told = (("x-cache-hits", "4"), ("x-cache-misses", "1"))
    with scripted_model(in_sequence(lambda call: Response(answer_threes(call), told))) as model:
        summary = tmp_path / "s.json"
        ended = run(
            model.target, "--caller", "me", "--priority", "interactive", "--summary-json", str(summary)
        )
    assert (model.calls[0].metadata["x-caller"], model.calls[0].metadata["x-priority"]) == (
        "me",
        "interactive",
    )
    assert json.loads(summary.read_text())["pairs"] == {"asked": 5, "hits": 4, "misses": 1}
    assert "hit rate 80.0%" in ended.stdout


def test_hits_of_a_repeated_call_are_not_counted(run: Run, tmp_path: Path) -> None:
    """A failed call may have filled the cache: what its repetition hits says nothing of the cache before."""
    told = (("x-cache-hits", "4"), ("x-cache-misses", "0"))
    refused = AbortWith(StatusCode.INVALID_ARGUMENT, trailers=bad_request_details(("batch[1]", "too odd")))
    with scripted_model(in_sequence(refused, lambda call: Response(answer_threes(call), told))) as model:
        assert run(model.target, "--summary-json", str(tmp_path / "s.json")).exit_code == 3
    pairs = json.loads((tmp_path / "s.json").read_text())["pairs"]
    assert pairs == {"asked": 5, "hits": 0, "misses": 0}
