"""The commands of `cache-proxy`."""

import asyncio
from typing import Any

import click

from services.cache_proxy import infer
from services.cache_proxy.config import (
    ENV_PREFIX,
    AnswerSettings,
    CacheSettings,
    KeySettings,
    ModelSettings,
    ServerSettings,
    Settings,
)
from services.common import flags, logs


def _run_serve(**values: Any) -> None:
    settings = Settings(
        server=flags.read(ServerSettings, values),
        model=flags.read(ModelSettings, values),
        cache=flags.read(CacheSettings, values),
        key=flags.read(KeySettings, values),
        answers=flags.read(AnswerSettings, values),
    )
    import uvloop  # noqa: PLC0415 - what only a server needs would cost the other commands half a second

    from services.cache_proxy import app  # noqa: PLC0415

    logs.configure(log_format=settings.server.log_format, level=settings.server.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(app.serve(settings))


def _run_infer(**values: Any) -> None:
    infer.run(flags.read(infer.InferSettings, values))


cli = click.Group("cache-proxy", help="A caching proxy with the seniority model's own gRPC interface.")
cli.add_command(
    flags.SettingsCommand(
        "serve",
        params=[
            option
            for part in (ServerSettings, ModelSettings, CacheSettings, KeySettings, AnswerSettings)
            for option in flags.options(part, prefix=ENV_PREFIX)
        ],
        callback=_run_serve,
        help="Serve the model's interface from the cache; ask the model for what is missing.",
    )
)
cli.add_command(
    flags.SettingsCommand(
        "infer",
        params=flags.options(infer.InferSettings, prefix=ENV_PREFIX),
        callback=_run_infer,
        help="Ask a running proxy: one pair by --company and --title, or JSON lines on standard input.",
    )
)


def main() -> None:
    """Run the command line."""
    flags.run(cli, program="cache-proxy")
