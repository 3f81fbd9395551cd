"""Where other replicas can knock."""

import pytest

from services.cache_proxy.queue.opening import _address


@pytest.mark.parametrize(
    ("http", "redis_url", "address"),
    [
        ("10.1.2.3:9464", "redis://192.0.2.1:6379/0", "10.1.2.3:9464"),
        ("127.0.0.1:9464", "redis://127.0.0.1:6379/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis://localhost/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "unix:///run/redis.sock", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "unix:///run/redis.sock", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis://127.0.0.1:6379/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis://192.0.2.1:6379/0", ""),
        ("localhost:9464", "redis://192.0.2.1:6379/0", ""),
        ("[::1]:9464", "redis://192.0.2.1:6379/0", ""),
        ("127.0.0.1:9464", "redis+cluster://127.0.0.1:7000,127.0.0.1:7001", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+cluster://name:p%40ss@127.0.0.1:7000,127.0.0.1:7001", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+cluster://nowhere.invalid:7000,127.0.0.1", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+sentinel://:p,w@127.0.0.1:26379,127.0.0.1/cache", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis+sentinel://192.0.2.1:26379,192.0.2.2:26379/cache", ""),
    ],
)
def test_an_address_of_one_machine_is_none_for_those_on_others(
    http: str, redis_url: str, address: str
) -> None:
    """A loopback door leads whoever knocks from another machine to a stranger, who is not the replica."""
    assert _address(http, redis_url) == address
