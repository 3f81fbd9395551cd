"""Tests of the quota file: its entries, the account of each caller, and the errors for invalid files."""

import json
from pathlib import Path

import pytest

from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota, Quotas, read_quotas
from services.common.errors import UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path for a quota file."""
    return tmp_path / "quotas.json"


def test_named_caller_has_own_account_and_others_share_one(path: Path) -> None:
    """Names are compared exactly. A limit that is left out does not apply."""
    path.write_text(
        json.dumps(
            {
                "callers": {"a": {"pairs_per_second": 0.5, "queued_pairs": 7}, "é b": {}},
                "others": {"queued_pairs": 9},
            }
        )
    )
    quotas = read_quotas(str(path))
    assert quotas.for_caller("a") == Quota("a", 0.5, 7)
    assert quotas.for_caller("é b") == Quota("é b", 0.0, 0)
    assert quotas.for_caller("A") == quotas.for_caller("anonymous") == Quota(DEFAULT_ACCOUNT, 0.0, 9)


@pytest.mark.parametrize("text", ["{}", '{"callers": {}}', '{"others": null}'])
def test_unnamed_caller_without_others_has_no_quota(path: Path, text: str) -> None:
    """Only callers that the file names have an account."""
    path.write_text(text)
    assert read_quotas(str(path)) == Quotas({}, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "truncated"),
        ("[]", "object"),
        ("{", "truncated"),
        ("[" * 100_000, "array"),
        ('{"callers": {"a": {"pairs_per_second": 0}}}', "'a': .*pairs_per_second"),
        ('{"callers": {"a": {"pairs_per_second": -1}}}', "'a': .*pairs_per_second"),
        ('{"callers": {"a": {"pairs_per_second": 1e-300}}}', "'a': .*pairs_per_second"),
        ('{"others": {"pairs_per_second": 5e-324}}', "others: .*pairs_per_second"),
        ('{"callers": {"a": {"pairs_per_second": NaN}}}', "malformed"),
        ('{"callers": {"a": {"pairs_per_second": 1e300}}}', "'a': .*pairs_per_second"),
        ('{"callers": {"a": {"queued_pairs": 1.5}}}', "'a': .*queued_pairs"),
        ('{"callers": {"a": {"queued_pairs": "9"}}}', "'a': .*queued_pairs"),
        ('{"callers": {"a": {"queued_pairs": 0}}}', "'a': .*queued_pairs"),
        ('{"callers": {"a": {"queued": 1}}}', "'a': .*queued"),
        ('{"callers": {"a": []}}', "'a': "),
        ('{"callers": {"": {}}}', "name"),
        ('{"callers": {"a\\nb": {}}}', "name"),
        ('{"callers": {"' + "x" * 256 + '": {}}}', "name"),
        ('{"caller": {}}', "caller"),
        ('{"others": 3}', "others: "),
        ('{"others": {"rate": 3}}', "others: .*rate"),
        ('{"callers": {' + ",".join(f'"{n}": {{}}' for n in range(1001)) + "}}", "1001"),
        ('{"callers": {"a": {"pairs_per_second": ' + "9" * 4_194_304 + "}}}", "MiB"),
        ("\ud800", "."),
    ],
)
def test_invalid_file_error_names_flag_file_and_entry(path: Path, text: str, words: str) -> None:
    """The error is one line, whatever the file contains."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match=words) as bad:
        read_quotas(str(path))
    assert str(bad.value).startswith(f"--caller-quotas-file {path}: ")
    assert "\n" not in str(bad.value)
    assert len(str(bad.value)) < 500


def test_missing_file_error_names_file(path: Path) -> None:
    """The reason is the system's."""
    with pytest.raises(UsageError, match="No such file"):
        read_quotas(str(path))
