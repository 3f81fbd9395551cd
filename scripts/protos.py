"""Generate the stubs of `protos/seniority.proto`, or check that the committed ones are up to date."""

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PROTO = "protos/seniority.proto"


def main() -> int:
    """Return 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        _generate(_ROOT)
        return 0
    with tempfile.TemporaryDirectory() as made:
        _generate(Path(made))
        names = sorted(str(path.relative_to(made)) for path in Path(made).rglob("*") if path.is_file())
        stale = [name for name in names if not _same(Path(made) / name, _ROOT / name)]
    for name in stale:
        print(f"{name} is not what {_PROTO} gives; run: make protos")
    return 1 if stale else 0


def _generate(out: Path) -> None:
    tools = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            ".",
            f"--plugin=protoc-gen-mypy={tools / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={tools / 'protoc-gen-mypy_grpc'}",
            *(
                f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}"
                for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
            ),
            _PROTO,
        ],
        cwd=_ROOT,
        check=True,
    )


def _same(made: Path, committed: Path) -> bool:
    return committed.exists() and filecmp.cmp(made, committed, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
