"""A second proxy on an address fails with one line, and the socket of a dead proxy is taken over."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from grpc import StatusCode

from services.cache_proxy.rpc.unix_socket import UnixSocketLock
from services.common.errors import CommandError
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller
from tests.support.model_server import scripted_model
from tests.support.processes import run_command, run_service
from tests.support.redis_server import free_port


@pytest.fixture
def path() -> Iterator[Path]:
    """Yield a path that is short enough for a socket."""
    with TemporaryDirectory(prefix="s") as folder:
        yield Path(folder) / "p.sock"


def test_path_in_use_by_a_program_without_lock_is_refused(path: Path) -> None:
    """Other programs that listen there use no lock file."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        for address in (f"unix:{path}", f"unix://{path}"):
            with pytest.raises(CommandError, match="another program listens there already"):
                UnixSocketLock(address)
    # A socket without a process is taken over.
    UnixSocketLock(f"unix:{path}")


def test_second_of_two_concurrent_proxies_is_refused(path: Path) -> None:
    """The lock is held before either listens, and until the first process has ended."""
    first = UnixSocketLock(f"unix:{path}")
    with pytest.raises(CommandError, match="another proxy listens there already"):
        UnixSocketLock(f"unix:{path}")
    # The end of its process closes the descriptor.
    os.close(first.lock_fd)
    UnixSocketLock(f"unix:{path}")


def test_path_that_is_not_a_socket_is_refused_and_kept(path: Path) -> None:
    """A file, a folder and a link stay unchanged, also in place of the lock file."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    for create in (lambda: path.write_text("precious"), path.mkdir, lambda: path.symlink_to(victim)):
        create()
        with pytest.raises(CommandError, match="no socket"):
            UnixSocketLock(f"unix:{path}")
        path.rmdir() if path.is_dir() else path.unlink()
    path.with_name("p.sock.lock").unlink()
    path.with_name("p.sock.lock").symlink_to(victim)
    with pytest.raises(CommandError, match=r"p\.sock\.lock"):
        UnixSocketLock(f"unix:{path}")
    assert victim.read_text() == "precious"


@pytest.mark.slow
def test_second_proxy_on_an_address_fails_and_the_first_keeps_serving(path: Path) -> None:
    """On the same path, the same port of a narrower address, or the same HTTP port: exit code 1, one line."""
    port, http = free_port(), free_port()
    with scripted_model() as model:
        flags = (
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            "--drain-delay",
            "0s",
            *UNLIMITED_RATE_FLAGS,
        )
        first = (
            "--listen",
            f"unix:{path}",
            "--listen",
            f"0.0.0.0:{port}",
            "--http-listen",
            f"127.0.0.1:{http}",
        )
        with (
            run_service("services.cache_proxy", "serve", *flags, *first) as proxy,
            open_caller(proxy.target) as client,
        ):
            for number, second in enumerate(
                (
                    ("--listen", f"unix:{path}", "--http-listen", "127.0.0.1:0"),
                    ("--listen", f"127.0.0.1:{port}", "--http-listen", "127.0.0.1:0"),
                    ("--listen", "127.0.0.1:0", "--http-listen", f"127.0.0.1:{http}"),
                )
            ):
                completed = run_command("services.cache_proxy", "serve", *flags, *second)
                assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (1, "", 1), (
                    completed.stderr
                )
                assert second[1 if number < 2 else 3] in completed.stderr
                assert client.infer([("first", str(number))]).code is StatusCode.OK
            proxy.process.kill()
            proxy.process.wait()
        # The dead process left its socket.
        assert path.is_socket()
        with run_service("services.cache_proxy", "serve", *flags, *first) as successor:
            with open_caller(f"unix:{path}") as client:
                assert client.infer([("next", "t")]).code is StatusCode.OK
            assert successor.stop() == 0
