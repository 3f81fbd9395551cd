"""`make k8s-check` reports each breakage of a good build by name.

The module is longer than 250 lines, since the formatter gives each breakage of its tables several lines.
"""

import shutil
from pathlib import Path

import pytest
import yaml

from scripts import prometheus_rule
from scripts.k8s_check import build, checks, policy, schemas, watching
from scripts.k8s_check.build import MONITORED_BUILD, Builds
from tests.support.processes import ROOT

pytestmark = pytest.mark.k8s

_DEV = MONITORED_BUILD
_PROD = "overlays/prod"
_ALL = "overlays/prod with all"

_INCONSISTENCIES = [
    # Arguments and variables of containers.
    (
        _PROD,
        "CACHE_PROXY_DRAIN_DELAY: 10s",
        "CACHE_PROXY_DRAIN_DELEY: 10s",
        "no variable CACHE_PROXY_DRAIN_DELEY",
    ),
    (_PROD, "CACHE_PROXY_DRAIN_DELAY: 10s", "CACHE_PROXY_DRAIN_DELAY: ten", "'ten'"),
    (
        _PROD,
        "CACHE_PROXY_DRAIN_DELAY: 10s",
        "CACHE_PROXY_DRAIN_DELAY: 20s",
        "terminationGracePeriodSeconds 65",
    ),
    (_PROD, "CACHE_PROXY_DRAIN_TIMEOUT: 40s", "CACHE_PROXY_DRAIN_TIMEOUT: 50s", "it needs 60 s, and 10 more"),
    (_PROD, "terminationGracePeriodSeconds: 65", "terminationGracePeriodSeconds: 59", "it needs 50 s"),
    (
        _PROD,
        "terminationGracePeriodSeconds: 30",
        "terminationGracePeriodSeconds: 20",
        "augmenter: terminationGrace",
    ),
    (
        _DEV,
        "terminationGracePeriodSeconds: 50",
        "terminationGracePeriodSeconds: 10",
        "Deployment/caller/cache-proxy",
    ),
    (_PROD, "- serve", "- serf", "no command 'serf'"),
    (_PROD, "- --watch", "- --watsh", "--watsh"),
    (
        _PROD,
        "- run\n",
        "- run\n        - s3://b/in/\n        - s3://b/in/out/\n        - --lookback\n",
        "--watch",
    ),
    (_ALL, "OTEL_TRACES_SAMPLER_ARG", "OTEL_TRACES_SAMPLE_ARG", "no variable OTEL_TRACES_SAMPLE_ARG"),
    (_ALL, "observability:4317", "observability:4318", "no NetworkPolicy lets it out on port 4318"),
    (_ALL, "$(JOB_COMPLETION_INDEX)/8", "$(JOB_COMPLETION_INDEX)/7", "--shard is of 7, completions are 8"),
    (_ALL, "$(JOB_COMPLETION_INDEX)/8", "$(JOB_COMPLETION)/8", "$(JOB_COMPLETION)/8"),
    # The cache's URL.
    (_PROD, "rediss://redis.example.com:6379", "'embedded:'", "a cache and a limit of its own"),
    (_PROD, "rediss://redis.example.com:6379", "'memory:'", "a cache and a limit of its own"),
    (_PROD, "rediss://redis.example.com:6379", "rediss://:pw@redis.example.com:6379", "has a password in it"),
    (_PROD, "  CACHE_PROXY_CACHE_URL: rediss", "  SOMETHING: rediss", "has no CACHE_PROXY_CACHE_URL"),
    (_PROD, "CACHE_PROXY_CACHE_URL", "AWS_CACHE_URL", "nothing sets --cache-url"),
    # Certificates: each file that a setting or the URL names must be mounted.
    (
        _PROD,
        "rediss://redis.example.com:6379",
        "rediss://redis.example.com:6379?ssl_certfile=/etc/none",
        "nothing is mounted that holds /etc/none",
    ),
    (
        _PROD,
        "CACHE_PROXY_MODEL_VERSION: '1'",
        "CACHE_PROXY_CALLER_TOKENS_FILE: /etc/none",
        "nothing is mounted that holds /etc/none",
    ),
    (
        _PROD,
        "CACHE_PROXY_MODEL_VERSION: '1'",
        "CACHE_PROXY_TLS_CERT: /etc/cache-proxy/secrets/c",
        "neither goes without the other",
    ),
    (
        _PROD,
        "CACHE_PROXY_MODEL_VERSION: '1'",
        "CACHE_PROXY_TLS_CERT: /etc/none\n  CACHE_PROXY_TLS_KEY: /etc/none",
        "nothing is mounted that holds /etc/none",
    ),
    (
        _ALL,
        "mountPath: /etc/augmenter/tls",
        "mountPath: /etc/augmenter/ssl",
        "CronJob/augmenter-sweep/augmenter: nothing is mounted that holds /etc/augmenter/tls/ca.crt",
    ),
    (
        _ALL,
        "mountPath: /etc/cache-proxy/tls",
        "mountPath: /etc/cache-proxy/ssl",
        "nothing is mounted that holds /etc/cache-proxy/tls/tls.key",
    ),
    # Ports, probes and memory.
    (_PROD, "containerPort: 50051", "containerPort: 50052", "it does not listen on port 50052"),
    (_PROD, "        - containerPort: 50051\n          name: grpc\n", "", "it listens on port 50051"),
    (_PROD, "path: /readyz", "path: /ready", "cache-proxy has no /ready"),
    (
        _PROD,
        "path: /healthz\n            port: http",
        "path: /healthz\n            port: grpc",
        "HTTP is not on port",
    ),
    (
        _PROD,
        "path: /healthz\n            port: http",
        "path: /healthz\n            port: web",
        "there is no port web",
    ),
    (_PROD, "memory: 1Gi", "memory: 512Mi", "let it take 768Mi"),
    (_PROD, "enableServiceLinks: false", "enableServiceLinks: true", "enableServiceLinks must be false"),
    # Files.
    (
        _PROD,
        "FILE: /etc/cache-proxy/secrets/cache-password",
        "FILE: /etc/password",
        "nothing is mounted that holds",
    ),
    (_DEV, "cache-password: ", "cache-pasword: ", "has no cache-password"),
    (_DEV, "subPath: 1714605540.jsonl", "subPath: 1714605541.jsonl", "has no 1714605541.jsonl"),
    # References.
    (
        _PROD,
        "app.kubernetes.io/name: cache-proxy\n  strategy",
        "app.kubernetes.io/name: proxy\n  strategy",
        "its own pods",
    ),
    (
        _PROD,
        "selector:\n    app.kubernetes.io/name: cache-proxy",
        "selector:\n    app: proxy",
        "Service/cache-proxy: it selects",
    ),
    (_PROD, "targetPort: grpc", "targetPort: rpc", "no container has its port rpc"),
    (_PROD, "serviceAccountName: augmenter", "serviceAccountName: augmentor", "no ServiceAccount augmentor"),
    (
        _PROD,
        "configMapRef:\n            name: augmenter-",
        "configMapRef:\n            name: other-",
        "there is no ConfigMap other",
    ),
    (
        _DEV,
        "configMap:\n          name: sample-",
        "configMap:\n          name: simple-",
        "there is no ConfigMap simple",
    ),
    (
        _PROD,
        "- mountPath: /etc/cache-proxy/secrets\n          name: secrets",
        "- mountPath: /etc/cache-proxy/secrets\n          name: secret",
        "no volume secret",
    ),
    (_PROD, "cache-proxy:0.1.0", "cache-proxy:latest", "no version says which"),
    (_DEV, "serviceName: redis", "serviceName: valkey", "there is no Service valkey"),
    (
        _PROD,
        "podSelector:\n    matchLabels:\n      app.kubernetes.io/component: augmenter",
        "podSelector:\n    matchLabels:\n      app: x",
        "NetworkPolicy/augmenter: it selects no pods",
    ),
    # Numbers of replicas.
    (_PROD, "maxReplicas: 6", "maxReplicas: 7", "there can be 8 proxies"),
    (_DEV, "maxReplicas: 2", "maxReplicas: 4", "there can be 6 proxies"),
    (
        _PROD,
        "    kind: Deployment\n    name: cache-proxy",
        "    kind: Deployment\n    name: proxy",
        "there is no Deployment/proxy",
    ),
    (_PROD, "  revisionHistoryLimit: 3", "  replicas: 3", "at every apply"),
    (
        _PROD,
        "  scaleTargetRef:\n    name: augmenter",
        "  scaleTargetRef:\n    name: cache-proxy",
        "2 scalers",
    ),
    (
        _PROD,
        "queueURLFromEnv: AUGMENTER_SQS_QUEUE_URL",
        "queueURLFromEnv: AUGMENTER_QUEUE",
        "no variable AUGMENTER_QUEUE",
    ),
    (
        _PROD,
        "awsRegion: eu-west-1",
        "awsRegion: eu-west-2",
        "awsRegion is eu-west-2, AWS_DEFAULT_REGION eu-west-1",
    ),
    (
        _PROD,
        "authenticationRef:\n      name: augmenter",
        "authenticationRef:\n      name: other",
        "no TriggerAuthentication other",
    ),
    # Addresses of other services.
    (
        _DEV,
        "CACHE_PROXY_MODEL_TARGET: model-stub:50051",
        "CACHE_PROXY_MODEL_TARGET: stub:50051",
        "no Service stub",
    ),
    (
        _DEV,
        "CACHE_PROXY_MODEL_TARGET: model-stub:50051",
        "CACHE_PROXY_MODEL_TARGET: model-stub:6379",
        "has no port 6379",
    ),
    (_PROD, "dns:///model.example.com:50051", "dns:///model.example.com:443", "lets it out on port 443"),
    (
        _PROD,
        "rediss://redis.example.com:6379",
        "redis+cluster://a.example.com:6379,b.example.com:6380",
        "out on port 6380",
    ),
    (
        _PROD,
        "    ports:\n    - port: grpc\n",
        "    ports:\n    - port: web\n",
        "lets anybody in on port grpc",
    ),
    (
        _DEV,
        "unix:/run/cache-proxy/proxy.sock\n        - --caller",
        "unix:/run/cache-proxy/p.sock\n        - --caller",
        "no sidecar listens on",
    ),
    (
        _DEV,
        "fsGroup: 20001\n        runAsGroup: 20001\n        runAsNonRoot: true\n        runAsUser: 20001",
        "runAsNonRoot: true",
        "may not open the socket",
    ),
    # Monitoring.
    (
        _DEV,
        "cache_proxy_pairs_total",
        "cache_proxy_pears_total",
        "there is no metric cache_proxy_pears_total",
    ),
    (
        _DEV,
        "cache_proxy_degraded",
        "cache_proxy_degraded_total",
        "there is no metric cache_proxy_degraded_total",
    ),
    (
        _DEV,
        "- interval: 15s\n    port: http\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: cache-proxy",
        "- port: web\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: cache-proxy",
        "has a port web",
    ),
    (_DEV, "port: cache-http\n  selector", "port: http\n  selector", "PodMonitor/cache-proxy-sidecars"),
]

