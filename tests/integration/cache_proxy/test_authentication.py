"""Callers, proxy and model by mutual TLS and tokens: who comes in, and who does not."""

import hashlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, ProxyEnvironment
from tests.support.caller import RpcResult, make_pairs, open_caller, read_metrics
from tests.support.certificates import CertificateAuthority, MountedSecret, SignedCertificate
from tests.support.http2_peer import grpc_statuses, open_peer
from tests.support.model_server import Answers, ReceivedCall, ScriptedModel, answer_all, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy, run_command
from tests.support.redis_server import wait_for

_TOKENS = {name: f"s3cret-of-{name}" for name in ("pricing", "gone", "nobody", "the-proxy")}


def _line(name: str) -> str:
    return f"{name} sha256:{hashlib.sha256(_TOKENS[name].encode()).hexdigest()}\n"


def _bearer(name: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {_TOKENS[name]}")]


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyEnvironment]:
    """A proxy in the clear that lets in by token, and tells all it does."""
    listed = tmp_path_factory.mktemp("tokens") / "callers"
    listed.write_text(_line("pricing") + _line("gone") + "gone denied\n")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            "--caller-tokens-file",
            str(listed),
            "--log-level",
            "debug",
        ) as proxy,
        open_caller(proxy.target) as asking,
    ):
        yield ProxyEnvironment(asking, proxy, model)


def test_who_has_no_token_gets_nothing_that_is_known_either(by_token: ProxyEnvironment) -> None:
    """One pair or several, cached or new: `UNAUTHENTICATED`, no pair counted, no call of the model."""
    known = make_pairs("known", 2)
    assert by_token.caller.infer(known, metadata=_bearer("pricing")).levels
    before, calls = read_metrics(by_token.proxy.http_url), len(by_token.model.calls)
    for pairs in (known[:1], known, make_pairs("new", 3), []):
        for metadata in ([], [("x-caller", "pricing")], _bearer("nobody")):
            reply = by_token.caller.infer(pairs, metadata=metadata)
            assert reply.code is StatusCode.UNAUTHENTICATED
            assert reply.trailers.keys() == set()
            assert not any(token in reply.message for token in _TOKENS.values())
    after = read_metrics(by_token.proxy.http_url)
    changed = {
        name[1:]: after[name] - before[name]
        for name in after
        if name[0] in {"cache_proxy_requests_total", "cache_proxy_pairs_total"}
        and after[name] != before[name]
    }
    assert changed == {("UNAUTHENTICATED",): 12}
    assert len(by_token.model.calls) == calls


def test_who_is_denied_is_known_and_gets_nothing(by_token: ProxyEnvironment) -> None:
    """`PERMISSION_DENIED`, with the name that the token gives."""
    reply = by_token.caller.infer(make_pairs("denied", 1), metadata=_bearer("gone"))
    assert (reply.code, reply.message) == (StatusCode.PERMISSION_DENIED, "gone may not call this proxy")


def test_the_tokens_name_is_the_callers(by_token: ProxyEnvironment) -> None:
    """Its pairs are counted under it, whatever the caller claims to be."""
    pairs = make_pairs("name", 3)
    metadata = [*_bearer("pricing"), ("x-caller", "somebody-else")]
    before = read_metrics(by_token.proxy.http_url).get(
        ("cache_proxy_caller_pairs_total", "pricing", "miss"), 0
    )
    assert by_token.caller.infer(pairs, metadata=metadata).misses == 3
    after = read_metrics(by_token.proxy.http_url)
    assert after["cache_proxy_caller_pairs_total", "pricing", "miss"] == before + 3
    assert not [name for name in after if "somebody-else" in name]


def test_health_and_reflection_are_open(by_token: ProxyEnvironment) -> None:
    """Probes and the curious need no token: they learn that it serves, and the public proto."""
    channel = by_token.caller.channel
    health_stub: Any = health_pb2_grpc.HealthStub(channel)
    reflection_stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    health = health_stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_stub.ServerReflectionInfo(iter([listing]), timeout=60)
    assert "SeniorityModel" in {one.name for one in next(answers).list_services_response.service}


def test_no_token_is_seen_anywhere(by_token: ProxyEnvironment) -> None:
    """Neither in the log at its most talkative, nor in the metrics, nor in the list of processes."""
    for name, token in _TOKENS.items():
        by_token.caller.infer(make_pairs("seen", 1), metadata=_bearer(name))
        with open_peer(by_token.proxy.target) as odd:
            odd.send_request(b"", [("authorization", f"Bearer {token}".encode() + b"\xff")])
            wait_for(lambda: odd.receive(1) and grpc_statuses(odd), description="it is answered")
    process = Path("/proc") / str(by_token.proxy.process.pid)
    text = by_token.proxy.log + str(read_metrics(by_token.proxy.http_url))
    text += "".join((process / file).read_text() for file in ("cmdline", "environ"))
    assert not [token for token in _TOKENS.values() if token in text]


