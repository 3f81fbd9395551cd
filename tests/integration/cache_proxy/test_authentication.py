"""Authentication by mutual TLS and tokens between callers, proxy and model."""

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

_TOKENS = {name: f"s3cret-of-{name}" for name in ("pricing", "gone", "unknown", "the-proxy")}


def _line(name: str) -> str:
    return f"{name} sha256:{hashlib.sha256(_TOKENS[name].encode()).hexdigest()}\n"


def _bearer(name: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {_TOKENS[name]}")]


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyEnvironment]:
    """Start a plaintext proxy that admits callers by token, with its log level at debug."""
    caller_list = tmp_path_factory.mktemp("tokens") / "callers"
    caller_list.write_text(_line("pricing") + _line("gone") + "gone denied\n")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            "--caller-tokens-file",
            str(caller_list),
            "--log-level",
            "debug",
        ) as proxy,
        open_caller(proxy.target) as client,
    ):
        yield ProxyEnvironment(client, proxy, model)


def test_caller_without_token_gets_no_cached_level_either(by_token: ProxyEnvironment) -> None:
    """For one pair or several, cached or new: `UNAUTHENTICATED`, no pair counted, no call to the model."""
    known = make_pairs("known", 2)
    assert by_token.caller.infer(known, metadata=_bearer("pricing")).levels
    before, calls = read_metrics(by_token.proxy.http_url), len(by_token.model.calls)
    for pairs in (known[:1], known, make_pairs("new", 3), []):
        for metadata in ([], [("x-caller", "pricing")], _bearer("unknown")):
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


def test_denied_caller_gets_permission_denied_with_its_name(by_token: ProxyEnvironment) -> None:
    """The name is the one that the token identifies."""
    reply = by_token.caller.infer(make_pairs("denied", 1), metadata=_bearer("gone"))
    assert (reply.code, reply.message) == (StatusCode.PERMISSION_DENIED, "gone may not call this proxy")


def test_caller_is_counted_under_the_name_of_its_token(by_token: ProxyEnvironment) -> None:
    """The name in `x-caller` is ignored."""
    pairs = make_pairs("name", 3)
    metadata = [*_bearer("pricing"), ("x-caller", "somebody-else")]
    before = read_metrics(by_token.proxy.http_url).get(
        ("cache_proxy_caller_pairs_total", "pricing", "miss"), 0
    )
    assert by_token.caller.infer(pairs, metadata=metadata).misses == 3
    after = read_metrics(by_token.proxy.http_url)
    assert after["cache_proxy_caller_pairs_total", "pricing", "miss"] == before + 3
    assert not [name for name in after if "somebody-else" in name]


def test_health_and_reflection_need_no_token(by_token: ProxyEnvironment) -> None:
    """Any caller may check the health and read the public protos."""
    channel = by_token.caller.channel
    health_stub: Any = health_pb2_grpc.HealthStub(channel)
    reflection_stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    health = health_stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_stub.ServerReflectionInfo(iter([listing]), timeout=60)
    assert "SeniorityModel" in {one.name for one in next(answers).list_services_response.service}


def test_tokens_are_in_no_log_metric_or_process_listing(by_token: ProxyEnvironment) -> None:
    """Also at log level debug."""
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
class _Deployment:
    """A proxy and a model with mutual TLS on both connections, and the mounted files of the proxy."""

    authority: CertificateAuthority
    listener: MountedSecret
    towards_model: MountedSecret
    callers: Path
    token: Path
    proxy: ServiceProcess
    model: ScriptedModel

    def infer(
        self, shown: SignedCertificate | None, company: str, *, ca: Path | None = None, token: str = ""
    ) -> RpcResult:
        """Send a new pair on a new connection with this client certificate and token."""
        roots = (ca or self.authority.certificate).read_bytes()
        own = () if shown is None else shown.pem[1:]
        with open_caller(self.proxy.target, grpc.ssl_channel_credentials(roots, *own)) as client:
            return client.infer(make_pairs(company, 1), metadata=_bearer(token) if token else ())

    def wait_for_reloads(self, files: str, outcome: str, count: int) -> None:
        """Wait until the proxy has counted this many reloads of these files with this outcome."""
        name = ("cache_proxy_renewals_total", files, outcome)
        wait_for(
            lambda: read_metrics(self.proxy.http_url)[name] == count, description=f"{files} is {outcome}"
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Deployment]:
    """Start a proxy and a model, each with a certificate of the same authority."""
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
        yield _Deployment(authority, listener, towards_model, callers, token, proxy, model)


