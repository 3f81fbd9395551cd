"""`cache-proxy infer`: request levels from a running proxy on the command line."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from protos import seniority_pb2, seniority_pb2_grpc
from services.common import bearer, options
from services.common.errors import CommandError, UsageError
from services.common.grpc_target import check_target, http_proxy_options
from services.common.options import flag
from services.common.posting_fields import PostingFields
from services.common.reloading_channel import DNS_REFRESH_OPTIONS
from services.common.tls import PemFiles

_BATCH_PAIRS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class InferSettings:
    """Settings of `infer`."""

    target: str = flag(
        "--target",
        options.TEXT,
        required=True,
        text="gRPC target of the proxy (or of the model): HOST:PORT, dns:///HOST:PORT, unix:PATH",
    )
    company: str | None = flag("--company", options.TEXT, text="the pair's company")
    title: str | None = flag("--title", options.TEXT, text="the pair's title")
    company_field: str = flag(
        "--company-field", options.TEXT, "company", text="member that holds the company; may be a dotted path"
    )
    title_field: str = flag(
        "--title-field", options.TEXT, "title", text="member that holds the title; may be a dotted path"
    )
    tls_ca: str | None = flag(
        "--tls-ca", options.TEXT, text="CA that signed the proxy's certificate; the way there is encrypted"
    )
    # The flag is not called --tls-cert, since in the environment of a proxy that variable names the proxy's
    # certificate.
    client_cert: str | None = flag(
        "--client-cert", options.TEXT, text="certificate of one's own, for mutual TLS"
    )
    client_key: str | None = flag("--client-key", options.TEXT, text="its key")
    token_file: str | None = flag("--token-file", options.TEXT, text="file with the bearer token to send")
    deadline_seconds: float = flag("--deadline", options.DURATION, "30s", text="how long the answer may take")

    def __post_init__(self) -> None:
        """Reject a company without a title, and invalid targets and certificate files."""
        if (self.company is None) is not (self.title is None):
            message = "give both --company and --title, or neither and JSON lines on standard input"
            raise UsageError(message)
        if not _is_valid_utf8(self.company or "") or not _is_valid_utf8(self.title or ""):
            message = "--company and --title must be valid UTF-8"
            raise UsageError(message)
        _ = self.field_names
        self.tls_files.validate()
        check_target(self.target, flag_name="--target", tls_flag="--tls-ca")
        bearer.require_encrypted(self.target, token_file=self.token_file, tls_ca=self.tls_ca)

    @property
    def field_names(self) -> PostingFields:
        """Return the field names of a line on standard input. Raises `UsageError` if they are invalid."""
        return PostingFields.parse(company=self.company_field, title=self.title_field)

    @property
    def tls_files(self) -> PemFiles:
        """Return the certificate files of the connection to the proxy."""
        return PemFiles(
            ca=self.tls_ca,
            cert=self.client_cert,
            key=self.client_key,
            flags=("--tls-ca", "--client-cert", "--client-key"),
        )


def run(settings: InferSettings) -> None:
    """Print the level of each pair, followed by the pair if it is from standard input."""
    # A terminal that cannot show a character shows its code point.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    token = None if settings.token_file is None else bearer.Token(settings.token_file)
    with _open_channel(settings) as channel:
        stub = seniority_pb2_grpc.SeniorityModelStub(channel)
        if settings.company is not None and settings.title is not None:
            [level] = _infer_levels(stub, [(settings.company, settings.title)], settings, token)
            sys.stdout.write(f"{level}\n")
            return
        for pairs in _read_batches(sys.stdin.buffer, settings.field_names):
            for level, (company, title) in zip(
                _infer_levels(stub, pairs, settings, token), pairs, strict=True
            ):
                sys.stdout.write(f"{level}\t{company}\t{title}\n")


def _open_channel(settings: InferSettings) -> grpc.Channel:
    options = (*DNS_REFRESH_OPTIONS, *http_proxy_options(settings.target))
    if settings.tls_ca is None:
        return grpc.insecure_channel(settings.target, options=options)
    credentials = settings.tls_files.watch().value.channel_credentials()
    return grpc.secure_channel(settings.target, credentials, options=options)


def _infer_levels(
    stub: seniority_pb2_grpc.SeniorityModelStub,
    pairs: Sequence[tuple[str, str]],
    settings: InferSettings,
    token: bearer.Token | None,
) -> list[int]:
    request = seniority_pb2.SeniorityRequestBatch(
        batch=[
            seniority_pb2.SeniorityRequest(uuid=uuid, company=company, title=title)
            for uuid, (company, title) in enumerate(pairs)
        ]
    )
    metadata = () if token is None else (token.metadata(),)
    try:
        response = stub.InferSeniority(request, timeout=settings.deadline_seconds, metadata=metadata)
    except grpc.RpcError as error:
        message = f"{settings.target}: {error.code().name}: {error.details()}"
        raise CommandError(message) from error
    levels = {answer.uuid: answer.seniority for answer in response.batch}
    if levels.keys() != set(range(len(pairs))):
        message = f"{settings.target}: answered {len(levels)} of {len(pairs)} pairs"
        raise CommandError(message)
    return [levels[uuid] for uuid in range(len(pairs))]


def _read_batches(lines: Iterable[bytes], field_names: PostingFields) -> Iterable[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        batch.append(_parse_line(line, number, field_names))
        if len(batch) == _BATCH_PAIRS:
            yield batch
            batch = []
    if batch:
        yield batch


def _parse_line(line: bytes, number: int, field_names: PostingFields) -> tuple[str, str]:
    try:
        posting = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = f"line {number}: not JSON"
        raise CommandError(message) from error
    if not isinstance(posting, dict):
        message = f"line {number}: not a JSON object"
        raise CommandError(message)
    try:
        company, title = field_names.read_pair(posting)
    except ValueError as error:
        message = f"line {number}: {error}"
        raise CommandError(message) from error
    if not _is_valid_utf8(company) or not _is_valid_utf8(title):
        message = f"line {number}: company and title must be text; a lone surrogate is none"
        raise CommandError(message)
    return company, title


def _is_valid_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
