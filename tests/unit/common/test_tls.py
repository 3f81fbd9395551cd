"""Certificates and keys that are being replaced just as they are looked at."""

from pathlib import Path

import pytest

from services.common import tls
from services.common.errors import UsageError
from services.common.file_reload import read_file


def test_file_removed_during_read_is_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone between the two looks that are taken at it: refused by name, so that a renewal keeps the last."""
    path = tmp_path / "ca.pem"
    path.write_bytes(b"whatever")

    def read_and_lose(name: str, *, flag_name: str) -> bytes:
        content = read_file(name, flag_name=flag_name)
        Path(name).unlink()
        return content

    monkeypatch.setattr(tls, "read_file", read_and_lose)
    with pytest.raises(UsageError, match=r"--tls-ca .*ca\.pem"):
        tls.PemFiles(ca=str(path), cert=None, key=None).watch()
