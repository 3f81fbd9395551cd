"""`--cache-url`, part by part, and what is refused because it can be read in two ways."""

from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.config.cache_url import CacheUrl, parse
from services.common.errors import UsageError

_SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("memory:", CacheUrl(scheme="memory")),
        ("embedded:", CacheUrl(scheme="embedded")),
        ("embedded:/var/lib/x", CacheUrl(scheme="embedded", path="/var/lib/x")),
        ("redis://h", CacheUrl(scheme="redis", hosts=(("h", 6379),))),
        ("valkey://h:1/2", CacheUrl(scheme="redis", hosts=(("h", 1),), database=2)),
        ("valkeys://h?db=3", CacheUrl(scheme="rediss", hosts=(("h", 6379),), database=3)),
        ("redis://[::1]:7", CacheUrl(scheme="redis", hosts=(("::1", 7),))),
        (
            "redis://svc%40corp:p%40ss%2Fw%23rd@h",
            CacheUrl(scheme="redis", hosts=(("h", 6379),), username="svc@corp", password=b"p@ss/w#rd"),
        ),
        ("redis://:a:b@h", CacheUrl(scheme="redis", hosts=(("h", 6379),), password=b"a:b")),
        ("unix:///run/a@b.sock?db=1", CacheUrl(scheme="unix", path="/run/a@b.sock", database=1)),
        ("unix://u:p@/run/s", CacheUrl(scheme="unix", path="/run/s", username="u", password=b"p")),
        ("redis+cluster://a:1,b", CacheUrl(scheme="redis+cluster", hosts=(("a", 1), ("b", 6379)))),
        (
            "redis+sentinel://a,b:2/main/4",
            CacheUrl(scheme="redis+sentinel", hosts=(("a", 26379), ("b", 2)), service="main", database=4),
        ),
        (
            "rediss://h?ssl_certfile=/c&ssl_keyfile=/k",
            CacheUrl(
                scheme="rediss",
                hosts=(("h", 6379),),
                client_certificate={"ssl_certfile": "/c", "ssl_keyfile": "/k"},
            ),
        ),
    ],
)
def test_url_is_taken_apart(url: str, parts: CacheUrl) -> None:
    """Each kind of URL, with and without the parts that may be left out."""
    assert parse(url) == parts


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h/name", "database is not a number"),
        ("redis://h/0/1", "database is not a number"),
        ("redis://h?decode_responses=true", "parameter decode_responses is not one of"),
        ("redis://h?socket_timeout=1", "parameter socket_timeout"),
        ("redis://h?db=1&db=2", "parameter db must have one value"),
        ("redis://h/1?db=2", "names its database twice"),
        ("redis://h?ssl_certfile=/c", "parameter ssl_certfile"),
        ("rediss://h?ssl_keyfile=/k", "ssl_keyfile without ssl_certfile"),
        ("rediss://h?ssl_cert_reqs=none", "parameter ssl_cert_reqs"),
        ("unix:///s?decode_responses=true", "parameter decode_responses"),
        ("unix://host/s", "has no host"),
        ("unix://", "followed by the socket's path"),
        ("redis+cluster://a:1/0", "one database"),
        ("redis+cluster://a:1?db=0", "parameter db"),
        ("redis+sentinel://a:1", "no service"),
        ("redis+sentinel://a:1/main?decode_responses=1", "parameter decode_responses"),
        ("redis+sentinel://a:1/main/x", "database is not a number"),
        ("redis://", "no host"),
        ("redis://h:0", "port"),
        ("redis://h:70000", "port"),
        ("redis:h", "parts are ambiguous"),
        ("http://h", "must begin with one of"),
        ("h:6379", "must begin with one of"),
        ("memory:x", "nothing after its colon"),
        ("embedded:x?db=1", "no parameters"),
    ],
)
def test_url_that_cannot_be_used_is_refused_with_its_reason(url: str, words: str) -> None:
    """One line that names the part."""
    with pytest.raises(UsageError) as refused:
        parse(url)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


_KINDS = (
    "redis://{}@h:1/0",
    "rediss://{}@h",
    "valkey://{}@h",
    "unix://{}@/run/s",
    "redis+cluster://{}@a:1,b:2",
    "redis+sentinel://{}@a:1,b:2/main",
)
_LOGINS = (
    "svc@corp:p@ss/w#rd{}",
    "svc@corp:{}",
    "u:{}#x",
    "u:x/{}",
    "u:{}/x",
    "u:x?{}",
    "u:{}?x=y",
    "u:x@{}",
    "u:%zz{}",
    "u:{}%",
    "u:x y{}",
    "u:[{}",
    "u:{}]",
    "u:x\\{}",
    "u:\t{}",
)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("login", _LOGINS)
def test_password_that_is_not_percent_encoded_is_refused_and_not_shown(kind: str, login: str) -> None:
    """The line says how to write it, and holds no piece of the URL."""
    url = kind.format(login.format(_SECRET))
    with pytest.raises(UsageError) as refused:
        parse(url)
    line = str(refused.value)
    assert "--cache-password-file" in line or "parameter" in line
    for piece in (_SECRET, "svc", "corp", "p@ss", "w#rd"):
        assert piece not in line.replace("--cache-password-file", "").replace("password", "")


@pytest.mark.parametrize("url", [f"redis://u:{_SECRET}", f"redis://{_SECRET}#@h", f"redis://h?{_SECRET}"])
def test_url_whose_host_is_a_password_is_refused(url: str) -> None:
    """The @ or the host was forgotten: what stands in its place is not shown, but as a parameter's name."""
    with pytest.raises(UsageError) as refused:
        parse(url)
    assert _SECRET not in str(refused.value)


@given(user=st.text(max_size=12), password=st.text(max_size=12))
def test_login_that_is_percent_encoded_comes_back(user: str, password: str) -> None:
    """Whatever characters it has."""
    parts = parse(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@h:1/3")
    assert (parts.username, parts.password) == (user or None, password.encode() or None)
    assert (parts.hosts, parts.database) == ((("h", 1),), 3)


@given(text=st.text(max_size=40))
def test_any_other_text_is_taken_apart_or_refused(text: str) -> None:
    """Never another error."""
    for url in (
        text,
        f"redis://{text}",
        f"unix://{text}",
        f"redis+sentinel://{text}",
        f"redis+cluster://{text}",
    ):
        with suppress(UsageError):
            parse(url)
