"""Run mutation tests over the modules named (default: all), and list the mutants that no test noticed."""

import argparse
import random
import tempfile
import time
from pathlib import Path

from scripts.mutants import lua, python
from scripts.mutants.checkout import copy_checkout, tests_pass
from scripts.mutants.targets import LUA, PYTHON, Target


def main() -> int:
    """Return 1 if any mutant survived, 2 if the tests fail without one."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="part of a path, such as gcra or claim.lua")
    parser.add_argument("--sample", type=int, default=0, help="mutants drawn from each Lua script; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    arguments = parser.parse_args()
    survived = 0
    for target in _chosen(arguments.names):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            copy_checkout(Path(folder))
            if not tests_pass(Path(folder), target.tests):
                print(f"{target.path}: its tests fail without any change: {' '.join(target.tests)}")
                return 2
            if target in LUA:
                count, found = _run_lua(Path(folder), target, arguments.sample, arguments.seed)
            else:
                count, found = python.survivors(Path(folder), target.path, target.tests)
        minutes = (time.monotonic() - started) / 60
        print(f"{target.path}: {count} mutants, {len(found)} survived, {minutes:.1f} minutes", flush=True)
        for one in found:
            print(one, flush=True)
        survived += len(found)
    return int(survived > 0)


def _chosen(names: list[str]) -> list[Target]:
    targets = [*PYTHON, *LUA]
    return [target for target in targets if not names or any(name in target.path for name in names)]


def _run_lua(folder: Path, target: Target, sample: int, seed: int) -> tuple[int, list[str]]:
    script = folder / target.path
    original = script.read_text()
    mutants = list(lua.mutants(original))
    if sample and sample < len(mutants):
        mutants = random.Random(seed).sample(mutants, sample)  # noqa: S311
    found = []
    for mutant in mutants:
        script.write_text(mutant.text)
        if tests_pass(folder, target.tests):
            found.append(f"  line {mutant.line}\n-{mutant.before}\n+{mutant.after}")
    script.write_text(original)
    return len(mutants), found


if __name__ == "__main__":
    raise SystemExit(main())
