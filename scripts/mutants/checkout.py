"""A copy of the checkout to mutate, and one run of tests in it."""

import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_MAX_TESTS_SECONDS = 600


def copy_checkout(folder: Path) -> None:
    """Copy all files that git tracks or does not ignore, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=_ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = _ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def test_command(tests: tuple[str, ...]) -> list[str]:
    """Return the command that runs `tests` of the working directory and stops at the first failure."""
    return [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not alone", *tests]


def tests_pass(folder: Path, tests: tuple[str, ...]) -> bool:
    """Run `tests` in the copy. A run that never ends counts as failed."""
    try:
        run = subprocess.run(
            test_command(tests), cwd=folder, check=False, capture_output=True, timeout=_MAX_TESTS_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0
