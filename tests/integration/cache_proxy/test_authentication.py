"""Authentication by mutual TLS between callers, proxy and model, with tokens besides."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import RpcResult, make_pairs, open_caller, read_metrics
from tests.support.caller_tokens import CALLER_TOKENS, bearer_metadata, caller_list_line
from tests.support.certificates import CertificateAuthority, MountedSecret, SignedCertificate
from tests.support.model_server import Answers, ReceivedCall, ScriptedModel, answer_all, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy, run_command
from tests.support.redis_server import wait_for


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
            return client.infer(make_pairs(company, 1), metadata=bearer_metadata(token) if token else ())

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
    token.write_text(CALLER_TOKENS["the-proxy"])
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
    assert (call.certificate, call.authorization) == ("the-proxy", f"Bearer {CALLER_TOKENS['the-proxy']}")
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
    deployment.callers.write_text("pricing.example certificate\n" + caller_list_line("pricing"))
    deployment.wait_for_reloads("caller_tokens", "done", 1)
    other = deployment.authority.sign("other", "DNS:other.example")
    assert deployment.infer(other, "added", token="pricing").levels
    deployment.callers.write_text("pricing.example " + CALLER_TOKENS["gone"])
    deployment.wait_for_reloads("caller_tokens", "failed", 1)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 1
    assert deployment.infer(pricing, "broken").levels
    assert deployment.infer(other, "broken", token="pricing").levels
    deployment.callers.write_text("pricing.example certificate\n")
    deployment.wait_for_reloads("caller_tokens", "done", 2)
    assert read_metrics(deployment.proxy.http_url)["cache_proxy_renewal_failing", "caller_tokens"] == 0
    assert deployment.infer(other, "taken off", token="pricing").code is StatusCode.PERMISSION_DENIED
    assert deployment.infer(pricing, "left").levels
    assert not [token for token in CALLER_TOKENS.values() if token in deployment.proxy.log]


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
