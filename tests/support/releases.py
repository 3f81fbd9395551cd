"""Other builds of the proxy, each in a folder of packages: the last release, and one with a raised format."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import ROOT, ServiceProcess, run_service

LAST_RELEASE = ROOT / "tests/fixtures/last_release"
_FORMAT = re.compile(r"^FORMAT = (\d+)$", re.MULTILINE)


def install_last_release(folder: Path) -> Path:
    """Install the last release into `folder`, without its dependencies, and return the folder."""
    [wheel] = LAST_RELEASE.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return folder


def copy_with_next_format(folder: Path) -> Path:
    """Copy this tree's packages into `folder`, raise the queue's format by one, and return the folder."""
    for name in ("services", "protos"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    modules = (folder / "services/cache_proxy").rglob("*.py")
    [module] = [path for path in modules if _FORMAT.search(path.read_text("utf-8"))]
    text = _FORMAT.sub(lambda found: f"FORMAT = {int(found[1]) + 1}", module.read_text("utf-8"))
    module.write_text(text, encoding="utf-8")
    return folder


@contextmanager
def proxy_of(build: Path, *flags: str) -> Iterator[ServiceProcess]:
    """Run the cache proxy of a build on free ports, until the block ends."""
    free = ("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s")
    env = {"PYTHONPATH": os.fspath(build)}
    with run_service("services.cache_proxy", "serve", *free, *flags, env=env, cwd=build) as running:
        yield running
