"""Settings classes as commands: kinds, twins, booleans, errors of one line."""

from collections.abc import Callable
from dataclasses import dataclass

import click
import pytest

from services.common import options
from services.common.errors import CommandError, UsageError
from services.common.options import flag

Run = Callable[..., tuple[object, int, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A settings class with a flag of each kind that is special."""

    words: tuple[str, ...] = flag("--words", options.LIST, "a,b", text="words")
    watch: bool = flag("--watch", options.BOOL, "false", text="go on")
    rate: float = flag("--rate", options.RATE, "5", text="rate")
    name: str | None = flag("--name", options.TEXT, text="name")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with `Thing`'s flags and an argument; the settings it read, its exit code, its errors."""

    def run(*args: str, body: Callable[[Thing], None] | None = None) -> tuple[object, int, str]:
        read: list[object] = []

        def callback(place: str | None, **values: object) -> None:
            thing = options.read_settings(Thing, values)
            read.append((thing, place))
            if body:
                body(thing)

        command = options.SettingsCommand(
            "thing",
            params=[*options.click_options(Thing, prefix="THING"), click.Argument(["place"], required=False)],
            callback=callback,
        )
        with pytest.raises(SystemExit) as end:
            options.run_command(command, program="thing", args=args)
        return (read[0] if read else None, int(end.value.code or 0), capsys.readouterr().err)

    return run


@pytest.mark.parametrize(
    ("args", "watch", "place"),
    [
        ([], False, None),
        (["--watch"], True, None),
        (["--watch", "true"], True, None),
        (["--watch=false", "here"], False, "here"),
        (["--watch", "here"], True, "here"),
        (["--watch", "FALSE", "here"], False, "here"),
        (["--", "--watch"], False, "--watch"),
        (["--watch", "--rate", "3"], True, None),
    ],
)
def test_boolean_flag_is_accepted_with_and_without_value(
    run: Run, args: list[str], watch: bool, place: str | None
) -> None:
    """A flag without value is true, and does not consume the next argument."""
    read, code, _ = run(*args)
    assert code == 0
    assert isinstance(read, tuple)
    assert (read[0].watch, read[1]) == (watch, place)


@pytest.mark.parametrize("text", ["yes", "1", "", "truefalse"])
def test_boolean_flag_with_other_value_is_rejected(run: Run, text: str) -> None:
    """Nothing else is guessed at."""
    _, code, error = run(f"--watch={text}")
    assert code == 2
    assert "--watch" in error


def test_every_flag_has_variable_and_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag wins, then the variable, then what the class says."""
    read, _, _ = run()
    assert isinstance(read, tuple)
    assert read[0] == Thing()
    monkeypatch.setenv("THING_WORDS", "x,y")
    monkeypatch.setenv("THING_WATCH", "true")
    monkeypatch.setenv("THING_RATE", "2")
    read, _, _ = run("--rate", "3")
    assert isinstance(read, tuple)
    assert (read[0].words, read[0].watch, read[0].rate) == (("x", "y"), True, 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [(CommandError("it\nbroke"), 1), (UsageError("meant\nwrong"), 2), (KeyboardInterrupt(), 130)],
)
def test_expected_error_is_one_line_with_its_exit_code(run: Run, error: BaseException, code: int) -> None:
    """Whatever line breaks its message has."""

    def fail(_thing: Thing) -> None:
        raise error

    _, ended, text = run(body=fail)
    assert ended == code
    assert text.strip().count("\n") == 0
    assert text.strip().startswith("thing: ")


@pytest.mark.parametrize("text", ["0660", "660", "0o660"])
def test_octal_mode_is_parsed(text: str) -> None:
    """However that is written."""
    assert options.MODE.convert(text, None, None) == 0o660


@pytest.mark.parametrize("text", ["888", "rw", "1777", "0x1b0", "-660", "6", "", "06600"])
def test_invalid_octal_mode_is_rejected(text: str) -> None:
    """Nor what has more than owner, group and others."""
    with pytest.raises(click.BadParameter, match="is not an octal mode such as 0660"):
        options.MODE.convert(text, None, None)
