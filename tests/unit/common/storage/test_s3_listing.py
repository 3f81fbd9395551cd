"""Listings behind a name, from servers that refuse that or have no order."""

import random
from collections.abc import AsyncIterator, Iterator

import pytest

from services.common.aws_client import open_client
from services.common.storage.s3 import S3Store
from tests.support.scripted_s3 import ENVIRONMENT, Fault, ScriptedS3, scripted_s3

_NAMES = [f"{number}.jsonl" for number in range(10, 40)]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    """A server with thirty files, ten a page."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with scripted_s3() as server:
        server.page_size = 10
        for name in _NAMES:
            server.put(f"in/{name}", b"{}")
        yield server


@pytest.fixture
async def store(s3: ScriptedS3) -> AsyncIterator[S3Store]:
    """INPUT on that server."""
    async with open_client("s3", endpoint_url=s3.url, max_connections=1) as client:
        yield S3Store(client, bucket=s3.bucket, prefix="in/")


async def _listed(store: S3Store, after: str) -> list[str]:
    return [item.name async for item in store.list(after=after)]


def _starts(s3: ScriptedS3) -> list[str | None]:
    return [call.query.get("start-after") for call in s3.requests if "continuation-token" not in call.query]


async def test_server_that_refuses_start_after_is_listed_from_the_beginning(
    s3: ScriptedS3, store: S3Store
) -> None:
    """The names behind the one are yielded all the same; it is asked once."""
    s3.refuses_start_after = True
    for _ in range(2):
        assert await _listed(store, "25") == _NAMES[15:]
    assert _starts(s3) == ["in/25", None, None]
    assert not store.is_unordered


async def test_server_without_an_order_is_listed_from_the_beginning(s3: ScriptedS3, store: S3Store) -> None:
    """What stands in front of the name in such a listing may be behind it by its name."""
    s3.sort_keys = lambda keys: random.Random(3).sample(keys, len(keys))
    assert set(await _listed(store, "25")) == set(_NAMES[15:])
    assert store.is_unordered
    assert sorted(await _listed(store, "25")) == _NAMES[15:]
    assert _starts(s3) == ["in/25", None, None]


async def test_other_refusals_of_a_listing_are_errors(s3: ScriptedS3, store: S3Store) -> None:
    """A listing that may not be made fails, and StartAfter is not blamed for it."""
    s3.faults = [Fault("ListObjectsV2", "403", times=1)]
    with pytest.raises(Exception, match="s3://b/in/: AccessDenied"):
        await _listed(store, "25")
    assert await _listed(store, "25") == _NAMES[15:]
    assert _starts(s3) == ["in/25", "in/25"]
