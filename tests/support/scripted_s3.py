"""A scripted S3 server in memory. Requests of any kind fail as the test sets, before or after their effect.

It is longer than 250 lines, since it implements one HTTP handler whose operations share their state.
"""

import base64
import hashlib
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, TypeAlias
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.certificates import SignedCertificate

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "3",
}
OPERATIONS = (
    "ListObjectsV2",
    "HeadObject",
    "GetObject",
    "GetObject (range)",
    "PutObject",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "DeleteObject",
)
ALWAYS = 10**9
# Status, headers, body.
_Response: TypeAlias = tuple[int, dict[str, str], bytes]
_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    409: "ConditionalRequestConflict",
    503: "SlowDown",
    400: "InvalidRequest",
    501: "NotImplemented",
    500: "InternalError",
}


@dataclass
class Fault:
    """A fault of one operation, for requests whose key contains `key`.

    The first `skip` requests succeed, the next `times` fail.

    `kind` is one of:

    - an HTTP status;
    - `reset`: the connection is reset;
    - `stall`: there is no response until the end of the test;
    - `cut`: the connection ends in the middle of the body;
    - `end`: the connection is reset after a complete body without a length;
    - `200`: an error in a response of status 200, as CompleteMultipartUpload may send it.

    `applied`: the request has its effect all the same. `matched` counts the requests that it applies to.
    """

    operation: str
    kind: str
    applied: bool = False
    times: int = ALWAYS
    key: str = ""
    skip: int = 0
    matched: int = 0


@dataclass
class StoredObject:
    """A stored object."""

    data: bytes
    headers: dict[str, str]
    etag: str
    modified: float = field(default_factory=time.time)


@dataclass
class RecordedRequest:
    """A request that the server received."""

    operation: str
    key: str
    headers: dict[str, str]
    query: dict[str, str]


@dataclass
class ScriptedS3:
    """A server with one bucket.

    State: all attributes, guarded by `lock`. Those from `page_size` on select the kind of server.
    `checksum` is the name of a hashlib algorithm; empty for CRC32.
    """

    url: str = ""
    bucket: str = "b"
    faults: list[Fault] = field(default_factory=list)
    requests: list[RecordedRequest] = field(default_factory=list)
    objects: dict[str, StoredObject] = field(default_factory=dict)
    uploads: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)
    page_size: int = 1000
    sort_keys: Callable[[list[str]], list[str]] = sorted
    refuses_start_after: bool = False
    stores_framing: bool = False
    refuses_checksums: bool = False
    wants_declared_checksums: bool = False
    sends_checksums: bool = False
    sends_checksums_with_ranges: bool = False
    wrong_checksums: bool = False
    checksum: str = ""
    ignores_ranges: bool = False

    def put(
        self, key: str, data: bytes, *, age_seconds: float = 0, headers: dict[str, str] | None = None
    ) -> str:
        """Store an object and return its ETag."""
        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        self.objects[key] = StoredObject(data, headers or {}, etag, time.time() - age_seconds)
        return etag

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys of the stored objects."""
        return sorted(key for key in self.objects if key.startswith(prefix))

    def count_requests(self, operation: str, key: str = "") -> int:
        """Return the number of requests of an operation whose key contains `key`."""
        return sum(call.operation == operation and key in call.key for call in self.requests)

    def match_fault(self, operation: str, key: str) -> Fault | None:
        """Count the request and return the fault that applies to it, if any."""
        for fault in self.faults:
            if fault.operation == operation and fault.key in key:
                fault.matched += 1
                if fault.skip < fault.matched <= fault.skip + fault.times:
                    return fault
        return None


@contextmanager
def scripted_s3(tls: SignedCertificate | None = None) -> Iterator[ScriptedS3]:
    """Run a server. With a certificate it uses HTTPS."""
    s3 = ScriptedS3()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"s3": s3}))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    s3.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        s3.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # With the default of 5, every sixth connection waits for a second.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of connections that the client closed."""


