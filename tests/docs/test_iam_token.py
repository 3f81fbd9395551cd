"""The script of docs/operations.md that keeps an IAM token in a file."""

import hashlib
import hmac
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote

import pytest

from tests.support.processes import ROOT, clean_environment
from tests.support.redis_server import wait_for

_KEY = "AKIDEXAMPLE"
_SECRET = "wJalrXUtnFEMI"


@pytest.fixture(params=[("elasticache", ()), ("memorydb", ()), ("elasticache", ("serverless",))])
def token(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """What the script writes for a service."""
    service, more = request.param
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    found = re.search(r'^```python\n("""Keep an IAM token.*?)^```$', page, re.MULTILINE | re.DOTALL)
    assert found
    path = tmp_path / "token"
    process = subprocess.Popen(
        [sys.executable, "-c", found[1], service, "my-cache", "svc/x", "eu-west-1", str(path), *more],
        env=clean_environment() | {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET},
    )
    try:
        wait_for(path.exists, description="the token is there")
        assert path.stat().st_mode & 0o777 == 0o600
        assert [one.name for one in tmp_path.iterdir()] == ["token"]
        yield service, path.read_text()
    finally:
        process.kill()
        process.wait()


def test_iam_token_is_a_presigned_request_to_connect(token: tuple[str, str]) -> None:
    """It has no scheme, is valid for 900 s, and its signature is that of AWS Signature Version 4."""
    service, text = token
    host, _, query = text.partition("/?")
    assert host == "my-cache"
    fields = {name: value for name, [value] in parse_qs(query).items()}
    date = fields["X-Amz-Date"][:8]
    scope = f"{date}/eu-west-1/{service}/aws4_request"
    assert (fields["Action"], fields["User"], fields["X-Amz-Expires"]) == ("connect", "svc/x", "900")
    assert fields["X-Amz-Credential"] == f"{_KEY}/{scope}"

    signature = fields.pop("X-Amz-Signature")
    pairs = [(name, value) for name, value in parse_qsl(query) if name != "X-Amz-Signature"]
    sorted_query = "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(pairs)
    )
    body = hashlib.sha256(b"").hexdigest()
    canonical = f"GET\n/\n{sorted_query}\nhost:{host}\n\nhost\n{body}"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{fields['X-Amz-Date']}\n{scope}\n{digest}"
    parts = [f"AWS4{_SECRET}".encode(), *(part.encode() for part in scope.split("/")), to_sign.encode()]
    assert reduce(lambda key, text: hmac.digest(key, text, "sha256"), parts).hex() == signature
