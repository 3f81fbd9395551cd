"""`cache-proxy infer`: for people."""

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
    """Just the number, on standard output."""
    ended = run_command(*INFER, "--target", stage.proxy.target, "--company", "Infér", "--title", "Clerk")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{scripted_level('Infér', 'Clerk')}\n"


def test_json_lines_print_a_level_and_the_pair_each(stage: ProxyEnvironment) -> None:
    """In order, more than one batch, blank lines and other members passed over."""
    pairs = [(f"infer {number}", "T\u00e9") for number in range(1200)]
    lines = "".join(
        json.dumps({"title": title, "company": company, "x": 1}) + "\n\n" for company, title in pairs
    )
    ended = run_command(*INFER, "--target", stage.proxy.target, stdin=lines)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "".join(f"{scripted_level(*pair)}\t{pair[0]}\t{pair[1]}\n" for pair in pairs)


def test_json_lines_may_have_other_fields(stage: ProxyEnvironment) -> None:
    """A dotted path leads to company and title; a line without them is named with the path."""
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
    ended = run_command(*args, stdin=line)
    assert (ended.returncode, ended.stdout) == (0, f"{scripted_level('Field', 'Clerk')}\tField\tClerk\n")
    ended = run_command(*args, stdin='{"content": {"company": "Field"}}\n')
    assert (ended.returncode, ended.stderr) == (1, "cache-proxy: line 1: content.role is missing\n")


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
def test_a_bad_line_is_one_line_with_its_number(stage: ProxyEnvironment, line: str) -> None:
    """Exit code 1, and which line it was."""
    lines = f'{{"company": "c", "title": "t"}}\n{line}\n'
    ended = run_command(*INFER, "--target", stage.proxy.target, stdin=lines)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "line 2" in ended.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--company", "c"), 2, "--title"),
        (("--title", "t"), 2, "--company"),
        (("--company", "c", "--title", "t", "--deadline", "soon"), 2, "--deadline"),
        (("--company", "x" * 5000, "--title", "t"), 1, "INVALID_ARGUMENT"),
        (("--company", "\udcff", "--title", "t"), 2, "UTF-8"),
    ],
    ids=["company", "title", "deadline", "long", "bytes"],
)
def test_what_cannot_be_asked_is_one_line(
    stage: ProxyEnvironment, args: tuple[str, ...], code: int, said: str
) -> None:
    """Half a pair, a bad value, a pair that the proxy refuses."""
    ended = run_command(*INFER, "--target", stage.proxy.target, *args)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr


def test_a_proxy_that_is_not_there_is_one_line() -> None:
    """With the target and what gRPC says."""
    target = f"127.0.0.1:{free_port()}"
    ended = run_command(*INFER, "--target", target, "--company", "c", "--title", "t")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert target in ended.stderr
    assert "UNAVAILABLE" in ended.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`cache-proxy infer < many | head -1` ends without a traceback."""
    lines = "\n".join(f'{{"company": "c{number}", "title": "t"}}' for number in range(20_000))
    with model_stub("--rate", "0") as stub:
        command = f'"{sys.executable}" -m services.cache_proxy infer --target {stub.target} | head -1'
        done = subprocess.run(
            ["bash", "-c", command],
            input=lines,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
            env=clean_environment(),
        )
    assert done.stdout.endswith("\tc0\tt\n")
    assert done.stderr == ""