class _S3Error(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.code = code or _CODES[status]
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    s3: ClassVar[ScriptedS3]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_any(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = unquote(url.path).lstrip("/")
        host = self.headers["Host"].partition(":")[0]
        self.key = path if host.startswith(f"{self.s3.bucket}.") else path.partition("/")[2]
        self.operation = self._operation()
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.s3.lock:
            self.s3.requests.append(RecordedRequest(self.operation, self.key, headers, self.query))
            fault = self.s3.match_fault(self.operation, self.key or self.query.get("prefix", ""))
            answer: _Response = (200, {}, b"")
            if fault is None or fault.applied or fault.kind in {"cut", "end"}:
                try:
                    answer = self._handle(body)
                except _S3Error as refused:
                    answer = self._error_response(refused)
        if fault is not None:
            self._apply_fault(fault, answer)
        else:
            self._send(*answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815 - the library's names

    def _operation(self) -> str:
        query = self.query
        if not self.key:
            return "ListMultipartUploads" if "uploads" in query else "ListObjectsV2"
        of_upload = "uploads" in query or "uploadId" in query
        names = {
            "HEAD": "HeadObject",
            "GET": "GetObject (range)" if self.headers.get("Range") else "GetObject",
            "PUT": "UploadPart" if of_upload else "PutObject",
            "POST": "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload" if of_upload else "DeleteObject",
        }
        return names[self.command]

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        else:
            raw = b""
            while size := int(self.rfile.readline().strip(), 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if "aws-chunked" not in self.headers.get("Content-Encoding", "") or self.s3.stores_framing:
            return raw
        data, rest = b"", raw
        while True:
            head, _, rest = rest.partition(b"\r\n")
            size = int(head.partition(b";")[0], 16)
            if not size:
                return data
            data, rest = data + rest[:size], rest[size + 2 :]

    def _handle(self, body: bytes) -> _Response:
        if self.s3.refuses_checksums and any(
            name.lower().startswith(("x-amz-trailer", "x-amz-checksum-crc", "x-amz-sdk-checksum"))
            for name in self.headers
        ):
            raise _S3Error(501, message="A header you provided implies functionality that is not implemented")
        return {
            "ListObjectsV2": self._list_objects,
            "ListMultipartUploads": lambda: (200, {}, b"<ListMultipartUploadsResult/>"),
            "HeadObject": self._get_object,
            "GetObject": self._get_object,
            "GetObject (range)": self._get_object,
            "PutObject": lambda: self._put_object(body, self._metadata()),
            "DeleteObject": self._delete_object,
            "CreateMultipartUpload": self._create_upload,
            "UploadPart": lambda: self._add_part(body),
            "CompleteMultipartUpload": lambda: self._complete_upload(body),
            "AbortMultipartUpload": self._abort_upload,
        }[self.operation]()

    def _delete_object(self) -> _Response:
        self.s3.objects.pop(self.key, None)
        return 204, {}, b""

    def _create_upload(self) -> _Response:
        upload_id = f"upload-{len(self.s3.requests)}"
        made = {
            "parts": {},
            "headers": self._metadata(),
            "algorithm": self._checksum_algorithm(),
            "mismatch": False,
        }
        self.s3.uploads[upload_id] = made
        name = "InitiateMultipartUploadResult"
        return 200, {}, f"<{name}><UploadId>{upload_id}</UploadId></{name}>".encode()

    def _upload(self) -> dict[str, Any]:
        upload = self.s3.uploads.get(self.query["uploadId"])
        if upload is None:
            raise _S3Error(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload

    def _add_part(self, body: bytes) -> _Response:
        upload = self._upload()
        upload["parts"][int(self.query["partNumber"])] = body
        upload["mismatch"] |= self._checksum_algorithm() != upload["algorithm"]
        headers = {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}
        if self._checksum_algorithm():
            headers["x-amz-checksum-crc32"] = _crc32(body)
        return 200, headers, b""

    def _complete_upload(self, body: bytes) -> _Response:
        upload = self._upload()
        listed = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        if listed != sorted(upload["parts"]) or len(re.findall(rb"<ETag>", body)) != len(listed):
            raise _S3Error(
                400, "InvalidPart", "The list of parts is not in ascending order, or not complete."
            )
        checksums = [text.decode() for text in re.findall(rb"<ChecksumCRC32>(.*?)<", body)]
        if upload["algorithm"] and checksums != [_crc32(upload["parts"][number]) for number in listed]:
            raise _S3Error(
                400, "InvalidPart", "The parts' checksums are missing, or are not those of the parts."
            )
        if self.s3.wants_declared_checksums and upload["mismatch"]:
            raise _S3Error(400, message="Checksum Type mismatch occurred, expected null, actual: crc32")
        data = b"".join(upload["parts"][number] for number in listed)
        _, headers, _ = self._put_object(data, upload["headers"])
        del self.s3.uploads[self.query["uploadId"]]
        name = "CompleteMultipartUploadResult"
        return 200, {}, f"<{name}><ETag>{escape(headers['ETag'])}</ETag></{name}>".encode()

    def _abort_upload(self) -> _Response:
        self._upload()
        del self.s3.uploads[self.query["uploadId"]]
        return 204, {}, b""

    def _checksum_algorithm(self) -> str:
        names = ("x-amz-checksum-algorithm", "x-amz-sdk-checksum-algorithm")
        return next((self.headers[name] for name in names if self.headers.get(name)), "")

    def _metadata(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta-")}

    def _put_object(self, data: bytes, metadata: dict[str, str]) -> _Response:
        there = self.s3.objects.get(self.key)
        if self.headers.get("If-None-Match") == "*" and there:
            raise _S3Error(412)
        if (wanted := self.headers.get("If-Match")) and (there is None or there.etag != wanted):
            raise _S3Error(412 if there else 404)
        return 200, {"ETag": self.s3.put(self.key, data, headers=metadata)}, b""

    def _list_objects(self) -> _Response:
        s3, query = self.s3, self.query
        start = query.get("start-after", "")
        if start and s3.refuses_start_after:
            raise _S3Error(400, message="StartAfter is not supported")
        keys = s3.sort_keys([key for key in sorted(s3.objects) if key.startswith(query.get("prefix", ""))])
        keys = [key for key in keys if key > start] if start else keys
        begin = int(query.get("continuation-token", "0"))
        size = min(s3.page_size, int(query.get("max-keys", "1000")))
        entries = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(s3.objects[key].data)}</Size>"
            f"<ETag>{escape(s3.objects[key].etag)}</ETag>"
            f"<LastModified>{_iso_timestamp(s3.objects[key].modified)}</LastModified></Contents>"
            for key in keys[begin : begin + size]
        )
        more = begin + size < len(keys)
        token = f"<NextContinuationToken>{begin + size}</NextContinuationToken>" if more else ""
        text = (
            f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{str(more).lower()}"
            f"</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        return 200, {}, text.encode()

    def _get_object(self) -> _Response:
        s3 = self.s3
        found = s3.objects.get(self.key)
        if found is None:
            raise _S3Error(404)
        if self.headers.get("If-Match", found.etag) != found.etag:
            raise _S3Error(412)
        headers = {
            **found.headers,
            "ETag": found.etag,
            "Last-Modified": formatdate(found.modified, usegmt=True),
        }
        wanted = self.headers.get("Range")
        with_mode = self.headers.get("x-amz-checksum-mode") == "ENABLED"
        if (s3.sends_checksums and with_mode) or (s3.sends_checksums_with_ranges and wanted):
            of = found.data + b"!" if s3.wrong_checksums else found.data
            digest = hashlib.new(s3.checksum, of, usedforsecurity=False).digest() if s3.checksum else b""
            value = base64.b64encode(digest).decode() or _crc32(of)
            headers[f"x-amz-checksum-{s3.checksum or 'crc32'}"] = value
        if not wanted or s3.ignores_ranges:
            return 200, headers, found.data
        begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(found.data):
            raise _S3Error(416, "InvalidRange", "The requested range is not satisfiable")
        size = len(found.data)
        return 206, headers | {"Content-Range": f"bytes {begin}-{size - 1}/{size}"}, found.data[begin:]

    def _error_response(self, refused: _S3Error) -> _Response:
        message = refused.message or refused.code
        text = f"<Error><Code>{refused.code}</Code><Message>{message}</Message></Error>"
        return refused.status, {}, text.encode()

    def _apply_fault(self, fault: Fault, answer: _Response) -> None:
        if fault.kind == "stall":
            self.s3.closing.wait()
            self.close_connection = True
        elif fault.kind == "reset":
            self._reset()
        elif fault.kind in {"cut", "end"}:
            status, headers, body = answer
            if fault.kind == "cut":
                self._send(status, headers | {"Content-Length": str(len(body))}, body[: len(body) // 2])
            else:
                self._send(
                    status, headers | {"Transfer-Encoding": "chunked"}, _encode_unfinished_chunks(body)
                )
            self.wfile.flush()
            # The client must read the sent data first: a reset would overtake it.
            time.sleep(0.05)
            self._reset()
        elif fault.kind == "200":
            self._send(200, {}, self._error_response(_S3Error(500))[2])
        else:
            self._send(*self._error_response(_S3Error(int(fault.kind))))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not {"Content-Length", "Transfer-Encoding"} & headers.keys() and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if isinstance(self.connection, ssl.SSLSocket):
                socket.socket(fileno=self.connection.detach()).close()
            else:
                self.connection.close()


def _encode_unfinished_chunks(body: bytes) -> bytes:
    """Return the body in chunked encoding without the final chunk."""
    return b"%x\r\n%s\r\n" % (len(body), body) if body else b""


def _crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _iso_timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))
