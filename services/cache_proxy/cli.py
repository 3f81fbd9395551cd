"""The commands of `cache-proxy`."""

import asyncio
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from services.cache_proxy.commands import infer
from services.cache_proxy.config.auth_settings import CallerAccess, ModelAccess
from services.cache_proxy.config.command_settings import (
    OutputSettings,
    PairSettings,
    ScopeSettings,
    WarmSettings,
)
from services.cache_proxy.config.settings import (
    ENV_PREFIX,
    AnswerSettings,
    CacheSettings,
    KeySettings,
    ModelSettings,
    ServerSettings,
    Settings,
)
from services.common import logs, options, tracing

_SERVE = (
    ServerSettings, CallerAccess, ModelSettings, ModelAccess, CacheSettings, KeySettings, AnswerSettings,
)  # fmt: skip


def _run_serve(**values: Any) -> None:
    settings = Settings(
        server=options.read(ServerSettings, values),
        model=options.read(ModelSettings, values),
        cache=options.read(CacheSettings, values),
        key=options.read(KeySettings, values),
        answers=options.read(AnswerSettings, values),
        callers=options.read(CallerAccess, values),
        model_access=options.read(ModelAccess, values),
    )
    import uvloop  # noqa: PLC0415 - what only a server needs would cost the other commands half a second

    from services.cache_proxy import app  # noqa: PLC0415

    logs.configure(log_format=settings.server.log_format, level=settings.server.log_level)
    with (
        tracing.opened("cache-proxy") as traces,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(app.serve(settings, traces))


def _admin(module: str, settings: Sequence[type], **values: Any) -> int:
    """Run a command about the cache with its settings, in their order."""
    given: list[Any] = [options.read(part, values) for part in settings]
    if "files" in values:
        given.insert(0, values["files"])
    logs.configure(log_format="text", level="error")  # what it has to say, it prints
    command = importlib.import_module(f"services.cache_proxy.commands.{module}")
    code: int | None = asyncio.run(command.run(*given))
    return code or 0


def _add_admin(name: str, *settings: type, files: bool = False, text: str) -> None:
    arguments: list[click.Parameter] = [click.Argument(["files"], nargs=-1, required=True)] if files else []
    cli.add_command(
        options.SettingsCommand(
            name,
            params=[
                *arguments,
                *(option for part in settings for option in options.options(part, prefix=ENV_PREFIX)),
            ],
            callback=partial(_admin, name, settings),
            help=text,
        )
    )


def _run_infer(**values: Any) -> None:
    infer.run(options.read(infer.InferSettings, values))


cli = click.Group("cache-proxy", help="A caching proxy with the seniority model's own gRPC interface.")
cli.add_command(
    options.SettingsCommand(
        "serve",
        params=[option for part in _SERVE for option in options.options(part, prefix=ENV_PREFIX)],
        callback=_run_serve,
        help="Serve the model's interface from the cache; ask the model for what is missing.",
    )
)
cli.add_command(
    options.SettingsCommand(
        "infer",
        params=options.options(infer.InferSettings, prefix=ENV_PREFIX),
        callback=_run_infer,
        help="Ask a running proxy: one pair by --company and --title, or JSON lines on standard input.",
    )
)
_add_admin(
    "get", PairSettings, OutputSettings, CacheSettings, KeySettings,
    text="What the cache holds for the pair of --company and --title. Exit code 1: nothing.",
)  # fmt: skip
_add_admin(
    "stats", OutputSettings, CacheSettings, KeySettings,
    text="How much the cache holds, what that costs, and whether its buckets are compact.",
)  # fmt: skip
_add_admin(
    "invalidate", PairSettings, ScopeSettings, OutputSettings, CacheSettings, KeySettings, AnswerSettings,
    text="Have every replica forget the pair of --company and --title, or --all of a model version.",
)  # fmt: skip
_add_admin(
    "warm", WarmSettings, OutputSettings, CacheSettings, KeySettings, files=True,
    text="Put postings that have a seniority already (files of .jsonl, .ndjson, .jl or .json, also with .gz "
    "or .zst; folders of them, or s3://BUCKET/KEY) into the cache, without a call to the model. Exit code 3: "
    "some lines were skipped.",
)  # fmt: skip


def main() -> None:
    """Run the command line."""
    options.run(cli, program="cache-proxy")
