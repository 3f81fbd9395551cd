"""Settings of `augmenter run`: flags, their environment variables, and which of them exclude each other."""

import string
from dataclasses import dataclass

from services.augmenter.pipeline.file_reader import ReadLimits
from services.augmenter.pipeline.line_blocks import PostingFormat
from services.augmenter.sources.listing import parse_shard
from services.common import bearer, limits, options
from services.common.errors import UsageError
from services.common.grpc_target import check_target
from services.common.listening import check_address
from services.common.options import flag
from services.common.posting_fields import PostingFields
from services.common.tls import PemFiles

DEFAULT_INPUT = "s3://rl-data/job-postings-raw/"
DEFAULT_OUTPUT = "s3://rl-data/job-postings-mod/"
SHARD_TYPE = options.custom_type("i/n", parse_shard)
_HEADER_CHARACTERS = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Settings of one run.

    Times are in seconds. `progress` is None when the terminal decides whether a progress bar is shown.
    """

    target: str | None = flag(
        "--target",
        options.TEXT,
        text="gRPC target of the proxy, or of the model itself: HOST:PORT, dns:///HOST:PORT, unix:PATH; "
        "required",
    )
    once: bool | None = flag(
        "--once", options.BOOL, text="do all files that are there now, then end; this is the default"
    )
    watch: bool = flag("--watch", options.BOOL, "false", text="go on for new files until SIGTERM")
    poll_interval_seconds: float = flag(
        "--poll-interval", options.DURATION, "10s", text="between two listings of INPUT, with --watch"
    )
    lookback_seconds: float = flag(
        "--lookback",
        options.DURATION,
        "24h",
        text="names that are of so long before the newest are not looked for again, with --watch",
    )
    sqs_queue_url: str | None = flag(
        "--sqs-queue-url", options.TEXT, text="take the files from S3 event notifications, instead of listing"
    )
    missing_input: str = flag(
        "--missing-input",
        options.choice("fail", "skip"),
        "fail",
        text="an object that is gone before its message, or its turn, is read: a failed file, or skipped",
    )
    shard: tuple[int, int] = flag(
        "--shard", SHARD_TYPE, "0/1", text="I/N: this process's part of the files, from 0/N on"
    )
    rejects: str | None = flag(
        "--rejects",
        options.TEXT,
        text="where lines that cannot be augmented go [default: OUTPUT + _rejects/]",
    )
    ok_rejects: bool = flag(
        "--ok-rejects", options.BOOL, "false", text="exit 0, not 3, when only lines were rejected"
    )
    company_field: str = flag(
        "--company-field", options.TEXT, "company", text="member that holds the company; may be a dotted path"
    )
    title_field: str = flag(
        "--title-field", options.TEXT, "title", text="member that holds the title; may be a dotted path"
    )
    level_field: str = flag(
        "--level-field", options.TEXT, "seniority", text="member of the posting that is given the level"
    )
    keep_existing: bool = flag(
        "--keep-existing",
        options.BOOL,
        "false",
        text="leave lines as they are that have the level's member already [default: it is replaced]",
    )
    max_line_bytes: int = flag(
        "--max-line-bytes",
        options.SIZE,
        "4MiB",
        text="a longer line is rejected; a file in work may hold five lines of this size",
    )
    max_zstd_window_bytes: int = flag(
        "--max-zstd-window",
        options.SIZE,
        "8MiB",
        text="a file compressed with a larger window fails; a file in work may hold one window of this size",
    )
    ok_empty: bool = flag(
        "--ok-empty", options.BOOL, "false", text="exit 0, not 1, when INPUT holds no file to augment"
    )
    concurrency: int = flag("--concurrency", options.COUNT, "4", text="files at a time")
    batch_size: int = flag("--batch-size", options.COUNT, "1000", text="pairs in one RPC, at most")
    deadline_seconds: float = flag("--deadline", options.DURATION, "120s", text="how long one RPC may take")
    retry_budget_seconds: float = flag(
        "--retry-budget", options.DURATION, "10m", text="how long a file's RPCs are retried in all"
    )
    caller: str = flag(
        "--caller", options.TEXT, "augmenter", text="name of this client in the proxy's metrics"
    )
    priority: str = flag(
        "--priority", options.choice("interactive", "bulk"), "bulk", text="place in the queue"
    )
    tls_ca: str | None = flag(
        "--tls-ca", options.TEXT, text="CA that signed the proxy's certificate; the way there is encrypted"
    )
    tls_cert: str | None = flag("--tls-cert", options.TEXT, text="certificate of one's own, for mutual TLS")
    tls_key: str | None = flag("--tls-key", options.TEXT, text="its key")
    token_file: str | None = flag(
        "--token-file", options.TEXT, text="file with the bearer token to send; it may change at any time"
    )
    overwrite: bool = flag(
        "--overwrite",
        options.BOOL,
        "false",
        text="redo files whose output is already there for this same input",
    )
    endpoint_url: str | None = flag(
        "--endpoint-url",
        options.HTTP_URL,
        text="S3-compatible endpoint",
        password_alternative="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",  # noqa: S106 - names, not a password
    )
    sse_c_key_file: str | None = flag(
        "--sse-c-key-file",
        options.TEXT,
        text="file with the SSE-C key (32 bytes, or their base64) that INPUT's objects are encrypted with",
    )
    output_sse_c_key_file: str | None = flag(
        "--output-sse-c-key-file",
        options.TEXT,
        text="file with the SSE-C key that objects of OUTPUT and --rejects are to be encrypted with",
    )
    dry_run: bool = flag(
        "--dry-run",
        options.BOOL,
        "false",
        text="count lines and pairs, and what they could cost; write nothing",
    )
    http_listen: str | None = flag(
        "--http-listen", options.TEXT, text="host:port for /metrics and /healthz [default: off]"
    )
    log_format: str = flag("--log-format", options.choice("text", "json"), "text", text="of standard error")
    log_level: str = flag(
        "--log-level", options.choice("debug", "info", "warning", "error"), "info", text="least level logged"
    )
    progress: bool | None = flag("--progress", options.BOOL, text="progress bar [default: on a terminal]")
    summary_json: str | None = flag(
        "--summary-json", options.TEXT, text="file to which the totals are written"
    )

    def __post_init__(self) -> None:
        """Reject invalid values and combinations. Raises UsageError that names the flag."""
        if self.once is not None and self.once is self.watch:
            raise UsageError("--once and --watch: one of the two")
        if self.watch and self.poll_interval_seconds == 0:
            raise UsageError("--poll-interval 0: a listing needs time")
        if self.dry_run and (self.watch or self.sqs_queue_url):
            raise UsageError("--dry-run counts what is there now: not with --watch or --sqs-queue-url")
        if self.sqs_queue_url and self.shard[1] > 1:
            raise UsageError("--shard does not go with --sqs-queue-url: the queue shares its messages out")
        if self.http_listen:
            check_address(self.http_listen, flag_name="--http-listen")
        if self.deadline_seconds == 0:
            raise UsageError("--deadline 0: an RPC needs time")
        if not self.caller or not _HEADER_CHARACTERS.issuperset(self.caller):
            message = f"--caller {self.caller!r}: only printable ASCII can be sent"
            raise UsageError(message)
        _ = self.posting_fields
        limits.check_limits(self.max_line_bytes, self.max_zstd_window_bytes)
        if self.dry_run and self.summary_json:
            raise UsageError("--summary-json does not go with --dry-run, which writes nothing")
        self.tls_files.validate()
        self._check_target()

    def _check_target(self) -> None:
        if self.target:
            check_target(self.target, flag_name="--target", tls_flag="--tls-ca")
            bearer.require_encrypted(self.target, token_file=self.token_file, tls_ca=self.tls_ca)
        elif not self.dry_run:
            raise UsageError("--target is required (the proxy's HOST:PORT)")

    @property
    def posting_fields(self) -> PostingFields:
        """Return which members of a posting hold company, title and level. Raises UsageError."""
        return PostingFields.parse(company=self.company_field, title=self.title_field, level=self.level_field)

    @property
    def posting_format(self) -> PostingFormat:
        """Return how lines are parsed and written."""
        return PostingFormat(self.posting_fields, keep_existing=self.keep_existing)

    @property
    def read_limits(self) -> ReadLimits:
        """Return the limits on line and zstd window size, which bound the memory of one file."""
        return ReadLimits(self.max_line_bytes, self.max_zstd_window_bytes)

    @property
    def tls_files(self) -> PemFiles:
        """Return the certificate files for the connection to the proxy."""
        return PemFiles(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)
