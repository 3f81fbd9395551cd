"""Define the flags of a command as the fields of a frozen dataclass.

A field that is defined by `flag()` is at once a setting, a flag with its help, and an environment variable
(`--model-target` of `cache-proxy` is `CACHE_PROXY_MODEL_TARGET`).
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import click

from services.common.errors import CommandError, UsageError
from services.common.printable import escape_unprintable
from services.common.redaction import has_password
from services.common.units import parse_duration_seconds, parse_size_bytes

_METADATA_KEY = "flag"
_MODE = re.compile(r"(?:0o)?0?[0-7]{3}")
# The minimum is one in eleven days: near zero, a wait would not be a finite number.
_MIN_RATE = 1e-6
_MAX_RATE = 1e9
_Settings = TypeVar("_Settings")


class _ParsedType(click.ParamType[Any]):
    """A flag type by a parser that raises ValueError with a sentence about the value."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _parse_bool(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        message = f"{text!r} is neither true nor false"
        raise ValueError(message)
    return text.lower() == "true"


def _parse_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    # Also false for nan.
    if not _MIN_RATE <= rate <= _MAX_RATE:
        message = f"{text!r} is not a number from {_MIN_RATE:f} to {_MAX_RATE:.0f}"
        raise ValueError(message)
    return rate


def _parse_rate_or_zero(text: str) -> float:
    try:
        is_zero = float(text) == 0
    except ValueError:
        is_zero = False
    return 0.0 if is_zero else _parse_rate(text)


def _parse_http_url(text: str) -> str:
    try:
        url = urlsplit(text)
        is_one = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        # An invalid port, or an invalid address in brackets.
        is_one = False
    if not is_one:
        shown = f"***@{text.rpartition('@')[2]}" if "@" in text else text
        message = f"{shown!r} is not a URL such as https://HOST:PORT"
        raise ValueError(message)
    return text


def _parse_mode(text: str) -> int:
    """`0660`, `660` or `0o660`."""
    if not _MODE.fullmatch(text):
        message = f"{text!r} is not an octal mode such as 0660"
        raise ValueError(message)
    return int(text.removeprefix("0o"), 8)


TEXT = click.STRING
COUNT = click.IntRange(min=1)
COUNT_OR_ZERO = click.IntRange(min=0)
RATE = _ParsedType("number", _parse_rate)
RATE_OR_ZERO = _ParsedType("number", _parse_rate_or_zero)
DURATION = _ParsedType("duration", parse_duration_seconds)
SIZE = _ParsedType("size", parse_size_bytes)
BOOL = _ParsedType("true|false", _parse_bool)
HTTP_URL = _ParsedType("url", _parse_http_url)
LIST = _ParsedType("list", _parse_list)
MODE = _ParsedType("mode", _parse_mode)


def custom_type(name: str, parse: Callable[[str], Any]) -> click.ParamType[Any]:
    """Return a flag type by a parser that raises ValueError with a sentence about the value."""
    return _ParsedType(name, parse)


def choice(*values: str) -> click.ParamType[Any]:
    """Return a flag type that accepts one of the values."""
    return click.Choice(values)


def flag(
    name: str,
    value_type: click.ParamType[Any],
    default: str | None = None,
    *,
    required: bool = False,
    text: str,
    password_alternative: str = "",
) -> Any:
    """Return a dataclass field that is also the flag `name`. `default` is written as a user would write it.

    `login_goes_to`, of a flag that is a URL: where a password goes instead. On a command line, which
    everybody on the machine may read, the URL may hold none.
    """
    metadata = {
        _METADATA_KEY: {
            "name": name,
            "kind": value_type,
            "default": default,
            "required": required,
            "text": text,
            "login_goes_to": password_alternative,
        }
    }
    if required:
        return dataclasses.field(metadata=metadata)
    value = None if default is None else value_type.convert(default, None, None)
    return dataclasses.field(default=() if value_type is LIST and value is None else value, metadata=metadata)


