"""Where a proxy listens: IPv4 and IPv6, Unix sockets with a mode, with and without TLS; and why it cannot."""

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
def test_both_ports_mean_the_same_by_the_same_spelling() -> None:
    """Every spelling, on IPv4 and IPv6: the gRPC port and the HTTP port are reached on the same addresses."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    for host, reached in SPELLINGS:
        listen = ("--listen", f"{host}:0", "--http-listen", f"{host}:0")
        with run_service("services.cache_proxy", *_SERVE, *listen) as proxy:
            for ready in (proxy.target, str(proxy.ready["http"])):
                port = int(ready.rpartition(":")[2])
                for to in ("127.0.0.1", "::1"):
                    with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET) as one:
                        assert (one.connect_ex((to, port)) == 0) is (to in reached), (host, ready, to)
            with open_caller(proxy.target) as asking:  # what it says of itself is a target
                assert asking.infer([]).code is StatusCode.OK
            with urlopen(f"{proxy.http_url}/readyz", timeout=30) as response:
                assert response.status == 200


def _in_a_namespace(*commands: str) -> list[str]:
    """Run a proxy's command line behind these commands, in a network of its own."""
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
def test_every_address_is_what_the_machine_has(commands: Sequence[str], to: str, host: str) -> None:
    """On a cluster with IPv6 alone, or without it, the default addresses and localhost answer probes."""
    inside = _in_a_namespace(*commands)
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own to be had (unshare --net, ip)")
    listen = ("--listen", f"{host}:0", "--http-listen", f"{host}:0")
    ended = subprocess.run(
        [*inside, sys.executable, "-c", _PROBE, to, *_SERVE, *listen],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
        env=clean_environment(),
    )
    assert ended.stdout == "reached\n", ended.stderr


@pytest.mark.parametrize("flag_name", ["--listen", "--http-listen", "--listen-plaintext"])
def test_what_is_no_address_is_exit_code_2(flag_name: str) -> None:
    """One line that names flag and value."""
    address = "::1:50051"
    ended = run_command("services.cache_proxy", *_SERVE, flag_name, address)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"{flag_name} {address!r} must " in ended.stderr


@contextmanager
def _taken(host: str) -> Iterator[int]:
    with socket.socket() as one:
        one.bind((host, 0))
        one.listen()
        yield one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("flag_name", ["--listen", "--http-listen", "--listen-plaintext"])
def test_an_address_that_cannot_be_had_is_one_line_with_the_reason(flag_name: str) -> None:
    """Taken, not this machine's, without the right: three different ones, exit code 1."""
    others = {"--listen": "127.0.0.1:0", "--http-listen": "127.0.0.1:0"}
    unprivileged = ["setpriv", "--bounding-set=-net_bind_service"] if os.getuid() == 0 else []
    if unprivileged and shutil.which(unprivileged[0]) is None:
        pytest.skip("no setpriv is installed")
    is_free = int(_UNPRIVILEGED_PORT_FILE.read_text()) <= 999
    with _taken("127.0.0.1") as port:
        for address, reason in (
            (f"0.0.0.0:{port}", f"port {port} is taken by another process"),
            (f"127.0.0.1:{port}", f"port {port} is taken by another process"),
            ("192.0.2.77:7000", "192.0.2.77 is not an address of this machine"),
            *([] if is_free else [("127.0.0.1:999", "port 999 needs a right")]),
        ):
            flags = [part for pair in (others | {flag_name: address}).items() for part in pair]
            ended = subprocess.run(
                [*unprivileged, sys.executable, "-m", "services.cache_proxy", *_SERVE, *flags],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                cwd=ROOT,
                env=clean_environment(),
            )
            assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
            lines = [line for line in ended.stderr.splitlines() if '"level"' not in line]
            [line] = [line for line in lines if flag_name in line]
            assert f"{flag_name} {address}: {reason}" in line


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Short, as a socket's path must be; as an emptyDir with `fsGroup`: what is made in it has its group."""
    with TemporaryDirectory(prefix="s") as folder:
        path = Path(folder)
        if os.getuid() == 0:
            os.chown(path, -1, _GROUP)
        path.chmod(0o2777)
        yield path


