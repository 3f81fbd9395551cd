"""Settings of the model: its address, batches, rate limits and timeouts."""

from dataclasses import dataclass

from services.common import options
from services.common.errors import UsageError
from services.common.grpc_target import check_target
from services.common.options import flag

_MAX_BATCH_PAIRS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """How the model is called, and how much of it may be used."""

    model_target: str = flag(
        "--model-target",
        options.TEXT,
        required=True,
        text="gRPC target of the model: HOST:PORT, dns:///HOST:PORT, unix:PATH",
    )
    model_batch_size: int = flag(
        "--model-batch-size", options.COUNT, "1000", text="pairs in one call to the model, at most"
    )
    model_batch_bytes: int = flag(
        "--model-batch-bytes", options.SIZE, "3MiB", text="bytes in one call to the model, at most"
    )
    model_rate: float = flag(
        "--model-rate", options.RATE, "1000", text="requests a second to the model, all replicas together"
    )
    model_calls_per_second: float = flag(
        "--model-calls-per-second",
        options.RATE_OR_ZERO,
        "1",
        text="calls a second to the model, all replicas together; 0: no such limit",
    )
    expected_replicas: int = flag(
        "--expected-replicas",
        options.COUNT,
        "1",
        text="the share of the rate of a replica that never saw Redis",
    )
    linger_seconds: float = flag(
        "--linger",
        options.DURATION,
        "20ms",
        text="how long a miss may wait for company when a call slot is free",
    )
    model_deadline_seconds: float = flag(
        "--model-deadline", options.DURATION, "30s", text="how long one call to the model may take"
    )
    model_retry_window_seconds: float = flag(
        "--model-retry-window",
        options.DURATION,
        "15s",
        text="how long pairs are retried while the model answers nothing",
    )

    def __post_init__(self) -> None:
        """Reject settings with which no call to the model could succeed."""
        if self.model_batch_size > _MAX_BATCH_PAIRS:
            message = (
                f"--model-batch-size {self.model_batch_size}: the model takes at most {_MAX_BATCH_PAIRS}"
            )
            raise UsageError(message)
        if not self.model_target.strip():
            message = "--model-target must not be empty"
            raise UsageError(message)
        check_target(self.model_target, flag_name="--model-target", tls_flag="--model-tls-ca")
        if self.model_deadline_seconds <= 0:
            message = "--model-deadline must be above 0"
            raise UsageError(message)