_SCHEMA_VIOLATIONS = [
    (_PROD, "maxReplicas: 6", "maxReplicas: six", "'six' is not of type 'integer'"),
    (_PROD, "enableServiceLinks", "enableServiceLink", "'enableServiceLink' was unexpected"),
    (_PROD, "policy/v1", "policy/v1beta1", "Couldn't find schema for kind PodDisruptionBudget"),
    (
        _PROD,
        "      terminationGracePeriodSeconds: 65",
        "      resources: {}\n      terminationGracePeriodSeconds: 65",
        "(Kubernetes 1.29)",
    ),
    (_PROD, "cooldownPeriod", "coolDownPeriod", "'coolDownPeriod' was unexpected"),
    (_PROD, "provider: aws", "providers: aws", "$.spec.podIdentity: "),
    (_DEV, "interval: 15s\n    port: http", "intervall: 15s\n    port: http", "'intervall' was unexpected"),
    (_DEV, "podMetricsEndpoints", "podMetricEndpoints", "'podMetricEndpoints' was unexpected"),
    (_DEV, "    - alert:", "    - alarm:", "'alarm' was unexpected"),
]


@pytest.fixture(scope="session")
def builds() -> Builds:
    """Return all builds, unmodified."""
    return build.all_builds(ROOT / "deploy")


