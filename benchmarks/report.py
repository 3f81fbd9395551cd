"""Print results as a table and write them as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

_FOLDER = Path(".bench")
_FILE_WIDTH = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A result beside its baseline. `ratio` has to reach `target`, or, if `at_most`, to stay below it."""

    what: str
    measured: str
    beside: str
    ratio: float
    target: float
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        """Return whether the target is reached."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def show(name: str, figures: Sequence[Figure]) -> None:
    """Print the table and write `.bench/NAME.json`."""
    table = Table(box=box.SIMPLE, title=name, title_justify="left")
    for heading in ("what", "measured", "beside", "ratio", "to reach", "note"):
        table.add_column(heading, justify="right" if heading in {"ratio", "to reach"} else "left")
    for one in figures:
        sign, verdict = ("≤" if one.at_most else "≥"), ("" if one.reached else " [red]missed[/]")
        table.add_row(
            one.what,
            one.measured,
            one.beside,
            f"{one.ratio:.2f}{verdict}",
            f"{sign} {one.target:g}",
            one.note,
        )
    console = Console(highlight=False)
    # In a file the table is not limited by a terminal's width.
    if not console.is_terminal:
        console = Console(highlight=False, width=_FILE_WIDTH)
    console.print(table)
    _FOLDER.mkdir(exist_ok=True)
    found = [asdict(one) | {"reached": one.reached} for one in figures]
    (_FOLDER / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
