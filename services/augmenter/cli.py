"""Command line of `augmenter run`: its arguments and flags."""

import asyncio
from typing import Any

import click
import uvloop

from services.augmenter import app, paths
from services.augmenter.config import DEFAULT_INPUT, DEFAULT_OUTPUT, RunSettings
from services.augmenter.sources.queue_url import check_queue_url
from services.common import logs, options
from services.common.codec import SUFFIX_HELP
from services.common.errors import UsageError
from services.common.file_names import REJECTS_FOLDER
from services.common.tracing_setup import tracing_context


def _run(**values: Any) -> int:
    context = click.get_current_context()
    typed = {
        name
        for name in ("input", "output")
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    # With INPUT alone, local postings would go to the default bucket by mistake.
    if typed == {"input"}:
        raise UsageError("run takes INPUT and OUTPUT, or neither")
    settings = options.read_settings(RunSettings, values)
    logs.configure(log_format=settings.log_format, level=settings.log_level)
    run_paths = paths.resolve_paths(values["input"], values["output"], settings.rejects)
    if settings.sqs_queue_url:
        _check_queue_input(settings.sqs_queue_url, run_paths)
    _check_sse_keys(settings, run_paths)
    if settings.watch and run_paths.input_name:
        raise UsageError("--watch waits for new files: INPUT must be a folder or a prefix")
    with (
        tracing_context("augmenter") as traces,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(app.run(settings, run_paths, traces))


def _check_queue_input(queue_url: str, run_paths: paths.RunPaths) -> None:
    """Check that a queue of S3 events can name files of INPUT. Raises UsageError."""
    check_queue_url(queue_url)
    if run_paths.input_name or not isinstance(run_paths.source, paths.S3Uri):
        raise UsageError("--sqs-queue-url is for objects: INPUT must be s3://BUCKET/PREFIX/")
    if run_paths.source.is_access_point:
        raise UsageError(
            "--sqs-queue-url: events name the bucket, not its access point: INPUT must be s3://BUCKET/PREFIX/"
        )


def _check_sse_keys(settings: RunSettings, run_paths: paths.RunPaths) -> None:
    """Reject an SSE-C key for a location that is not in S3. Raises UsageError."""
    if settings.sse_c_key_file and not isinstance(run_paths.source, paths.S3Uri):
        raise UsageError("--sse-c-key-file is for objects: INPUT must be s3://BUCKET/PREFIX/")
    if settings.output_sse_c_key_file and not isinstance(run_paths.sink, paths.S3Uri):
        raise UsageError("--output-sse-c-key-file is for objects: OUTPUT must be s3://BUCKET/PREFIX/")


cli = click.Group("augmenter", help="Adds the model's seniority level to job postings, through the proxy.")
cli.add_command(
    options.SettingsCommand(
        "run",
        params=[
            click.Argument(["input"], envvar="AUGMENTER_INPUT", default=DEFAULT_INPUT),
            click.Argument(["output"], envvar="AUGMENTER_OUTPUT", default=DEFAULT_OUTPUT),
            *options.click_options(RunSettings, prefix="AUGMENTER"),
        ],
        callback=_run,
        help=f"Augment INPUT into OUTPUT: s3://BUCKET/PREFIX/, a local folder, or a file "
        f"(names that end in {SUFFIX_HELP}). Of a folder or prefix all such files are read, at any depth, "
        f"but those whose name, or a folder in it, begins with a dot or is {REJECTS_FOLDER}. "
        f"Without them: {DEFAULT_INPUT} into {DEFAULT_OUTPUT}. "
        "AUGMENTER_INPUT and AUGMENTER_OUTPUT set the same.",
    )
)


def main() -> None:
    """Run the command line."""
    options.run_command(cli, program=app.PROGRAM)
