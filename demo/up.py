"""`make up`: a model stub and a proxy on fixed ports until Ctrl-C, with the lines to paste."""

import signal
import sys
import time
from pathlib import Path

from demo.processes import ServerFailedError, running_server

_FOLDER = Path(".demo/up")
_STUB = "127.0.0.1:50052"
_PROXY = "127.0.0.1:50051"
_HTTP = "127.0.0.1:9464"

_HELP = f"""\
A stand-in for the model is at {_STUB}, the proxy at {_PROXY} (Ctrl-C stops both).

From Python (.venv/bin/python):

    import grpc
    from protos import seniority_pb2 as pb, seniority_pb2_grpc
    model = seniority_pb2_grpc.SeniorityModelStub(grpc.insecure_channel("{_PROXY}"))
    pair = pb.SeniorityRequest(uuid=1, company="Acme", title="Senior Engineer")
    print(model.InferSeniority(pb.SeniorityRequestBatch(batch=[pair])))

From a shell:

    grpcurl -plaintext -d '{{"batch": [{{"uuid": 1, "company": "Acme", "title": "Senior Engineer"}}]}}' \\
        {_PROXY} SeniorityModel/InferSeniority
    .venv/bin/cache-proxy infer --target {_PROXY} --company Acme --title 'Senior Engineer'
    curl http://{_HTTP}/metrics
"""


def main() -> int:
    """Serve until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _FOLDER.mkdir(parents=True, exist_ok=True)
    stub = ["serve", "--listen", _STUB, "--log", str(_FOLDER / "calls.jsonl")]
    proxy = ["serve", "--listen", _PROXY, "--http-listen", _HTTP, "--model-target", _STUB]
    proxy += ["--cache-url", f"embedded:{_FOLDER / 'cache'}", "--drain-delay", "0s"]
    try:
        with (
            running_server("services.model_stub", stub, log=_FOLDER / "model-stub.log"),
            running_server("services.cache_proxy", proxy, log=_FOLDER / "cache-proxy.log"),
        ):
            sys.stdout.write(_HELP)
            sys.stdout.flush()
            while True:
                time.sleep(3600)
    except ServerFailedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