@dataclass(frozen=True)
class _Place:
    """Everything by mutual TLS, its files mounted; `pricing` and `spare` are callers' certificates."""

    authority: CertificateAuthority
    listener: MountedSecret
    towards_model: MountedSecret
    callers: Path
    token: Path
    proxy: ServiceProcess
    model: ScriptedModel

    def ask(
        self, shown: SignedCertificate | None, company: str, *, ca: Path | None = None, token: str = ""
    ) -> RpcResult:
        """A new pair, by a connection of its own."""
        roots = (ca or self.authority.certificate).read_bytes()
        own = () if shown is None else shown.pem[1:]
        with open_caller(self.proxy.target, grpc.ssl_channel_credentials(roots, *own)) as asking:
            return asking.infer(make_pairs(company, 1), metadata=_bearer(token) if token else ())

    def until_told(self, files: str, outcome: str, count: int) -> None:
        """Wait until the proxy has noticed so many changes of these files."""
        name = ("cache_proxy_renewals_total", files, outcome)
        wait_for(
            lambda: read_metrics(self.proxy.http_url)[name] == count, description=f"{files} is {outcome}"
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Place]:
    """Caller, proxy and model, each with a certificate of one authority."""
    folder = tmp_path_factory.mktemp("access")
    authority = CertificateAuthority(folder)
    listener, towards_model = MountedSecret(folder / "listener"), MountedSecret(folder / "model")
    listener.replace_certificate(authority.sign("listener"))
    towards_model.replace_certificate(authority.sign("the-proxy"))
    callers, token = folder / "callers", folder / "token"
    callers.write_text("pricing.example certificate\n")
    token.touch(0o600)
    token.write_text(_TOKENS["the-proxy"])
    ca, key, certificate = authority.sign("model").pem
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    with (
        scripted_model(credentials=credentials) as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            *listener.paths.flags(ca="client-ca"),
            "--caller-tokens-file",
            str(callers),
            "--listen",
            f"unix:{folder}/socket",
            *towards_model.paths.flags("--model-tls"),
            "--model-token-file",
            str(token),
        ) as proxy,
    ):
        yield _Place(authority, listener, towards_model, callers, token, proxy, model)


@pytest.fixture(scope="module")
def pricing(place: _Place) -> SignedCertificate:
    """The certificate of a caller that the list names."""
    return place.authority.sign("pricing", "DNS:pricing.example")


def test_both_ways_are_by_mutual_tls(place: _Place, pricing: SignedCertificate) -> None:
    """A caller with a certificate is answered, the model is shown the proxy's, and the token besides."""
    assert place.ask(pricing, "mutual").levels
    call = place.model.calls_with("mutual")[0]
    assert (call.certificate, call.authorization) == ("the-proxy", f"Bearer {_TOKENS['the-proxy']}")
    assert (
        read_metrics(place.proxy.http_url)["cache_proxy_caller_pairs_total", "pricing.example", "miss"] >= 1
    )
    assert (
        place.ask(place.authority.sign("other", "DNS:other.example"), "other").code
        is StatusCode.PERMISSION_DENIED
    )


def test_who_is_no_party_to_it_is_not_connected(
    place: _Place, pricing: SignedCertificate, tmp_path: Path
) -> None:
    """No certificate, one of another authority, in the clear; and a proxy that the caller does not trust."""
    stranger = CertificateAuthority(tmp_path, "stranger")
    replies = [
        place.ask(None, "a"),
        place.ask(stranger.sign("pricing", "DNS:pricing.example"), "a"),
        place.ask(pricing, "a", ca=stranger.certificate),
    ]
    with open_caller(place.proxy.target) as in_the_clear:
        replies.append(in_the_clear.infer(make_pairs("a", 1)))
    assert {reply.code for reply in replies} == {StatusCode.UNAVAILABLE}
    assert place.model.calls_with("a ") == []


