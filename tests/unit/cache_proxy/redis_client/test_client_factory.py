"""Clients for Redis: the exception that each fault raises."""

from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.client_factory import RedisCredentials, backend_for, create_client
from tests.support.redis_server import RedisServer, redis_process


@pytest.mark.parametrize("by_socket", [False, True], ids=["tcp", "unix"])
async def test_timeout_and_denied_login_keep_their_exception_type(tmp_path: Path, *, by_socket: bool) -> None:
    """Neither is reported as a lost connection, which would be retried."""
    path = tmp_path / "redis.sock"
    with redis_process(tmp_path, "--unixsocket", str(path)) as server:
        url = f"unix://{path}" if by_socket else server.url
        backend = backend_for(
            create_client(
                url, timeout_seconds=5, credentials=RedisCredentials(username="unknown", password=b"wrong")
            )
        )
        with pytest.raises(StoreError) as denied:
            await backend.execute("key", "GET", "key")
        assert isinstance(denied.value.__cause__, AuthenticationError)
        await backend.close()
        await _check_timeout(url, server)


async def _check_timeout(url: str, server: RedisServer) -> None:
    backend = backend_for(create_client(url, timeout_seconds=0.1))
    server.pause()
    with pytest.raises(StoreError) as timed_out:
        await backend.execute("key", "GET", "key")
    server.resume()
    assert isinstance(timed_out.value.__cause__, RedisTimeoutError)
    await backend.close()
