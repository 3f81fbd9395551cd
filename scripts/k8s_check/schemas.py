"""Validate every object against the oldest and the newest API schema. Unknown fields are findings."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from jsonschema.exceptions import best_match

from scripts.k8s_check.build import Builds, Manifest
from scripts.k8s_check.objects import name_of

_VERSIONS = ("1.29", kubernetes_validate.latest_version())
_CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): keda.TriggerAuthentication,
    ("monitoring.coreos.com/v1", "PodMonitor"): prometheus.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus.PrometheusRule,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus.ServiceMonitor,
}


def check(builds: Builds) -> Iterator[str]:
    """Yield the findings. An object that several builds share is checked once."""
    seen: set[str] = set()
    for build, manifests in builds.items():
        for manifest in manifests:
            if (text := json.dumps(manifest, sort_keys=True)) not in seen:
                seen.add(text)
                for problem in _problems(manifest):
                    yield f"{build}: {name_of(manifest)}: {problem}"


def _problems(manifest: Manifest) -> Iterator[str]:
    custom = _CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
    if custom is not None:
        for anywhere in _validator(custom).iter_errors(manifest):
            # An optional field may also be null: report the error of the other alternative.
            error = best_match([anywhere])
            yield f"{error.json_path}: {error.message[:200]}"
        return
    for version in _VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{error.json_path}: {error.message[:200]} (Kubernetes {version})"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message


@cache
def _validator(model: Any) -> Any:
    return jsonschema.Draft202012Validator(_forbid_unknown(model.model_json_schema(by_alias=True)))


def _forbid_unknown(schema: Any) -> Any:
    """Return the schema without additional properties."""
    if isinstance(schema, dict):
        closed = {key: _forbid_unknown(value) for key, value in schema.items()}
        if closed.get("type") == "object" and isinstance(closed.get("properties"), dict):
            closed.setdefault("additionalProperties", False)
        return closed
    return [_forbid_unknown(item) for item in schema] if isinstance(schema, list) else schema