@pytest.fixture(scope="module")
def pricing(deployment: _Deployment) -> SignedCertificate:
    """Return the certificate of a caller that the list names."""
    return deployment.authority.sign("pricing", "DNS:pricing.example")


def test_caller_and_model_connections_use_mutual_tls(
    deployment: _Deployment, pricing: SignedCertificate
) -> None:
    """A caller with a listed certificate is answered. The model gets the proxy's certificate and token."""
    assert deployment.infer(pricing, "mutual").levels
    call = deployment.model.calls_with("mutual")[0]
    assert (call.certificate, call.authorization) == ("the-proxy", f"Bearer {_TOKENS['the-proxy']}")
    assert (
        read_metrics(deployment.proxy.http_url)["cache_proxy_caller_pairs_total", "pricing.example", "miss"]
        >= 1
    )
    assert (
        deployment.infer(deployment.authority.sign("other", "DNS:other.example"), "other").code
        is StatusCode.PERMISSION_DENIED
    )


def test_untrusted_or_plaintext_connections_fail(
    deployment: _Deployment, pricing: SignedCertificate, tmp_path: Path
) -> None:
    """No certificate, one of another authority, plaintext, and a proxy that the caller does not trust."""
    stranger = CertificateAuthority(tmp_path, "stranger")
    replies = [
        deployment.infer(None, "a"),
        deployment.infer(stranger.sign("pricing", "DNS:pricing.example"), "a"),
        deployment.infer(pricing, "a", ca=stranger.certificate),
    ]
    with open_caller(deployment.proxy.target) as plaintext_client:
        replies.append(plaintext_client.infer(make_pairs("a", 1)))
    assert {reply.code for reply in replies} == {StatusCode.UNAVAILABLE}
    assert deployment.model.calls_with("a ") == []


def test_unix_socket_is_plaintext_and_still_requires_a_token(deployment: _Deployment) -> None:
    """Callers need no TLS on it, and a name in `x-caller` does not admit them."""
    with open_caller(deployment.proxy.ready["listen"][1]) as plaintext_client:
        reply = plaintext_client.infer(make_pairs("socket", 1), metadata=[("x-caller", "pricing.example")])
    assert reply.code is StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_infer_command_connects_with_mutual_tls(deployment: _Deployment, pricing: SignedCertificate) -> None:
    """`cache-proxy infer` succeeds with CA, certificate and token, and fails with the CA alone."""
    own = ("--tls-ca", str(pricing.ca), "--client-cert", str(pricing.certificate), "--client-key")
    arguments = ("infer", "--target", deployment.proxy.target, "--company", "command", "--title", "line")
    done = run_command(
        "services.cache_proxy", *arguments, *own, str(pricing.key), "--token-file", str(deployment.token)
    )
    assert (done.returncode, done.stderr) == (0, "")
    refused = run_command("services.cache_proxy", *arguments, "--tls-ca", str(pricing.ca), "--deadline", "5s")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "UNAVAILABLE" in refused.stderr


