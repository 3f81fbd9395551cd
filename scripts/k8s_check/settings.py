"""Check the settings of the project's containers with the parsers of the programs themselves."""

from collections.abc import Iterator, Sequence
from urllib.parse import parse_qs, urlsplit

from opentelemetry import environment_variables as api_variables
from opentelemetry.sdk import environment_variables as sdk_variables

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.commands import PROGRAMS, Parsed, SettingsRejectedError, parse, variables
from scripts.k8s_check.environment import environment, missing_files
from scripts.k8s_check.objects import Container, containers
from services.augmenter.app import GRACE_SECONDS

_MIB = 2**20
# Time after the drain to close connections and write remaining data.
_CLOSING_SECONDS = 10
# Memory of a proxy besides caches: Python, gRPC, requests in progress.
_BASE_MEMORY_BYTES = 256 * _MIB
_PATHS = {"cache-proxy": {"/healthz", "/readyz"}, "augmenter": {"/healthz"}}
_UNITS = {"Mi": _MIB, "Gi": 1024 * _MIB}
_DEFAULT_GRACE_SECONDS = 30
_LIBRARY_PREFIX = "AWS_"
_TRACING_VARIABLES = {
    name for module in (api_variables, sdk_variables) for name in vars(module) if name[:5] == "OTEL_"
}


def check(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the findings of one build."""
    for container, parsed in _parse_all(manifests):
        problems = [parsed] if isinstance(parsed, str) else _problems(container, parsed, manifests)
        yield from (f"{container.name}: {problem}" for problem in problems)


def external_secrets(manifests: Sequence[Manifest]) -> set[str]:
    """Return the Secrets that the settings name files of and that are made elsewhere."""
    return {
        needed
        for container, parsed in _parse_all(manifests)
        if not isinstance(parsed, str)
        for path in _files(parsed)
        for needed, is_outside in missing_files(container, manifests, path)
        if is_outside
    }


def accepted_settings(manifests: Sequence[Manifest], program: str) -> Iterator[tuple[Container, Parsed]]:
    """Yield the containers of a program whose settings are valid, with these settings."""
    for container, parsed in _parse_all(manifests):
        if container.program == program and not isinstance(parsed, str):
            yield container, parsed


def _parse_all(manifests: Sequence[Manifest]) -> Iterator[tuple[Container, Parsed | str]]:
    for container in containers(manifests):
        if container.program not in PROGRAMS:
            continue
        seen = environment(container, manifests)
        args = [seen.expand(str(arg)) for arg in container.spec.get("args", ())]
        try:
            yield container, parse(container.program, args, seen.variables)
        except SettingsRejectedError as refused:
            yield container, str(refused)


def _problems(container: Container, parsed: Parsed, manifests: Sequence[Manifest]) -> Iterator[str]:
    known = variables(container.program) | _TRACING_VARIABLES
    for name in environment(container, manifests).variables.keys() - known:
        if not name.startswith(_LIBRARY_PREFIX) and name != "JOB_COMPLETION_INDEX":
            yield f"{container.program} knows no variable {name}"
    for path in _files(parsed):
        for problem, is_outside in missing_files(container, manifests, path):
            if not is_outside:
                yield f"{problem} ({path})"
    yield from _check_probes(container, parsed)
    yield from _check_ports(container, parsed)
    yield from _check_grace(container, parsed)
    if container.program == "cache-proxy":
        yield from _check_proxy(container, parsed)
    if container.program == "augmenter":
        yield from _check_shard(container, parsed)


def _files(parsed: Parsed) -> Iterator[str]:
    for name, value in parsed.values.items():
        if value and name.endswith(("_file", "tls_ca", "tls_client_ca", "tls_cert", "tls_key")):
            yield str(value)
    if parsed.values.get("cache_url"):
        found = parse_qs(urlsplit(parsed.values["cache_url"]).query)
        yield from (path for name in ("ssl_certfile", "ssl_keyfile") for path in found.get(name, ()))


def _check_probes(container: Container, parsed: Parsed) -> Iterator[str]:
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        http_get = container.spec.get(kind, {}).get("httpGet")
        if http_get and http_get["path"] not in _PATHS.get(container.program, ()):
            yield f"{kind}: {container.program} has no {http_get['path']}"
        if http_get and container.port(http_get["port"]) != _http_port(parsed):
            yield f"{kind}: HTTP is not on port {http_get['port']}"


def _http_port(parsed: Parsed) -> int | None:
    listen = parsed.values.get("http_listen")
    return int(listen.rpartition(":")[2]) if listen else None


def _check_ports(container: Container, parsed: Parsed) -> Iterator[str]:
    addresses = parsed.values.get("listen", ())
    for address in addresses:
        path = address.removeprefix("unix:")
        if path != address and container.volume_at(path) is None:
            yield f"nothing is mounted that holds {path}"
    listening = {int(one.rpartition(":")[2]) for one in addresses if not one.startswith("unix:")}
    listening |= {port for port in (_http_port(parsed),) if port}
    declared = {port["containerPort"] for port in container.spec.get("ports", ())}
    for port in sorted(declared - listening):
        yield f"it does not listen on port {port}"
    for port in sorted(listening - declared):
        yield f"it listens on port {port}, which is not among its ports"


def _check_grace(container: Container, parsed: Parsed) -> Iterator[str]:
    given = container.pod.spec.get("terminationGracePeriodSeconds", _DEFAULT_GRACE_SECONDS)
    if container.program == "cache-proxy":
        needed = parsed.values["drain_delay_seconds"] + parsed.values["drain_timeout_seconds"]
    elif parsed.values.get("watch"):
        needed = GRACE_SECONDS
    else:
        return
    if given < needed + _CLOSING_SECONDS:
        yield f"terminationGracePeriodSeconds {given}: it needs {needed:.0f} s, and {_CLOSING_SECONDS} more"


def _check_proxy(container: Container, parsed: Parsed) -> Iterator[str]:
    values = parsed.values
    if "cache_url" in parsed.defaults:
        yield "nothing sets --cache-url: each replica would have a cache and a limit of its own"
    elif values["cache_url"].partition(":")[0] in {"embedded", "memory"}:
        yield f"--cache-url {values['cache_url']}: each replica would have a cache and a limit of its own"
    elif urlsplit(values["cache_url"]).password:
        yield "--cache-url has a password in it: it belongs into --cache-password-file"
    if container.pod.spec.get("enableServiceLinks", True):
        yield "enableServiceLinks must be false: a Service called cache-proxy sets CACHE_PROXY_… variables"
    limit = container.spec["resources"]["limits"]["memory"]
    needed = values["l1_max_bytes"] + values["max_queued_bytes"] + _BASE_MEMORY_BYTES
    if int(limit[:-2]) * _UNITS[limit[-2:]] < needed:
        yield f"memory {limit}: --l1-max-bytes and --max-queued-bytes let it take {needed // _MIB}Mi"


def _check_shard(container: Container, parsed: Parsed) -> Iterator[str]:
    completions = container.pod.workload["spec"].get("completions")
    shards = parsed.values["shard"][1]
    if completions is not None and completions != shards:
        yield f"--shard is of {shards}, completions are {completions}"
