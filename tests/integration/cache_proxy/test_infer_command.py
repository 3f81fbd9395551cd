"""The command `cache-proxy infer`."""

import json
import subprocess
import sys

import pytest

from tests.integration.cache_proxy.conftest import ProxyEnvironment
from tests.support.model_server import scripted_level
from tests.support.processes import ROOT, clean_environment, model_stub, run_command
from tests.support.redis_server import free_port

INFER = ("services.cache_proxy", "infer")


def test_one_pair_prints_its_level(stage: ProxyEnvironment) -> None:
    """Only the number, on standard output."""
    completed = run_command(*INFER, "--target", stage.proxy.target, "--company", "Infér", "--title", "Clerk")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == f"{scripted_level('Infér', 'Clerk')}\n"


def test_json_lines_print_level_and_pair_in_order(stage: ProxyEnvironment) -> None:
    """More than one batch. Blank lines and other members are ignored."""
    pairs = [(f"infer {number}", "T\u00e9") for number in range(1200)]
    lines = "".join(
        json.dumps({"title": title, "company": company, "x": 1}) + "\n\n" for company, title in pairs
    )
    completed = run_command(*INFER, "--target", stage.proxy.target, stdin=lines)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == "".join(f"{scripted_level(*pair)}\t{pair[0]}\t{pair[1]}\n" for pair in pairs)


def test_json_lines_with_configured_fields(stage: ProxyEnvironment) -> None:
    """A field may be a dotted path. An error names the path that is missing."""
    line = '\ufeff{"content": {"company": "Field", "role": "Clerk"}}\n'
    args = (
        *INFER,
        "--target",
        stage.proxy.target,
        "--company-field",
        "content.company",
        "--title-field",
        "content.role",
    )
    completed = run_command(*args, stdin=line)
    assert (completed.returncode, completed.stdout) == (
        0,
        f"{scripted_level('Field', 'Clerk')}\tField\tClerk\n",
    )
    completed = run_command(*args, stdin='{"content": {"company": "Field"}}\n')
    assert (completed.returncode, completed.stderr) == (1, "cache-proxy: line 1: content.role is missing\n")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"company": "c"}',
        '{"company": 1, "title": "t"}',
        '{"company": "\\ud800", "title": "t"}',
        "[" * 100_000,
    ],
    ids=["text", "list", "half", "number", "surrogate", "deep"],
)
def test_invalid_line_is_one_error_line_with_its_number(stage: ProxyEnvironment, line: str) -> None:
    """The exit code is 1."""
    lines = f'{{"company": "c", "title": "t"}}\n{line}\n'
    completed = run_command(*INFER, "--target", stage.proxy.target, stdin=lines)
    assert completed.returncode == 1
    assert completed.stderr.count("\n") == 1
    assert "line 2" in completed.stderr


@pytest.mark.parametrize(
    ("args", "code", "error_part"),
    [
        (("--company", "c"), 2, "--title"),
        (("--title", "t"), 2, "--company"),
        (("--company", "c", "--title", "t", "--deadline", "soon"), 2, "--deadline"),
        (("--company", "x" * 5000, "--title", "t"), 1, "INVALID_ARGUMENT"),
        (("--company", "\udcff", "--title", "t"), 2, "UTF-8"),
    ],
    ids=["company", "title", "deadline", "long", "bytes"],
)
def test_invalid_request_is_one_error_line(
    stage: ProxyEnvironment, args: tuple[str, ...], code: int, error_part: str
) -> None:
    """Half a pair, an invalid value, or a pair that the proxy rejects."""
    completed = run_command(*INFER, "--target", stage.proxy.target, *args)
    assert (completed.returncode, completed.stdout) == (code, "")
    assert completed.stderr.count("\n") == 1
    assert error_part in completed.stderr


def test_unreachable_proxy_is_one_error_line() -> None:
    """The line has the target and the status of gRPC."""
    target = f"127.0.0.1:{free_port()}"
    completed = run_command(*INFER, "--target", target, "--company", "c", "--title", "t")
    assert completed.returncode == 1
    assert completed.stderr.count("\n") == 1
    assert target in completed.stderr
    assert "UNAVAILABLE" in completed.stderr


def test_closed_output_pipe_is_no_error() -> None:
    """`cache-proxy infer < many | head -1` ends without a traceback."""
    lines = "\n".join(f'{{"company": "c{number}", "title": "t"}}' for number in range(20_000))
    with model_stub("--rate", "0") as stub:
        command = f'"{sys.executable}" -m services.cache_proxy infer --target {stub.target} | head -1'
        completed = subprocess.run(
            ["bash", "-c", command],
            input=lines,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
            env=clean_environment(),
        )
    assert completed.stdout.endswith("\tc0\tt\n")
    assert completed.stderr == ""
