"""Mutants of a Python module, made and run by cosmic-ray in the copy of the checkout."""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

from scripts.mutants.checkout import test_command

_MUTANT_SECONDS = 120
# One replacement for each operator is enough: cosmic-ray knows eleven. Replacing `*` by `/` would also change
# the `*` of keyword-only parameters, which no test can notice.
_LEFT_OUT = (
    (
        r"core/ReplaceBinaryOperator_(?!Add_Sub|Sub_Add|Div_Mul|FloorDiv_Mul|Mod_Add|Mul_Add"
        r"|BitAnd_BitOr|BitOr_BitAnd|LShift_RShift|RShift_LShift)"
    ),
    r"core/ReplaceComparisonOperator_(?!Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is)",
    r"core/RemoveDecorator",
)
_CONFIG = """\
[cosmic-ray]
module-path = "{path}"
timeout = {seconds}.0
excluded-modules = []
test-command = "{command}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [{left_out}]
"""


def survivors(folder: Path, path: str, tests: Sequence[str]) -> tuple[int, list[str]]:
    """Run every mutant of the module at `path`; return their number, and the diffs that no test noticed."""
    config, session = folder / "cosmic-ray.toml", folder / "session.sqlite"
    session.unlink(missing_ok=True)
    command = shlex.join(test_command(tuple(tests)))
    left_out = ", ".join(f"'{pattern}'" for pattern in _LEFT_OUT)
    config.write_text(
        _CONFIG.format(
            path=path, seconds=_MUTANT_SECONDS, command=command.replace('"', '\\"'), left_out=left_out
        )
    )
    tool = Path(sys.executable).parent
    for step in (
        [tool / "cosmic-ray", "init", config, session],
        [tool / "cr-filter-operators", session, config],
        [tool / "cosmic-ray", "exec", config, session],
    ):
        subprocess.run(list(map(str, step)), cwd=folder, check=True, capture_output=True)
    with use_db(str(session), WorkDB.Mode.open) as database:
        results = [result for _, result in database.completed_work_items if _was_run(result)]
    return len(results), list(_diffs(results))


def _was_run(result: Any) -> bool:
    return result.test_outcome is not None


def _diffs(results: Sequence[Any]) -> Iterator[str]:
    for result in results:
        if result.test_outcome is TestOutcome.SURVIVED:
            yield "\n".join(line for line in result.diff.splitlines() if line[:1] in "+-@")
