"""Connections to Redis: which kind of error each fault is."""

from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.client_factory import RedisCredentials, backend_for, create_client
from tests.support.redis_server import RedisServer, redis_process


@pytest.mark.parametrize("by_socket", [False, True], ids=["tcp", "unix"])
async def test_a_timeout_and_a_refused_login_keep_their_kind(tmp_path: Path, *, by_socket: bool) -> None:
    """Neither is a lost connection, which is worth more tries."""
    path = tmp_path / "redis.sock"
    with redis_process(tmp_path, "--unixsocket", str(path)) as server:
        url = f"unix://{path}" if by_socket else server.url
        stranger = backend_for(
            create_client(
                url, timeout_seconds=5, credentials=RedisCredentials(username="nobody", password=b"wrong")
            )
        )
        with pytest.raises(StoreError) as refused:
            await stranger.execute("key", "GET", "key")
        assert isinstance(refused.value.__cause__, AuthenticationError)
        await stranger.close()
        await _times_out(url, server)


async def _times_out(url: str, server: RedisServer) -> None:
    known = backend_for(create_client(url, timeout_seconds=0.1))
    server.pause()
    with pytest.raises(StoreError) as silent:
        await known.execute("key", "GET", "key")
    server.resume()
    assert isinstance(silent.value.__cause__, RedisTimeoutError)
    await known.close()
