"""Build the wheel of a release that the tests run beside this tree.

Run it as `python -m scripts.release_wheel COMMIT`.

The wheel replaces the one in `tests/fixtures/last_release/`. It holds the proxy alone, so that it stays
small: the augmenter and the stub never touch the proxies' Redis. See CONTRIBUTING.md, "Rolling upgrades".
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_FOLDER = _ROOT / "tests/fixtures/last_release"
_PATHS = ("pyproject.toml", "README.md", "protos", "services")
_LEFT_OUT = ("services/augmenter", "services/model_stub")


def main() -> None:
    """Build it, and note the commit beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="the release's commit or tag")
    commit = _git("rev-parse", "--verify", f"{parser.parse_args().commit}^{{commit}}").decode().strip()
    with tempfile.TemporaryDirectory() as name:
        source, built = Path(name) / "source", Path(name) / "wheel"
        with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, *_PATHS))) as archive:
            archive.extractall(source, filter="data")
        for path in _LEFT_OUT:
            shutil.rmtree(source / path)
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
        subprocess.run([*pip, "--wheel-dir", built, source], check=True)
        _FOLDER.mkdir(parents=True, exist_ok=True)
        for old in _FOLDER.glob("*.whl"):
            old.unlink()
        [wheel] = built.glob("*.whl")
        shutil.copy(wheel, _FOLDER)
    (_FOLDER / "COMMIT").write_text(f"{commit}\n", encoding="utf-8")


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=_ROOT, check=True, stdout=subprocess.PIPE).stdout  # noqa: S607


if __name__ == "__main__":
    main()
