"""Logs at level info never contain the text of a pair, whatever fails."""

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

pytestmark = pytest.mark.slow

_ERROR_TEXT = "cannot rate the Canary Chief of Canary & Co"
_CALLER = "can-ary"


def _behave_by_company(call: ReceivedCall) -> Answers:
    """Fail in the way that the last word of a company selects, with a message that quotes the pair."""
    kind = max({company.split()[-1] for company, _ in call.pairs}, key=lambda one: one != "well")
    if kind == "refused":
        raise AbortCallError(StatusCode.INVALID_ARGUMENT, _ERROR_TEXT)
    if kind == "named":
        raise AbortCallError(
            StatusCode.INVALID_ARGUMENT, _ERROR_TEXT, bad_request_details(("batch[0].title", _ERROR_TEXT))
        )
    if kind == "broken":
        raise ValueError(_ERROR_TEXT)
    if kind == "down":
        raise AbortCallError(StatusCode.UNAVAILABLE, _ERROR_TEXT)
    if kind == "absurd":
        return [(uuid, 99) for uuid in call.ids]
    if kind == "mute":
        return []
    return answer_all(call)


def test_pairs_that_fail_are_in_no_log(tmp_path: Path) -> None:
    """The model rejects pairs, fails and returns invalid levels; lines are invalid; a file fails.

    Callers and the rejects file get the model's message. The logs of both services do not contain it.
    """
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
        scripted_model(_behave_by_company) as model,
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
        open_caller(proxy.target) as caller,
    ):
        for kind in ("refused", "named", "broken", "down", "absurd", "mute", "well", "long" * 30):
            pair = (f"Canary & Co {kind}", "Canary Chief")
            replies[kind] = caller.infer([pair], metadata=[("x-caller", _CALLER)])
            # Until then the proxy regards the model as down.
            time.sleep((replies[kind].pushback_ms or 0) / 1000)
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
            assert _ERROR_TEXT in rejects
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
    assert all(_ERROR_TEXT in replies[kind].message for kind in ("refused", "named", "broken", "down"))
    assert "a call to the model failed, trying again" in proxy.log
    assert "the model answers again" in proxy.log
    assert "Canary" not in proxy.log
    assert _CALLER not in proxy.log
    assert all(json.loads(line)["message"] for line in proxy.log.splitlines())
