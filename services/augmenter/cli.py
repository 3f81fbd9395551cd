"""`augmenter run`: its arguments and flags."""

import asyncio
from typing import Any

import click
import uvloop

from services.augmenter import app, locations
from services.augmenter.config import DEFAULT_INPUT, DEFAULT_OUTPUT, RunSettings
from services.common import flags, logs, tracing
from services.common.errors import UsageError


def _run(**values: Any) -> int:
    context = click.get_current_context()
    typed = {
        name
        for name in ("input", "output")
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if typed == {"input"}:  # else local postings would go to the default bucket by a slip
        raise UsageError("run takes INPUT and OUTPUT, or neither")
    settings = flags.read(RunSettings, values)
    logs.configure(log_format=settings.log_format, level=settings.log_level)
    plan = locations.plan(values["input"], values["output"], settings.rejects)
    if settings.sqs_queue_url and (plan.input_name or not isinstance(plan.source, locations.S3Place)):
        raise UsageError("--sqs-queue-url tells of objects: INPUT must be s3://BUCKET/PREFIX/")
    if settings.watch and plan.input_name:
        raise UsageError("--watch waits for new files: INPUT must be a folder or a prefix")
    with (
        tracing.opened("augmenter") as traces,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(app.run(settings, plan, traces))


cli = click.Group("augmenter", help="Adds the model's seniority level to job postings, through the proxy.")
cli.add_command(
    flags.SettingsCommand(
        "run",
        params=[
            click.Argument(["input"], envvar="AUGMENTER_INPUT", default=DEFAULT_INPUT),
            click.Argument(["output"], envvar="AUGMENTER_OUTPUT", default=DEFAULT_OUTPUT),
            *flags.options(RunSettings, prefix="AUGMENTER"),
        ],
        callback=_run,
        help=f"Augment INPUT into OUTPUT: s3://BUCKET/PREFIX/, a local folder, or a file "
        f"(.jsonl, .jsonl.gz, .jsonl.zst). Without them: {DEFAULT_INPUT} into {DEFAULT_OUTPUT}. "
        "AUGMENTER_INPUT and AUGMENTER_OUTPUT say the same.",
    )
)


def main() -> None:
    """Run the command line."""
    flags.run(cli, program=app.PROGRAM)
