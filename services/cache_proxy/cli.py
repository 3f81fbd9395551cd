"""The command line of `cache-proxy`."""

import asyncio
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from services.cache_proxy.commands import infer
from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import (
    OutputSettings,
    PairSettings,
    ScopeSettings,
    WarmSettings,
)
from services.cache_proxy.config.model_settings import ModelSettings
from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.config.settings import ENV_PREFIX, Settings
from services.common import logs, options
from services.common.tracing_setup import tracing_context

_SERVE_SETTINGS = (
    ServerSettings,
    CallerAuthSettings,
    ModelSettings,
    ModelAuthSettings,
    CacheSettings,
    KeySettings,
    AnswerSettings,
)


def _run_serve(**values: Any) -> None:
    settings = Settings(
        server=options.read_settings(ServerSettings, values),
        model=options.read_settings(ModelSettings, values),
        cache=options.read_settings(CacheSettings, values),
        key=options.read_settings(KeySettings, values),
        answers=options.read_settings(AnswerSettings, values),
        caller_auth=options.read_settings(CallerAuthSettings, values),
        model_auth=options.read_settings(ModelAuthSettings, values),
    )
    # Imported here, since only the server needs them: they would cost the other commands half a second.
    import uvloop  # noqa: PLC0415

    from services.cache_proxy import app  # noqa: PLC0415

    logs.configure(log_format=settings.server.log_format, level=settings.server.log_level)
    with (
        tracing_context("cache-proxy") as tracer,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(app.serve(settings, tracer))


def _run_cache_command(module: str, settings: Sequence[type], **values: Any) -> int:
    """Run a command on the cache. It gets its settings objects in the given order."""
    arguments: list[Any] = [options.read_settings(part, values) for part in settings]
    if "files" in values:
        arguments.insert(0, values["files"])
    # The command prints its results itself, so only errors are logged.
    logs.configure(log_format="text", level="error")
    command = importlib.import_module(f"services.cache_proxy.commands.{module}")
    exit_code: int | None = asyncio.run(command.run(*arguments))
    return exit_code or 0


def _add_cache_command(name: str, *settings: type, takes_files: bool = False, help_text: str) -> None:
    arguments: list[click.Parameter] = (
        [click.Argument(["files"], nargs=-1, required=True)] if takes_files else []
    )
    cli.add_command(
        options.SettingsCommand(
            name,
            params=[
                *arguments,
                *(option for part in settings for option in options.click_options(part, prefix=ENV_PREFIX)),
            ],
            callback=partial(_run_cache_command, name, settings),
            help=help_text,
        )
    )


def _run_infer(**values: Any) -> None:
    infer.run(options.read_settings(infer.InferSettings, values))


cli = click.Group("cache-proxy", help="A caching proxy with the seniority model's own gRPC interface.")
cli.add_command(
    options.SettingsCommand(
        "serve",
        params=[
            option for part in _SERVE_SETTINGS for option in options.click_options(part, prefix=ENV_PREFIX)
        ],
        callback=_run_serve,
        help="Serve the model's interface from the cache; ask the model for what is missing.",
    )
)
cli.add_command(
    options.SettingsCommand(
        "infer",
        params=options.click_options(infer.InferSettings, prefix=ENV_PREFIX),
        callback=_run_infer,
        help="Ask a running proxy: one pair by --company and --title, or JSON lines on standard input.",
    )
)
_add_cache_command(
    "get",
    PairSettings,
    OutputSettings,
    CacheSettings,
    KeySettings,
    help_text="What the cache holds for the pair of --company and --title. Exit code 1: nothing.",
)
_add_cache_command(
    "stats",
    OutputSettings,
    CacheSettings,
    KeySettings,
    help_text="How much the cache holds, what that costs, and whether its buckets are compact.",
)
_add_cache_command(
    "invalidate",
    PairSettings,
    ScopeSettings,
    OutputSettings,
    CacheSettings,
    KeySettings,
    AnswerSettings,
    help_text="Have every replica forget the pair of --company and --title, or --all of a model version.",
)
_add_cache_command(
    "warm",
    WarmSettings,
    OutputSettings,
    CacheSettings,
    KeySettings,
    takes_files=True,
    help_text="Put postings that have a seniority already (files of .jsonl, .ndjson, .jl or .json, "
    "also with .gz or .zst; folders of them, or s3://BUCKET/KEY) into the cache, "
    "without a call to the model. Exit code 3: some lines were skipped.",
)


def main() -> None:
    """Run the command line."""
    options.run_command(cli, program="cache-proxy")
