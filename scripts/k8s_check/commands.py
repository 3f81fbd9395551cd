"""Parse arguments and environment variables with the parsers of the project's commands."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import click

from services.augmenter import cli as augmenter
from services.augmenter.config import RunSettings
from services.cache_proxy import cli as cache_proxy
from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.config.model_settings import ModelSettings
from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.config.settings import Settings
from services.common import options
from services.common.errors import UsageError
from services.model_stub import cli as model_stub
from services.model_stub.cli import StubSettings

PROGRAMS = {"cache-proxy": cache_proxy.cli, "augmenter": augmenter.cli, "model-stub": model_stub.cli}


class SettingsRejectedError(Exception):
    """The command would end with exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The settings of a command by their Python names, and which of them are defaults."""

    values: Mapping[str, Any]
    defaults: frozenset[str]


def variables(program: str) -> frozenset[str]:
    """Return the environment variables that the commands of a program read."""
    commands = PROGRAMS[program].commands.values()
    return frozenset(str(option.envvar) for command in commands for option in command.params if option.envvar)


def parse(program: str, args: Sequence[str], environment: Mapping[str, str]) -> Parsed:
    """Parse a command line. Raises SettingsRejectedError with the message of the command."""
    command = PROGRAMS[program].commands.get(args[0]) if args else None
    if command is None:
        raise SettingsRejectedError(f"{program} has no command {' '.join(args[:1])!r}")
    with mock.patch.dict(os.environ, environment, clear=True):
        try:
            context = command.make_context(args[0], list(args[1:]))
            _build(program, context.params)
        except click.ClickException as error:
            raise SettingsRejectedError(error.format_message()) from error
        except UsageError as error:
            raise SettingsRejectedError(str(error)) from error
    default = click.core.ParameterSource.DEFAULT
    defaults = {name for name in context.params if context.get_parameter_source(name) is default}
    return Parsed(values=context.params, defaults=frozenset(defaults))


def _build(program: str, values: dict[str, Any]) -> None:
    """Create the settings, which validates them as a start would."""
    if program == "augmenter":
        options.read_settings(RunSettings, values)
    elif program == "model-stub":
        options.read_settings(StubSettings, values)
    else:
        Settings(
            server=options.read_settings(ServerSettings, values),
            model=options.read_settings(ModelSettings, values),
            cache=options.read_settings(CacheSettings, values),
            key=options.read_settings(KeySettings, values),
            answers=options.read_settings(AnswerSettings, values),
            caller_auth=options.read_settings(CallerAuthSettings, values),
            model_auth=options.read_settings(ModelAuthSettings, values),
        )
