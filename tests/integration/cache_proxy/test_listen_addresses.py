"""Listen addresses: IPv4 and IPv6, Unix sockets with a mode, with and without TLS, and their errors.

Over 250 lines, because some tests run small programs in a network namespace or as another user.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import grpc
import pytest
from grpc import StatusCode

from services.common.listening import _UNPRIVILEGED_PORT_FILE
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.caller import open_caller
from tests.support.certificates import CertificateAuthority
from tests.support.processes import ROOT, clean_environment, run_command, run_service
from tests.unit.common.test_listening import SPELLINGS, has_ipv6

_GROUP = 3000
_SERVE = ("serve", "--model-target", "127.0.0.1:1", "--cache-url", "memory:")


@pytest.mark.slow
def test_grpc_and_http_ports_listen_on_the_same_addresses_for_each_spelling() -> None:
    """On IPv4 and IPv6, for every spelling of the host."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    for host, expected_hosts in SPELLINGS:
        listen = ("--listen", f"{host}:0", "--http-listen", f"{host}:0")
        with run_service("services.cache_proxy", *_SERVE, *listen) as proxy:
            for ready in (proxy.target, str(proxy.ready["http"])):
                port = int(ready.rpartition(":")[2])
                for to in ("127.0.0.1", "::1"):
                    with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET) as sock:
                        assert (sock.connect_ex((to, port)) == 0) is (to in expected_hosts), (host, ready, to)
            # The address in the ready line is a gRPC target.
            with open_caller(proxy.target) as client:
                assert client.infer([]).code is StatusCode.OK
            with urlopen(f"{proxy.http_url}/readyz", timeout=30) as response:
                assert response.status == 200


def _in_network_namespace(*commands: str) -> list[str]:
    """Return the start of a command line that runs these commands in a separate network namespace first."""
    script = "; ".join(["ip link set lo up", *commands, 'exec "$@"'])
    return ["unshare", "--net", "sh", "-ec", script, "sh"]


_PROBE = """
import subprocess, sys, json, socket
serve = [sys.executable, "-m", "services.cache_proxy", *sys.argv[2:]]
proxy = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
try:
    ready = json.loads(proxy.stdout.readline())
    for address in (*ready["listen"], ready["http"]):
        socket.create_connection((sys.argv[1], int(address.rpartition(":")[2])), timeout=10).close()
    print("reached")
finally:
    proxy.kill()
    proxy.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "to"),
    [
        (["ip addr del 127.0.0.1/8 dev lo"], "::1"),
        (["echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"], "127.0.0.1"),
    ],
    ids=["IPv6 alone", "IPv4 alone"],
)
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "", "localhost"])
def test_default_addresses_work_with_only_one_ip_version(commands: Sequence[str], to: str, host: str) -> None:
    """With IPv6 alone, or IPv4 alone, the proxy is reached on the default addresses and localhost."""
    in_namespace = _in_network_namespace(*commands)
    if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own to be had (unshare --net, ip)")
    listen = ("--listen", f"{host}:0", "--http-listen", f"{host}:0")
    completed = subprocess.run(
        [*in_namespace, sys.executable, "-c", _PROBE, to, *_SERVE, *listen],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
        env=clean_environment(),
    )
    assert completed.stdout == "reached\n", completed.stderr


@pytest.mark.parametrize("flag_name", ["--listen", "--http-listen", "--listen-plaintext"])
def test_invalid_address_gives_exit_code_2(flag_name: str) -> None:
    """One line names the flag and the value."""
    address = "::1:50051"
    completed = run_command("services.cache_proxy", *_SERVE, flag_name, address)
    assert completed.returncode == 2
    assert completed.stderr.count("\n") == 1
    assert f"{flag_name} {address!r} must " in completed.stderr


@contextmanager
def _bound_port(host: str) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind((host, 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("flag_name", ["--listen", "--http-listen", "--listen-plaintext"])
def test_address_that_cannot_be_bound_gives_one_line_with_the_reason(flag_name: str) -> None:
    """In use, not of this machine, or without permission. The exit code is 1."""
    other_addresses = {"--listen": "127.0.0.1:0", "--http-listen": "127.0.0.1:0"}
    unprivileged = ["setpriv", "--bounding-set=-net_bind_service"] if os.getuid() == 0 else []
    if unprivileged and shutil.which(unprivileged[0]) is None:
        pytest.skip("no setpriv is installed")
    is_unprivileged_port = int(_UNPRIVILEGED_PORT_FILE.read_text()) <= 999
    with _bound_port("127.0.0.1") as port:
        for address, reason in (
            (f"0.0.0.0:{port}", f"port {port} is taken by another process"),
            (f"127.0.0.1:{port}", f"port {port} is taken by another process"),
            ("192.0.2.77:7000", "192.0.2.77 is not an address of this machine"),
            *([] if is_unprivileged_port else [("127.0.0.1:999", "port 999 needs a right")]),
        ):
            flags = [part for pair in (other_addresses | {flag_name: address}).items() for part in pair]
            completed = subprocess.run(
                [*unprivileged, sys.executable, "-m", "services.cache_proxy", *_SERVE, *flags],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                cwd=ROOT,
                env=clean_environment(),
            )
            assert (completed.returncode, completed.stdout) == (1, ""), completed.stderr
            lines = [line for line in completed.stderr.splitlines() if '"level"' not in line]
            [line] = [line for line in lines if flag_name in line]
            assert f"{flag_name} {address}: {reason}" in line


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Yield a folder like an emptyDir with `fsGroup`: new files get its group. Its path is short."""
    with TemporaryDirectory(prefix="s") as folder:
        path = Path(folder)
        if os.getuid() == 0:
            os.chown(path, -1, _GROUP)
        path.chmod(0o2777)
        yield path


