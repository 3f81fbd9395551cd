"""Every channel argument in the repository is one that gRPC's core knows: it ignores the others silently."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # it has no types

from tests.support.processes import ROOT

_FOLDERS = ("services", "demo", "benchmarks", "scripts", "tests")
_NAME = re.compile(r"grpc\.[a-z0-9_.]+")
_IN_A_BLOCK = re.compile(r"\(\s*\"(grpc\.[a-z0-9_.]+)\"\s*,")


def _in_code(path: Path) -> Iterator[str]:
    """The first items of pairs: that is how channel arguments are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(name)), _]) if _NAME.fullmatch(name):
                yield name
            case _:
                pass


def _arguments() -> dict[str, list[str]]:
    """Where each is set: in code, and in the docs' examples."""
    found: dict[str, list[str]] = {}
    for folder in _FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in _in_code(path):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    for path in (ROOT / "docs").rglob("*.md"):
        for name in _IN_A_BLOCK.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


_ARGUMENTS = _arguments()


@pytest.fixture(scope="module")
def core() -> bytes:
    """The binary of gRPC's core."""
    return Path(cygrpc.__file__).read_bytes()


def test_search_finds_channel_arguments() -> None:
    """Those of the server, of the proxy's channel, of the augmenter's, and of an example in the docs."""
    places = {place for found in _ARGUMENTS.values() for place in found}
    assert places >= {
        "services/cache_proxy/rpc/channel_args.py",
        "services/cache_proxy/rpc/server.py",
        "services/cache_proxy/model/client.py",
        "services/augmenter/client/channel.py",
        "docs/calling-the-proxy.md",
    }


@pytest.mark.parametrize("name", sorted(_ARGUMENTS))
def test_channel_argument_is_known_to_grpc_core(name: str, core: bytes) -> None:
    """It stands in the binary as a whole string."""
    assert f"{name}\0".encode() in core, f"unknown to gRPC, set in {', '.join(_ARGUMENTS[name])}"
