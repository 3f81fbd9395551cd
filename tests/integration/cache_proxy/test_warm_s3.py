"""Test that `cache-proxy warm` resumes a read of S3 that breaks off."""

import json

from tests.support.processes import run_command
from tests.support.scripted_s3 import ENVIRONMENT, Fault, scripted_s3

_LINES = 40_000


def test_warm_with_broken_s3_stream_resumes_where_it_broke(shared_redis: str) -> None:
    """The second request asks only for the missing bytes, and every pair is in the cache."""
    lines = "".join(
        json.dumps({"company": f"Company {number}", "title": "Clerk", "seniority": 3}) + "\n"
        for number in range(_LINES)
    )
    with scripted_s3() as s3:
        s3.put("in/a.jsonl", lines.encode())
        s3.faults.append(Fault("GetObject", "cut", times=1))
        flags = (
            "--cache-url",
            shared_redis,
            "--key-prefix",
            "warm-resume",
            "--endpoint-url",
            s3.url,
            "--json",
        )
        ended = run_command("services.cache_proxy", "warm", *flags, f"s3://{s3.bucket}/in/", env=ENVIRONMENT)
        requests = [call for call in s3.requests if call.operation.startswith("GetObject")]
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["pairs"] == _LINES
    assert [call.operation for call in requests] == ["GetObject", "GetObject (range)"]