def test_unix_socket_has_the_mode_that_is_set(stage_with: StartProxyEnvironment, shared_folder: Path) -> None:
    """The umask does not matter."""
    path = shared_folder / "p.sock"
    stage = stage_with("--listen", f"unix:{path}", "--listen-mode", "0660", *UNLIMITED_RATE_FLAGS)
    assert path.stat().st_mode & 0o777 == 0o660
    with open_caller(f"unix:{path}") as client:
        assert client.infer([("mode", "t")]).code is StatusCode.OK
    assert stage.proxy.process.poll() is None


def test_invalid_listen_mode_gives_exit_code_2() -> None:
    """One line names the flag and the value."""
    mode = "0888"
    completed = run_command("services.cache_proxy", *_SERVE, "--listen-mode", mode)
    assert completed.returncode == 2
    assert completed.stderr.count("\n") == 1
    assert "--listen-mode" in completed.stderr
    assert f"{mode!r} is not an octal mode such as 0660" in completed.stderr


_CONNECT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("refused")
else:
    print("connected")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can run processes of other users")
def test_only_users_of_the_folders_group_can_open_a_unix_socket(
    stage_with: StartProxyEnvironment, shared_folder: Path
) -> None:
    """Like two containers of a pod with different users, both in the folder's group."""
    # The interpreter of the tests may be in a folder that other users cannot read.
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("no /usr/bin/python3 is installed")
    path = shared_folder / "p.sock"
    stage_with("--listen", f"unix:{path}", "--listen-mode", "0660")
    assert path.stat().st_gid == _GROUP
    for groups, expected in (([_GROUP], "connected"), ([], "refused")):
        completed = subprocess.run(
            [python, "-c", _CONNECT, str(path)],
            capture_output=True,
            text=True,
            check=True,
            user=1002,
            group=1002,
            extra_groups=groups,
            cwd="/",
        )
        assert completed.stdout == f"{expected}\n"


@pytest.mark.slow
def test_plaintext_address_beside_mutual_tls_needs_no_certificate(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """The other address still requires a certificate."""
    authority = CertificateAuthority(tmp_path)
    own = authority.sign("proxy")
    client_certificate = authority.sign("client", "DNS:client")
    stage = stage_with("--listen-plaintext", "127.0.0.1:0", *own.flags(ca="client-ca"), *UNLIMITED_RATE_FLAGS)
    with_tls, plaintext = stage.proxy.ready["listen"]
    with open_caller(plaintext) as client:
        assert client.infer([("plain", "t")], metadata=[("x-caller", "probe")]).code is StatusCode.OK
    with open_caller(with_tls) as client:
        assert client.infer([("plain", "t")], timeout_seconds=5).code is not StatusCode.OK
    ca, _, _ = client_certificate.pem
    for credentials, is_admitted in (
        (grpc.ssl_channel_credentials(ca), False),
        (grpc.ssl_channel_credentials(*client_certificate.pem), True),
    ):
        with open_caller(with_tls, credentials) as client:
            code = client.infer([("tls", "t")], timeout_seconds=5).code
            assert (code is StatusCode.OK) is is_admitted
    # There is no warning about a loopback address.
    assert "need no certificate" not in stage.proxy.log


@pytest.mark.slow
def test_reachable_plaintext_address_requires_tokens_and_logs_a_warning(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """The caller list applies to it too, and a warning names what is missing."""
    authority = CertificateAuthority(tmp_path)
    own = authority.sign("proxy")
    tokens = tmp_path / "callers"
    tokens.write_text("spiffe://x certificate\n")
    listed = ("--caller-tokens-file", str(tokens))
    for flags, warning in (
        (listed, r"bearer tokens are received without TLS on 0\.0\.0\.0:0"),
        ((), r"callers need no certificate on 0\.0\.0\.0:0"),
    ):
        stage = stage_with(
            "--listen-plaintext", "0.0.0.0:0", *own.flags(ca="client-ca"), *flags, *UNLIMITED_RATE_FLAGS
        )
        with open_caller(stage.proxy.ready["listen"][1]) as client:
            code = client.infer([("plain", "t")]).code
        assert code is (StatusCode.UNAUTHENTICATED if flags else StatusCode.OK)
        assert len(re.findall(warning, stage.proxy.log)) == 1