def test_unmodified_builds_have_no_findings(builds: Builds) -> None:
    """Otherwise the tests of breakages would prove nothing."""
    assert list(checks.check(builds)) == []


@pytest.mark.parametrize(("name", "old", "new", "expected"), _INCONSISTENCIES)
def test_inconsistent_build_is_reported(
    builds: Builds, name: str, old: str, new: str, expected: str | None
) -> None:
    """A build in which one value does not match the others is reported with that value's name."""
    found = list(checks.check({MONITORED_BUILD: _broken(builds, name, old, new)}))
    assert any(str(expected) in finding for finding in found), found


@pytest.mark.parametrize(("name", "old", "new", "expected"), _SCHEMA_VIOLATIONS)
def test_schema_violation_is_reported(builds: Builds, name: str, old: str, new: str, expected: str) -> None:
    """Objects that the API would reject and fields that it would drop are reported, also in custom resources."""
    found = list(schemas.check({name: _broken(builds, name, old, new)}))
    assert any(expected in finding for finding in found), found


def test_unmodified_builds_match_the_schemas(builds: Builds) -> None:
    """They are valid for the oldest and the newest supported version."""
    assert list(schemas.check(builds)) == []


def test_policy_reports_writable_roots_and_root_users(builds: Builds) -> None:
    """Containers with a writable root file system or the root user are reported, and no others."""
    exceptions = ROOT / "deploy" / "k8s" / "trivyignore"
    writable = _broken(builds, _PROD, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")
    root = _broken(builds, _PROD, "runAsNonRoot: true", "runAsNonRoot: false")
    found = policy.check({"good": builds[_PROD], "writable": writable, "root": root}, ignored=exceptions)
    ids = {tuple(finding.split(": ")[:2]) for finding in found}
    assert ids == {("writable", "KSV-0014"), ("root", "KSV-0012")}


def test_missing_file_of_a_kustomization_is_an_error(tmp_path: Path) -> None:
    """The error names the file. The build does not just lack it."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    (tmp_path / "deploy/k8s/base/cache-proxy/scaling.yaml").unlink()
    with pytest.raises(build.KustomizeError, match=r"scaling\.yaml"):
        build.all_builds(tmp_path / "deploy")


def test_metric_names_are_those_of_a_scrape() -> None:
    """They include the suffixes that a scrape has."""
    names = watching.metric_names()
    assert {
        "cache_proxy_pairs_total",
        "cache_proxy_model_duration_seconds_bucket",
        "augmenter_backlog_files",
    } <= names
    assert not {"cache_proxy_pairs", "cache_proxy_model_duration_seconds", "augmenter_files"} & names


def test_prometheus_rule_contains_the_rules_groups() -> None:
    """The PrometheusRule contains the groups of the rules file and changes with them."""
    rules = "groups:\n- name: a\n  rules:\n  - {alert: A, expr: up == 0}\n"
    rendered = yaml.safe_load(prometheus_rule.render(rules))
    assert rendered["spec"] == yaml.safe_load(rules)
    assert prometheus_rule.render(rules) != prometheus_rule.render(rules.replace("up ==", "down =="))


def _broken(builds: Builds, name: str, old: str, new: str) -> list[build.Manifest]:
    text = yaml.dump_all(builds[name], Dumper=yaml.CSafeDumper)
    assert old in text
    return [*yaml.load_all(text.replace(old, new), Loader=yaml.CSafeLoader)]