def test_a_unix_socket_is_in_the_clear_and_the_list_holds_on_it(place: _Place) -> None:
    """Whoever may open it needs no TLS there, yet nobody comes in by a name of their own making."""
    with open_caller(place.proxy.ready["listen"][1]) as in_the_clear:
        reply = in_the_clear.infer(make_pairs("socket", 1), metadata=[("x-caller", "pricing.example")])
    assert reply.code is StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_the_command_line_asks_by_tls_too(place: _Place, pricing: SignedCertificate) -> None:
    """`cache-proxy infer` with the CA, a certificate and a token is answered; without, refused."""
    own = ("--tls-ca", str(pricing.ca), "--client-cert", str(pricing.certificate), "--client-key")
    asked = ("infer", "--target", place.proxy.target, "--company", "command", "--title", "line")
    done = run_command(
        "services.cache_proxy", *asked, *own, str(pricing.key), "--token-file", str(place.token)
    )
    assert (done.returncode, done.stderr) == (0, "")
    refused = run_command("services.cache_proxy", *asked, "--tls-ca", str(pricing.ca), "--deadline", "5s")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "UNAVAILABLE" in refused.stderr


@pytest.mark.slow
def test_the_list_of_callers_holds_within_seconds(place: _Place, pricing: SignedCertificate) -> None:
    """Who is added may come, who is taken off may not, and a broken list is noticed and changes nothing."""
    place.callers.write_text("pricing.example certificate\n" + _line("pricing"))
    place.until_told("caller_tokens", "done", 1)
    other = place.authority.sign("other", "DNS:other.example")
    assert place.ask(other, "added", token="pricing").levels
    place.callers.write_text("pricing.example " + _TOKENS["gone"])
    place.until_told("caller_tokens", "failed", 1)
    assert read_metrics(place.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 1
    assert place.ask(pricing, "broken").levels
    assert place.ask(other, "broken", token="pricing").levels
    place.callers.write_text("pricing.example certificate\n")
    place.until_told("caller_tokens", "done", 2)
    assert read_metrics(place.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 0
    assert place.ask(other, "taken off", token="pricing").code is StatusCode.PERMISSION_DENIED
    assert place.ask(pricing, "left").levels
    assert not [token for token in _TOKENS.values() if token in place.proxy.log]


@pytest.mark.slow
def test_what_the_model_is_shown_is_renewed(place: _Place, pricing: SignedCertificate) -> None:
    """A certificate and a token that change are shown to the model from then on."""
    place.token.write_text("s3cret-of-today")
    place.until_told("model_token", "done", 1)
    assert place.ask(pricing, "token").levels
    assert place.model.calls_with("token")[0].authorization == "Bearer s3cret-of-today"
    place.towards_model.replace_certificate(place.authority.sign("renewed"))
    place.until_told("model_tls", "done", 1)
    numbers = itertools.count()

    def is_shown() -> bool:
        company = f"shown {next(numbers)}"
        assert place.ask(pricing, company).levels
        return place.model.calls_with(company)[0].certificate == "renewed"

    wait_for(is_shown, description="the model is shown the renewed certificate")
    assert "s3cret-of-today" not in place.proxy.log


@pytest.mark.slow
def test_the_listener_is_renewed_and_no_call_is_hurt(
    place: _Place, pricing: SignedCertificate, tmp_path: Path
) -> None:
    """Another authority's certificate and CA: shown and asked of new connections, while a call on an old one
    ends well; a pair that is none is noticed, told once, and changes nothing.
    """  # noqa: D205 - one thought
    later = CertificateAuthority(tmp_path, "later")
    own, new = later.sign("listener"), later.sign("pricing", "DNS:pricing.example")
    held, go = threading.Event(), threading.Event()

    def hold(call: ReceivedCall) -> Answers:
        held.set()
        go.wait(60)
        return answer_all(call)

    place.model.behaviour = hold
    try:
        with open_caller(place.proxy.target, grpc.ssl_channel_credentials(*pricing.pem)) as asking:
            under_way = asking.start_infer(make_pairs("under way", 1))
            assert held.wait(60)
            place.listener.replace_certificate(own)
            place.until_told("listen_tls", "done", 1)
            place.model.behaviour = answer_all
            assert place.ask(new, "renewed", ca=later.certificate).levels
            assert place.ask(pricing, "old").code is StatusCode.UNAVAILABLE
            assert not under_way.done
            go.set()
            assert under_way.result().levels
    finally:
        go.set()
        place.model.behaviour = answer_all
    place.listener.replace_files(tls_crt=own.certificate, tls_key=new.key, ca_crt=own.ca)
    place.until_told("listen_tls", "failed", 1)
    assert read_metrics(place.proxy.http_url)["cache_proxy_renewal_failing", "listen_tls"] == 1
    assert place.ask(new, "broken", ca=later.certificate).levels
    place.listener.replace_certificate(own)
    place.until_told("listen_tls", "done", 2)
    assert read_metrics(place.proxy.http_url)["cache_proxy_renewal_failing", "listen_tls"] == 0
    assert place.proxy.log.count("not a pair") == 1
    assert place.proxy.stop() == 0