def click_options(settings: type, *, prefix: str) -> list[click.Parameter]:
    """Return the click options of a settings class. `prefix` starts the names of their variables."""
    return [
        _option(field.metadata[_METADATA_KEY], field.name, prefix) for field in dataclasses.fields(settings)
    ]


def _option(spec: dict[str, Any], field_name: str, prefix: str) -> click.Option:
    kind, name = spec["kind"], spec["name"]
    common: dict[str, Any] = {
        "envvar": f"{prefix}_{name.removeprefix('--').replace('-', '_').upper()}",
        "help": spec["text"],
        "show_envvar": True,
        "metavar": kind.name.upper() if isinstance(kind, _ParsedType) else None,
    }
    # The flag can be repeated, and each value may be a comma-separated list.
    if kind is LIST:
        shown = spec["default"]
        return click.Option(
            [name, field_name],
            type=_ListItem(),
            multiple=True,
            show_default=shown or False,
            callback=_flatten(_parse_list(shown or "")),
            **common,
        )
    # click treats None as a default as well, and would not report a missing flag.
    if spec["default"] is not None:
        common["default"] = spec["default"]
    if spec["login_goes_to"]:
        common["callback"] = _reject_password(name, common["envvar"], spec["login_goes_to"])
    return click.Option(
        [name, field_name],
        type=kind,
        required=spec["required"],
        show_default=spec["default"] is not None,
        **common,
    )


def _reject_password(name: str, variable: str, instead: str) -> Callable[..., Any]:
    def refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        on_command_line = ctx.get_parameter_source(str(param.name)) is click.core.ParameterSource.COMMANDLINE
        if value is not None and on_command_line and has_password(value):
            message = (
                f"{name}: everybody on this machine can read a password here; use {instead}, or {variable} "
                "with user and password percent-encoded (%40 for @, %2F for /)"
            )
            raise UsageError(message)
        return value

    return refuse


class _ListItem(click.ParamType[Any]):
    name = "list"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


def _flatten(default: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, Any], tuple[str, ...]]:
    def flatten(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
        return tuple(item for value in values for item in _parse_list(value)) or default

    return flatten


class SettingsCommand(click.Command):
    """A command whose booleans can be written as `--x`, `--x true` or `--x=false`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Add `true` behind a boolean flag without value, so that it does not consume the next argument."""
        booleans = {name for option in self.params if option.type is BOOL for name in option.opts}
        spelled: list[str] = []
        for place, token in enumerate(args):
            spelled.append(token)
            following = args[place + 1].lower() if place + 1 < len(args) else ""
            if token in booleans and "--" not in args[:place] and following not in {"true", "false"}:
                spelled.append("true")
        return super().parse_args(ctx, spelled)


def read_settings(settings: type[_Settings], values: dict[str, Any]) -> _Settings:
    """Return the settings in the parsed values of a command. Other values are ignored."""
    names = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    return settings(**{name: value for name, value in values.items() if name in names})


def run_command(command: click.Command, *, program: str, args: Sequence[str] | None = None) -> NoReturn:
    """Run `command` and exit. Every expected error is one line on standard error."""
    try:
        code = command.main(args=args, prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.ctx.get_help() + "\n")
        sys.exit(2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        _exit_with_error(f"{path}: {error.format_message()}", 2)
    except click.ClickException as error:
        _exit_with_error(f"{program}: {error.format_message()}", error.exit_code)
    except CommandError as error:
        _exit_with_error(f"{program}: {error}", error.exit_code)
    except OSError as error:
        # Standard output may be on a full disk.
        _exit_with_error(f"{program}: {error.strerror or error}", 1)
    except (click.Abort, KeyboardInterrupt):
        _exit_with_error(f"{program}: interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_with_error(line: str, code: int) -> NoReturn:
    sys.stderr.write(escape_unprintable(" ".join(line.split())) + "\n")
    sys.exit(code)
