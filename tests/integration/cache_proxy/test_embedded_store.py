"""The proxy with an embedded store: restarts, crashes and unusable folders."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs
from tests.support.processes import run_command
from tests.support.redis_server import wait_for
from tests.support.store_checks import infer_new_pairs, is_store_up


def _server_pids(folder: Path) -> list[int]:
    """Return the ids of the processes whose working directory is this folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").readlink() == folder:
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


@pytest.mark.slow
def test_embedded_store_survives_kill_and_leaves_no_server(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """After SIGKILL of the proxy its server ends too, and the next proxy on the folder has the answers.

    After SIGTERM both have ended.
    """
    folder = tmp_path / ("a long name " * 12).strip() / "store"
    flags = ("--cache-url", f"embedded:{folder}", *UNLIMITED_RATE_FLAGS)
    first = stage_with(*flags)
    pairs = make_pairs("embedded", 200)
    assert first.caller.infer(pairs).code is StatusCode.OK
    assert len(_server_pids(folder)) == 1
    wait_for(lambda: _is_saved(folder, 200), description="the answers are in the file")
    first.proxy.stop(signal.SIGKILL)
    second = stage_with(*flags, model=first.model)
    assert second.caller.infer(pairs).hits == 200
    assert len(_server_pids(folder)) == 1
    assert second.proxy.stop() == 0
    assert _server_pids(folder) == []


def _is_saved(folder: Path, pairs: int) -> bool:
    """Return whether the append-only file has grown to the size of so many pairs."""
    return sum(path.stat().st_size for path in (folder / "appendonlydir").glob("*.incr.aof")) > pairs * 17


@pytest.mark.slow
def test_killed_embedded_server_is_restarted(stage_with: StartProxyEnvironment, tmp_path: Path) -> None:
    """Callers are answered during the restart, and the answers are stored afterwards."""
    stage = stage_with("--cache-url", f"embedded:{tmp_path}", *UNLIMITED_RATE_FLAGS)
    infer_new_pairs(stage.caller, "before")
    [pid] = _server_pids(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: pid not in _server_pids(tmp_path) and _server_pids(tmp_path),
        description="there is a new server",
    )
    infer_new_pairs(stage.caller, "after")
    wait_for(lambda: is_store_up(stage.proxy), description="the store is back")
    stage.proxy.stop()
    later = stage_with("--cache-url", f"embedded:{tmp_path}", model=stage.model)
    assert later.caller.infer([*make_pairs("before", 20), *make_pairs("after", 20)]).hits == 40


@pytest.mark.slow
def test_second_proxy_on_embedded_folder_fails(stage_with: StartProxyEnvironment, tmp_path: Path) -> None:
    """It prints one line with the process that uses the folder; the first proxy continues."""
    stage = stage_with("--cache-url", f"embedded:{tmp_path}", *UNLIMITED_RATE_FLAGS)
    finished = _run_proxy(f"embedded:{tmp_path}")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (1, "", 1)
    assert str(tmp_path) in finished.stderr
    assert str(stage.proxy.process.pid) in finished.stderr
    infer_new_pairs(stage.caller, "continues")


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/nowhere"])
def test_unusable_embedded_folder_is_one_error_line(path: str, tmp_path: Path) -> None:
    """A file, a path below a file and one where no folder can be made: exit code 1, the path named."""
    (tmp_path / "file").touch()
    folder = tmp_path / path
    finished = _run_proxy(f"embedded:{folder}")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (1, "", 1), finished.stderr
    assert str(folder) in finished.stderr


def _run_proxy(url: str) -> "subprocess.CompletedProcess[str]":
    return run_command(
        "services.cache_proxy",
        "serve",
        "--model-target",
        "127.0.0.1:1",
        "--cache-url",
        url,
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
    )