@pytest.mark.slow
def test_changed_caller_list_applies_within_seconds(
    deployment: _Deployment, pricing: SignedCertificate
) -> None:
    """Added callers are admitted, removed ones are not. An invalid list is counted and changes nothing."""
    deployment.callers.write_text("pricing.example certificate\n" + _line("pricing"))
    deployment.wait_for_reloads("caller_tokens", "done", 1)
    other = deployment.authority.sign("other", "DNS:other.example")
    assert deployment.infer(other, "added", token="pricing").levels
    deployment.callers.write_text("pricing.example " + _TOKENS["gone"])
    deployment.wait_for_reloads("caller_tokens", "failed", 1)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 1
    assert deployment.infer(pricing, "broken").levels
    assert deployment.infer(other, "broken", token="pricing").levels
    deployment.callers.write_text("pricing.example certificate\n")
    deployment.wait_for_reloads("caller_tokens", "done", 2)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 0
    assert deployment.infer(other, "taken off", token="pricing").code is StatusCode.PERMISSION_DENIED
    assert deployment.infer(pricing, "left").levels
    assert not [token for token in _TOKENS.values() if token in deployment.proxy.log]


@pytest.mark.slow
def test_renewed_certificate_and_token_are_sent_to_the_model(
    deployment: _Deployment, pricing: SignedCertificate
) -> None:
    """Both apply to calls after the files have changed."""
    deployment.token.write_text("s3cret-of-today")
    deployment.wait_for_reloads("model_token", "done", 1)
    assert deployment.infer(pricing, "token").levels
    assert deployment.model.calls_with("token")[0].authorization == "Bearer s3cret-of-today"
    deployment.towards_model.replace_certificate(deployment.authority.sign("renewed"))
    deployment.wait_for_reloads("model_tls", "done", 1)
    numbers = itertools.count()

    def is_shown() -> bool:
        company = f"shown {next(numbers)}"
        assert deployment.infer(pricing, company).levels
        return deployment.model.calls_with(company)[0].certificate == "renewed"

    wait_for(is_shown, description="the model is shown the renewed certificate")
    assert "s3cret-of-today" not in deployment.proxy.log


@pytest.mark.slow
def test_renewed_listener_certificate_applies_without_failing_calls(
    deployment: _Deployment, pricing: SignedCertificate, tmp_path: Path
) -> None:
    """New connections use the certificate and CA of another authority, and a call on an old one completes.

    A certificate and key that do not match are counted, logged once, and change nothing.
    """
    later = CertificateAuthority(tmp_path, "later")
    own, new = later.sign("listener"), later.sign("pricing", "DNS:pricing.example")
    call_started, finish_call = threading.Event(), threading.Event()

    def hold(call: ReceivedCall) -> Answers:
        call_started.set()
        finish_call.wait(60)
        return answer_all(call)

    deployment.model.behaviour = hold
    try:
        with open_caller(deployment.proxy.target, grpc.ssl_channel_credentials(*pricing.pem)) as client:
            in_progress = client.start_infer(make_pairs("under way", 1))
            assert call_started.wait(60)
            deployment.listener.replace_certificate(own)
            deployment.wait_for_reloads("listen_tls", "done", 1)
            deployment.model.behaviour = answer_all
            assert deployment.infer(new, "renewed", ca=later.certificate).levels
            assert deployment.infer(pricing, "old").code is StatusCode.UNAVAILABLE
            assert not in_progress.done
            finish_call.set()
            assert in_progress.result().levels
    finally:
        finish_call.set()
        deployment.model.behaviour = answer_all
    deployment.listener.replace_files(tls_crt=own.certificate, tls_key=new.key, ca_crt=own.ca)
    deployment.wait_for_reloads("listen_tls", "failed", 1)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "listen_tls"] == 1
    assert deployment.infer(new, "broken", ca=later.certificate).levels
    deployment.listener.replace_certificate(own)
    deployment.wait_for_reloads("listen_tls", "done", 2)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "listen_tls"] == 0
    assert deployment.proxy.log.count("not a pair") == 1
    assert deployment.proxy.stop() == 0
