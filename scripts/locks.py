"""Update the locks in `requirements/` to match `pyproject.toml`, or check that they do.

A lock holds names, versions and hashes, and no index address. There is one for each service, one for
development (which constrains the others, so that all agree), and one for the tools that install.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_LOCKS = {
    "dev.txt": ("pyproject.toml", "requirements/bootstrap.in", "--all-extras", "--group", "dev"),
    "bootstrap.txt": ("requirements/bootstrap.in", "-c", "{dev}"),
    "proxy.txt": (
        "pyproject.toml",
        "--extra",
        "proxy",
        "--extra",
        "embedded",
        "--extra",
        "tracing",
        "-c",
        "{dev}",
    ),
    "augmenter.txt": ("pyproject.toml", "--extra", "augmenter", "--extra", "tracing", "-c", "{dev}"),
    "k8s.txt": ("pyproject.toml", "--group", "k8s", "-c", "{dev}"),
    "audit.txt": ("pyproject.toml", "--group", "audit", "-c", "{dev}"),
    "mutants.txt": ("pyproject.toml", "--group", "mutants", "-c", "{dev}"),
    "stub.txt": ("pyproject.toml", "--extra", "stub", "-c", "{dev}"),
}


def main() -> int:
    """Return 1 if `--check` found a stale lock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--upgrade", action="store_true", help="to the newest versions")
    options = parser.parse_args()
    locks = _ROOT / "requirements"
    with tempfile.TemporaryDirectory() as made:
        for name, arguments in _LOCKS.items():
            if (locks / name).exists():
                # Locked versions stay while pyproject.toml allows them.
                shutil.copy(locks / name, Path(made) / name)
            dev = Path(made) / "dev.txt"
            command = [argument.format(dev=dev) for argument in arguments]
            _compile(command + ["--upgrade"] * options.upgrade, Path(made) / name)
        stale = [name for name in _LOCKS if not _same(Path(made) / name, locks / name)]
        if not options.check:
            for name in stale:
                shutil.copy(Path(made) / name, locks / name)
            return 0
    for name in stale:
        print(f"requirements/{name} is not what pyproject.toml asks for; run: make lock")
    return 1 if stale else 0


def _compile(arguments: list[str], lock: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "uv"),
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--generate-hashes",
        "--no-annotate",
        "--python-version",
        "3.11",
        "--output-file",
        str(lock),
        *arguments,
    ]
    environment = os.environ | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}
    subprocess.run(command, cwd=_ROOT, env=environment, check=True)


def _same(made: Path, committed: Path) -> bool:
    return committed.exists() and made.read_bytes() == committed.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
