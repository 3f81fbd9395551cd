"""A second proxy on an address is refused in one line; what a dead one left is taken over."""

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
    """Short, as a socket's must be."""
    with TemporaryDirectory(prefix="s") as folder:
        yield Path(folder) / "p.sock"


def test_a_path_on_which_somebody_listens_is_left_to_them(path: Path) -> None:
    """Whoever that is: not all that listen lock a file."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        for spelled in (f"unix:{path}", f"unix://{path}"):
            with pytest.raises(CommandError, match="somebody listens there already"):
                UnixSocketLock(spelled)
    UnixSocketLock(f"unix:{path}")  # the socket that the dead leave behind


def test_of_two_that_start_at_once_one_is_refused(path: Path) -> None:
    """Before either listens, and until the first has ended."""
    first = UnixSocketLock(f"unix:{path}")
    with pytest.raises(CommandError, match="another proxy listens there already"):
        UnixSocketLock(f"unix:{path}")
    os.close(first.lock_fd)  # as the end of its process does
    UnixSocketLock(f"unix:{path}")


def test_what_is_no_socket_is_neither_used_nor_removed(path: Path) -> None:
    """A file, a folder, a link (also where the lock would be) keep what they hold."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    for make in (lambda: path.write_text("precious"), path.mkdir, lambda: path.symlink_to(victim)):
        make()
        with pytest.raises(CommandError, match="no socket"):
            UnixSocketLock(f"unix:{path}")
        path.rmdir() if path.is_dir() else path.unlink()
    path.with_name("p.sock.lock").unlink()
    path.with_name("p.sock.lock").symlink_to(victim)
    with pytest.raises(CommandError, match=r"p\.sock\.lock"):
        UnixSocketLock(f"unix:{path}")
    assert victim.read_text() == "precious"


@pytest.mark.slow
def test_a_second_proxy_is_refused_and_the_first_goes_on(path: Path) -> None:
    """On the same path, the same port of a narrower address, the same HTTP port: exit code 1, one line."""
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
            open_caller(proxy.target) as asking,
        ):
            for number, taken in enumerate(
                (
                    ("--listen", f"unix:{path}", "--http-listen", "127.0.0.1:0"),
                    ("--listen", f"127.0.0.1:{port}", "--http-listen", "127.0.0.1:0"),
                    ("--listen", "127.0.0.1:0", "--http-listen", f"127.0.0.1:{http}"),
                )
            ):
                ended = run_command("services.cache_proxy", "serve", *flags, *taken)
                assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
                assert taken[1 if number < 2 else 3] in ended.stderr
                assert asking.infer([("first", str(number))]).code is StatusCode.OK
            proxy.process.kill()
            proxy.process.wait()
        assert path.is_socket()  # the dead leave it
        with run_service("services.cache_proxy", "serve", *flags, *first) as next_one:
            with open_caller(f"unix:{path}") as asking:
                assert asking.infer([("next", "t")]).code is StatusCode.OK
            assert next_one.stop() == 0
