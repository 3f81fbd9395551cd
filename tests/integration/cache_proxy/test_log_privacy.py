"""Whatever goes wrong over a pair, no log at info has a word of it."""

import json
import time
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import RpcResult, open_caller
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    answer_all,
    bad_request_details,
    scripted_model,
)
from tests.support.processes import cache_proxy, run_command

pytestmark = pytest.mark.slow  # two processes and what they go through

_WORDS = "cannot rate the Canary Chief of Canary & Co"
_CALLER = "can-ary"


def _by_company(call: ReceivedCall) -> Answers:
    """Fail over a pair as its company says, in words that quote it."""
    kind = max({company.split()[-1] for company, _ in call.pairs}, key=lambda one: one != "well")
    if kind == "refused":
        raise AbortCallError(StatusCode.INVALID_ARGUMENT, _WORDS)
    if kind == "named":
        raise AbortCallError(
            StatusCode.INVALID_ARGUMENT, _WORDS, bad_request_details(("batch[0].title", _WORDS))
        )
    if kind == "broken":
        raise ValueError(_WORDS)
    if kind == "down":
        raise AbortCallError(StatusCode.UNAVAILABLE, _WORDS)
    if kind == "absurd":
        return [(uuid, 99) for uuid in call.ids]
    if kind == "mute":
        return []
    return answer_all(call)


def test_no_pair_is_in_a_log(tmp_path: Path) -> None:
    """Pairs that the model refuses, breaks down over, or answers absurdly, lines that cannot be read, a file
    that is given up: callers and rejects learn the model's words, the logs of both services do not.
    """  # noqa: D205 - one thought
    source = tmp_path / "in"
    source.mkdir()
    (source / "bad.jsonl").write_text(
        '{"company": "Canary & Co", "title": Canary}\n{"company": "Canary & Co refused", "title": "Chief"}\n'
        '{"company": "Canary & Co well", "title": "Chief"}\n'
        '{"company": "Canary & Co"}\n{"title": 7, "company": "Canary & Co"}\n["Canary"]\n'
    )
    (source / "down.jsonl").write_text('{"company": "Canary & Co down", "title": "Canary Chief"}\n')
    replies: dict[str, RpcResult] = {}
    with (
        scripted_model(_by_company) as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            "--max-field-bytes",
            "100",
            "--model-retry-window",
            "500ms",
        ) as proxy,
        open_caller(proxy.target) as asking,
    ):
        for kind in ("refused", "named", "broken", "down", "absurd", "mute", "well", "long" * 30):
            pair = (f"Canary & Co {kind}", "Canary Chief")
            replies[kind] = asking.start_infer([pair], metadata=[("x-caller", _CALLER)]).result()
            time.sleep((replies[kind].pushback_ms or 0) / 1000)  # until then the model counts as down
        for target, log_format in ((proxy.target, "text"), (model.target, "json")):
            ended = run_command(
                "services.augmenter",
                "run",
                f"{source}/",
                f"{tmp_path}/out-{target[-5:]}/",
                "--target",
                target,
                "--retry-budget",
                "300ms",
                "--concurrency",
                "1",
                "--log-format",
                log_format,
                "--summary-json",
                str(tmp_path / "summary.json"),
            )
            assert ended.returncode == 1
            assert "answered UN" in ended.stderr
            assert "retrying" in ended.stderr
            assert "Canary" not in ended.stderr + ended.stdout + (tmp_path / "summary.json").read_text()
            rejects = next(tmp_path.glob(f"out-{target[-5:]}/_rejects/*.reasons.jsonl")).read_text()
            assert _WORDS in rejects
        assert proxy.stop() == 0
    codes = {kind[:7]: reply.code.name for kind, reply in replies.items()}
    assert codes == {
        "refused": "INVALID_ARGUMENT",
        "named": "INVALID_ARGUMENT",
        "broken": "UNAVAILABLE",
        "down": "UNAVAILABLE",
        "absurd": "INTERNAL",
        "mute": "INTERNAL",
        "well": "OK",
        "longlon": "INVALID_ARGUMENT",
    }
    assert all(_WORDS in replies[kind].message for kind in ("refused", "named", "broken", "down"))
    assert "a call to the model failed, trying again" in proxy.log
    assert "the model answers again" in proxy.log
    assert "Canary" not in proxy.log
    assert _CALLER not in proxy.log
    assert all(json.loads(line)["message"] for line in proxy.log.splitlines())
