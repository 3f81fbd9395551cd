"""Tests of the bearer token that is read from a file."""

from pathlib import Path

import pytest

from services.common.bearer import Token


def _write_token(path: Path, token: str) -> Path:
    """Write a token to a file that only its owner may read."""
    path.touch(0o600)
    path.write_text(token)
    return path


def test_token_is_kept_while_its_file_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last token is sent while its file is missing or empty, with one warning without the token."""
    path = tmp_path / "token"
    _write_token(path, "first")
    token = Token(str(path))
    assert token.metadata() == ("authorization", "Bearer first")
    path.unlink()
    assert token.metadata() == token.metadata() == ("authorization", "Bearer first")
    _write_token(path, "")
    assert token.metadata() == ("authorization", "Bearer first")
    _write_token(tmp_path / "new", "second\n")
    (tmp_path / "new").replace(path)
    assert token.metadata() == ("authorization", "Bearer second")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "first" not in caplog.text
