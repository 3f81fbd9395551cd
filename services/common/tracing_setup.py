"""Turn tracing on if the standard OpenTelemetry variables request it.

Otherwise nothing of OpenTelemetry is imported.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from services.common.errors import UsageError
from services.common.tracing import OFF, Tracing

_ENABLING_VARIABLES = (
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)


def requested_by(environment: Mapping[str, str]) -> str | None:
    """Return the name of the variable that turns tracing on, or None.

    Raises UsageError for an exporter that is not supported.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    names = environment.get(_ENABLING_VARIABLES[0], "").split(",")
    exporters = {name.strip().lower() for name in names if name.strip()}
    if unknown := sorted(exporters - {"otlp", "none"}):
        message = f"OTEL_TRACES_EXPORTER {unknown[0]!r}: traces go by otlp, or none"
        raise UsageError(message)
    if "none" in exporters:
        return None
    return next((name for name in _ENABLING_VARIABLES if environment.get(name, "").strip()), None)


@contextmanager
def tracing_context(service: str) -> Iterator[Tracing]:
    """Trace this process while the block runs, then send the remaining spans in bounded time.

    `service` is the service name where OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES give none. Raises
    UsageError.
    """
    variable = requested_by(os.environ)
    if variable is None:
        yield OFF
        return
    try:
        # Without tracing OpenTelemetry need not be installed.
        from services.common import otel_setup  # noqa: PLC0415 - see above

        tracing, close = otel_setup.start_tracing(service)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("services"):
            raise
        message = (
            f"{variable} asks for traces, but {error.name} is not installed; run: pip install '.[tracing]'"
        )
        raise UsageError(message) from error
    try:
        yield tracing
    finally:
        close()