def test_a_unix_sockets_mode_is_as_set(stage_with: StartProxyEnvironment, shared_folder: Path) -> None:
    """Whatever the umask."""
    path = shared_folder / "p.sock"
    stage = stage_with("--listen", f"unix:{path}", "--listen-mode", "0660", *UNLIMITED_RATE_FLAGS)
    assert path.stat().st_mode & 0o777 == 0o660
    with open_caller(f"unix:{path}") as asking:
        assert asking.infer([("mode", "t")]).code is StatusCode.OK
    assert stage.proxy.process.poll() is None


def test_a_mode_that_is_none_is_exit_code_2() -> None:
    """One line that names it."""
    mode = "0888"
    ended = run_command("services.cache_proxy", *_SERVE, "--listen-mode", mode)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "--listen-mode" in ended.stderr
    assert f"{mode!r} is not an octal mode such as 0660" in ended.stderr


_CONNECT = """
import socket, sys
one = socket.socket(socket.AF_UNIX)
try:
    one.connect(sys.argv[1])
except PermissionError:
    print("refused")
else:
    print("connected")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can run processes of other users")
def test_users_of_the_folders_group_share_a_unix_socket(
    stage_with: StartProxyEnvironment, shared_folder: Path
) -> None:
    """Two images with their own users in one pod, in the group of the folder; no others."""
    python = shutil.which("python3", path="/usr/bin")  # the tests' own may lie where only its owner reads
    if python is None:
        pytest.skip("no /usr/bin/python3 is installed")
    path = shared_folder / "p.sock"
    stage_with("--listen", f"unix:{path}", "--listen-mode", "0660")
    assert path.stat().st_gid == _GROUP
    for groups, said in (([_GROUP], "connected"), ([], "refused")):
        tried = subprocess.run(
            [python, "-c", _CONNECT, str(path)],
            capture_output=True,
            text=True,
            check=True,
            user=1002,
            group=1002,
            extra_groups=groups,
            cwd="/",
        )
        assert tried.stdout == f"{said}\n"


@pytest.mark.slow
def test_plaintext_beside_mutual_tls_needs_no_certificate(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """On its own address alone: the other one still wants a certificate."""
    authority = CertificateAuthority(tmp_path)
    own, client = authority.sign("proxy"), authority.sign("client", "DNS:client")
    stage = stage_with("--listen-plaintext", "127.0.0.1:0", *own.flags(ca="client-ca"), *UNLIMITED_RATE_FLAGS)
    with_tls, plaintext = stage.proxy.ready["listen"]
    with open_caller(plaintext) as asking:
        assert asking.infer([("plain", "t")], metadata=[("x-caller", "probe")]).code is StatusCode.OK
    with open_caller(with_tls) as asking:
        assert asking.infer([("plain", "t")], timeout_seconds=5).code is not StatusCode.OK
    ca, _, _ = client.pem
    for credentials, is_let_in in (
        (grpc.ssl_channel_credentials(ca), False),
        (grpc.ssl_channel_credentials(*client.pem), True),
    ):
        with open_caller(with_tls, credentials) as asking:
            code = asking.infer([("tls", "t")], timeout_seconds=5).code
            assert (code is StatusCode.OK) is is_let_in
    assert "need no certificate" not in stage.proxy.log  # on a loopback address


@pytest.mark.slow
def test_plaintext_that_others_reach_obeys_tokens_and_is_warned_of(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """The list of callers holds on it too; a warning says what is missing there."""
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
        with open_caller(stage.proxy.ready["listen"][1]) as asking:
            code = asking.infer([("plain", "t")]).code
        assert code is (StatusCode.UNAUTHENTICATED if flags else StatusCode.OK)
        assert len(re.findall(warning, stage.proxy.log)) == 1
