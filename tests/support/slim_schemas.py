"""Makes tests/deploy_schemas anew from published packages, without what only people read.

    pip download --no-deps kubernetes-validate==1.37.0 check-jsonschema==0.39.0
    python -m tests.support.slim_schemas kubernetes_validate-*.whl check_jsonschema-*.whl

Both are under the Apache License 2.0: the first holds what the Kubernetes API says of itself, the
second the Compose Specification's schema. Its third, RayCluster's, is written by hand.
"""

import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[1] / "deploy_schemas"
KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.34.0-local-strict/_definitions.json"
COMPOSE = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
KINDS = (
    *("apps.v1.Deployment", "apps.v1.StatefulSet", "core.v1.Service", "core.v1.ConfigMap"),
    *("core.v1.PersistentVolumeClaim", "core.v1.PodTemplateSpec"),
)


def bare(schema: Any) -> Any:
    """Return `schema` without descriptions, defaults and the API server's own marks."""
    match schema:
        case dict():
            return {
                key: {name: bare(one) for name, one in value.items()}
                if key in ("properties", "patternProperties", "definitions")
                else "#" + value.rpartition("#")[2]
                if key == "$ref"
                else bare(value)
                for key, value in schema.items()
                if key not in ("description", "default", "title") and not key.startswith("x-")
            }
        case list():
            return [bare(one) for one in schema]
    return schema


def named_by(schema: Any) -> Iterator[str]:
    """Yield the names of the definitions that `schema` refers to."""
    match schema:
        case dict():
            if isinstance(schema.get("$ref"), str):
                yield schema["$ref"].rpartition("/")[2]
            for value in schema.values():
                yield from named_by(value)
        case list():
            for one in schema:
                yield from named_by(one)


def kubernetes(whole: dict[str, Any]) -> dict[str, Any]:
    """Return the definitions of KINDS, and those that they need."""
    known = whole["$defs"]
    found: dict[str, Any] = {}
    wanted = [f"io.k8s.api.{kind}" for kind in KINDS]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = bare(known[name])
            wanted += named_by(found[name])
    return {"$defs": dict(sorted(found.items()))}


def main(wheels: Sequence[str]) -> None:
    """Write both."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as files:
            if KUBERNETES in files.namelist():
                _write("kubernetes", kubernetes(json.loads(files.read(KUBERNETES))))
            else:
                _write("compose", bare(json.loads(files.read(COMPOSE))))


def _write(name: str, schema: dict[str, Any]) -> None:
    text = json.dumps(schema, separators=(",", ":")) + "\n"
    (SCHEMAS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
