"""`make demo`: the main job from nothing, what it cost, and the same again after a crash."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from demo.postings import POISON, parse_pairs, read_lines, write_postings
from demo.processes import Server, ServerFailedError, environment, running_server
from services.model_stub.levels import infer_level

_FOLDER = Path(".demo")
_FILES = 10
_LINES_PER_FILE = 4_000
_DISTINCT_PAIRS = 8_000
# The augmenter's exit code: done, some lines rejected.
_EXIT_WITH_REJECTS = 3

_console = Console(highlight=False, soft_wrap=True)


class DemoFailedError(Exception):
    """The demo did not show what it promises."""


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One run of the augmenter: its summary, and the calls that the model received during it."""

    output: Path
    summary: dict[str, Any]
    calls: list[dict[str, Any]]


def main() -> int:
    """Run the demo; 0 if everything was as promised."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shutil.rmtree(_FOLDER, ignore_errors=True)
    raw = _FOLDER / "raw"
    write_postings(raw, files=_FILES, lines_per_file=_LINES_PER_FILE, distinct_pairs=_DISTINCT_PAIRS, seed=1)
    _print(
        f"{_FILES} minute-files of {_LINES_PER_FILE:,} postings are in [bold]{raw}[/]. "
        "The model is a stand-in:"
    )
    _print(
        "1000 requests a second, one batch a second, answers in scrambled order, and one pair it refuses.\n"
    )
    try:
        with _stub() as stub:
            with _proxy(stub) as proxy:
                _print("[bold]First run[/], with an empty cache:")
                first = _augment(proxy, raw, "first")
                proxy.kill()
            _print("\n[bold]The proxy was killed (-9)[/] and is started again. The same input once more:")
            with _proxy(stub) as proxy:
                second = _augment(proxy, raw, "second")
        _check_output(raw, first)
        _check_second_run(first, second)
    except (DemoFailedError, ServerFailedError) as error:
        _print(f"[bold red]The demo failed:[/] {error}")
        return 1
    _print_report(raw, first, second)
    return 0


@contextmanager
def _stub() -> Iterator[Server]:
    args = ["serve", "--listen", "127.0.0.1:0", "--rate", "1000", "--latency", "50ms"]
    args += ["--fail", "scramble", "--fail", f"poison={POISON}", "--log", str(_FOLDER / "calls.jsonl")]
    with running_server("services.model_stub", args, log=_FOLDER / "model-stub.log") as running:
        yield running


@contextmanager
def _proxy(stub: Server) -> Iterator[Server]:
    args = ["serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s"]
    args += ["--model-target", stub.target, "--cache-url", f"embedded:{_FOLDER / 'cache'}"]
    with running_server("services.cache_proxy", args, log=_FOLDER / "cache-proxy.log") as running:
        yield running


def _augment(proxy: Server, raw: Path, name: str) -> DemoRun:
    before = len(_calls())
    output, totals = _FOLDER / f"augmented-{name}", _FOLDER / f"{name}.json"
    command = [sys.executable, "-m", "services.augmenter", "run", str(raw), str(output)]
    command += ["--target", proxy.target, "--concurrency", str(_FILES), "--summary-json", str(totals)]
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment()).returncode
    if code not in {0, _EXIT_WITH_REJECTS}:
        raise DemoFailedError(f"the augmenter ended with exit code {code}")
    summary = json.loads(totals.read_text())
    run = DemoRun(output=output, summary=summary, calls=_calls()[before:])
    _print(
        f"  {summary['lines']['in']:,} lines in {summary['seconds']:.1f} s, "
        f"{len(run.calls)} {'call' if len(run.calls) == 1 else 'calls'} to the model"
    )
    return run


def _calls() -> list[dict[str, Any]]:
    log = _FOLDER / "calls.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _check_output(raw: Path, run: DemoRun) -> None:
    lines = run.summary["lines"]
    if lines["in"] != lines["augmented"] + lines["rejected"] + lines["blank"]:
        raise DemoFailedError(f"lines were lost: {lines}")
    if sum(len(read_lines(path)) for path in raw.iterdir()) != lines["in"]:
        raise DemoFailedError("not every line was read")
    for path in _outputs(run):
        for company, title, level in parse_pairs(read_lines(path)):
            if level != infer_level(company, title):
                raise DemoFailedError(f"{path}: {company!r}, {title!r} got {level}")


def _check_second_run(first: DemoRun, second: DemoRun) -> None:
    for path in _outputs(first):
        if read_lines(path) != read_lines(second.output / path.name):
            raise DemoFailedError(f"{path.name} came out differently after the crash")
    for call in second.calls:
        if any(POISON.casefold() not in " ".join(title.split()).casefold() for _, title in call["pairs"]):
            raise DemoFailedError("after the crash, pairs were inferred that the cache should have held")


def _outputs(run: DemoRun) -> list[Path]:
    return sorted(path for path in run.output.iterdir() if path.is_file())


def _print_report(raw: Path, first: DemoRun, second: DemoRun) -> None:
    lines = first.summary["lines"]
    distinct = len(
        {(_fold(company), _fold(title)) for call in first.calls for company, title in call["pairs"]}
    )
    inferred = _inferred(first)
    table = Table(box=box.SIMPLE, show_header=True, title="What it cost", title_justify="left")
    for heading in ("", "first run", "after kill -9"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("lines read", f"{lines['in']:,}", f"{second.summary['lines']['in']:,}"),
        ("lines augmented", f"{lines['augmented']:,}", f"{second.summary['lines']['augmented']:,}"),
        (
            "lines rejected, with reasons",
            f"{lines['rejected']:,}",
            f"{second.summary['lines']['rejected']:,}",
        ),
        ("blank lines, dropped", f"{lines['blank']:,}", f"{second.summary['lines']['blank']:,}"),
        ("distinct pairs", f"{distinct:,}", f"{distinct:,}"),
        ("pairs inferred by the model", f"{inferred:,}", f"{_inferred(second):,}"),
        ("calls to the model", f"{len(first.calls):,}", f"{len(second.calls):,}"),
        (
            "  of these, to find the pair that it refuses",
            f"{_search_calls(first)}",
            f"{_search_calls(second)}",
        ),
        ("hit rate: lines that cost no inference", _hit_rate(first), _hit_rate(second)),
        ("time", f"{first.summary['seconds']:.1f} s", f"{second.summary['seconds']:.1f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    _console.print()
    _console.print(table)
    by_line = lines["augmented"] + lines["rejected"]
    _print(
        f"A call a line would have cost [bold]{by_line:,}[/] calls: "
        f"{_format_hours(by_line)} of the model instead of {_format_hours(len(first.calls))}."
    )
    _print("Every level was compared with the model's own for that line; both runs gave the same bytes.\n")
    _print("[bold]Three lines, before and after:[/]")
    source = min(raw.iterdir())
    augmented = read_lines(first.output / source.name)
    for line in augmented[:3]:
        original = next(before for before in read_lines(source) if line.startswith(before[:-1]))
        _console.print(original.decode(), style="dim", markup=False)
        _console.print(line.decode(), markup=False)
    _print(
        f"\nLook around in [bold]{_FOLDER}[/]: raw, augmented-first, augmented-first/_rejects, calls.jsonl."
    )
    _print("Nothing was left running.")


def _inferred(run: DemoRun) -> int:
    return sum(len(call["pairs"]) for call in run.calls if call["code"] == "OK")


def _hit_rate(run: DemoRun) -> str:
    return f"{1 - _inferred(run) / run.summary['lines']['augmented']:.1%}"


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def _search_calls(run: DemoRun) -> int:
    """Return the number of calls that searched for the rejected pair: the failed batch and the probes."""
    refused = next((at for at, call in enumerate(run.calls) if call["code"] != "OK"), len(run.calls))
    suspects = {tuple(pair) for call in run.calls[refused : refused + 1] for pair in call["pairs"]}
    return sum(all(tuple(pair) in suspects for pair in call["pairs"]) for call in run.calls)


def _format_hours(calls: int) -> str:
    hours, seconds = divmod(calls, 3600)
    return f"{hours} h {seconds // 60} min" if hours else f"{seconds} s"


def _print(text: str) -> None:
    _console.print(text)


if __name__ == "__main__":
    sys.exit(main())
