"""The commands of the README and of the page for callers, run as a reader would."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, clean_environment

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PAGES = ("README.md", "docs/calling-the-proxy.md")
_BLOCKS = [
    (page, language, text)
    for page in _PAGES
    for language, text in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
]
_RUN_BY_THEMSELVES = {"make demo\n", "make up\n"}
_RUNNABLE = [
    pytest.param(language, text, id=f"{Path(page).stem}-{number}-{text.split()[0].rpartition('/')[2]}")
    for number, (page, language, text) in enumerate(_BLOCKS)
    if language in {"sh", "python"} and text not in _RUN_BY_THEMSELVES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project's files stand, but where a block may leave what it makes."""
    return _tree(tmp_path_factory.mktemp("readme"))


def _tree(made: Path) -> Path:
    for path in ROOT.iterdir():
        if path.name not in {".git", ".demo", ".cache-proxy"}:
            (made / path.name).symlink_to(path)
    return made


@pytest.fixture(scope="module")
def fixed_ports() -> Iterator[None]:
    """The ports of the README, which only one run of these tests on a machine can use at a time."""
    with (Path(tempfile.gettempdir()) / f"make-up-in-a-test-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def up(folder: Path, fixed_ports: None) -> Iterator[str]:
    """`make up` as a reader starts it, and ends it with Ctrl-C."""
    assert any(text == "make up\n" for _, _, text in _BLOCKS)
    errors = folder / "make-up.log"
    with errors.open("w") as log:
        process = subprocess.Popen(
            ["make", "up"],
            cwd=folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdout
    with process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "/metrics" in line:
                break
        else:
            pytest.fail(f"make up ended: {''.join(printed)}{errors.read_text()}")
        yield "".join(printed)
        os.killpg(process.pid, signal.SIGINT)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    assert code in {0, 2, -signal.SIGINT}


@pytest.mark.parametrize(("language", "text"), _RUNNABLE)
def test_block_runs(language: str, text: str, folder: Path, up: str) -> None:
    """Every block that is not a picture runs without an error, in its page's order, and says something."""
    command = (
        [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # grpcurl is among our own tools
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-7]", done.stdout), done.stdout
    assert "Traceback" not in done.stderr


def test_lines_printed_by_make_up_run(folder: Path, up: str) -> None:
    """The Python lines that `make up` prints answer as they stand."""
    lines = [line.removeprefix("    ") for line in up.splitlines() if line.startswith("    ")]
    last = next(number for number, line in enumerate(lines) if line.startswith("print("))
    python = "\n".join(lines[: last + 1])
    done = subprocess.run(
        [".venv/bin/python", "-c", python],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"seniority: [1-7]", done.stdout)


def test_every_block_has_tested_language() -> None:
    """A block in a language that this test does not run would be a claim that nobody checks.

    But for the one in Go, which would take a compiler and a gRPC of its own: it was built and run by hand.
    """
    assert {language for _, language, _ in _BLOCKS} <= {"sh", "python", "text", "go"}
    assert [page for page, language, _ in _BLOCKS if language == "go"] == ["docs/calling-the-proxy.md"]
    assert len(_RUNNABLE) >= 11


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """`make demo` keeps every promise it makes, in under a minute, and leaves nothing running."""
    folder = _tree(tmp_path)  # not the one in which `make up` may still be running
    done = subprocess.run(
        ["make", "demo"],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What it cost" in done.stdout
    left = subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True, check=False).stdout
    assert "valkey-server" not in left
    assert "services." not in left


def _environment() -> dict[str, str]:
    environment = clean_environment()
    environment.pop("MAKEFLAGS", None)  # the tests may themselves run below make
    environment.pop("MAKELEVEL", None)
    return environment
