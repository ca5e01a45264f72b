"""What stands in deploy/ for Kubernetes, KubeRay and Helm is as their schemas say, and asks for
settings, ports and paths that there are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aegaeon.cluster.serve import check
from aegaeon.config import load_settings
from aegaeon.store.redis_url import read_place

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not here; run: make install")

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "aegaeon"
SCHEMAS = ROOT / "tests" / "deploy_schemas"
SECRETS = "/run/secrets/redis"
RENDERED = {"kubernetes.yaml": (), "kuberay.yaml": ("--set", "mode=cluster")}
# `make helm` puts it beside Python; 60 MB, so not everybody has it.
HELM = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))


def read(name):
    return json.loads((SCHEMAS / f"{name}.json").read_text())


KINDS = {
    kind: f"io.k8s.api.{group}.{kind}"
    for kind, group in {
        **dict.fromkeys(("Deployment", "StatefulSet"), "apps.v1"),
        **dict.fromkeys(("Service", "ConfigMap", "PersistentVolumeClaim"), "core.v1"),
    }.items()
}


def validator_of(kind):
    """What validates a manifest of `kind`; pods are Kubernetes', wherever they stand."""
    kubernetes = read("kubernetes")["$defs"]
    if kind == "RayCluster":
        schema = read("raycluster")
        schema["$defs"].update(kubernetes)
    else:
        schema = {"$ref": f"#/$defs/{KINDS[kind]}", "$defs": kubernetes}
    return jsonschema.Draft202012Validator(schema)


def faults(manifest):
    return [
        f"{manifest['kind']} {fault.json_path}: {fault.message}"
        for fault in validator_of(manifest["kind"]).iter_errors(manifest)
    ]


def manifests(text):
    return [one for one in yaml.safe_load_all(text) if one is not None]


def rendered(name):
    return manifests((DEPLOY / name).read_text())


def of_kind(found, kind, name=None):
    (one,) = (
        one for one in found if one["kind"] == kind and name in (None, one["metadata"]["name"])
    )
    return one


def pods(found):
    """The templates of pods in manifests, by where they stand."""
    by_place = {}
    for one in found:
        if one["kind"] in ("Deployment", "StatefulSet"):
            by_place[one["metadata"]["name"]] = one["spec"]["template"]
        elif one["kind"] == "RayCluster":
            by_place["head"] = one["spec"]["headGroupSpec"]["template"]
            for group in one["spec"]["workerGroupSpecs"]:
                by_place[group["groupName"]] = group["template"]
    return by_place


def helm(*arguments):
    command = [HELM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not here; run: make helm")


# Manifests


@pytest.mark.parametrize("name", RENDERED)
def test_manifests_are_as_their_schemas_say(name):
    found = rendered(name)
    assert [fault for one in found for fault in faults(one)] == []
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(names) == len(set(names)) and len(names) >= 4


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", lambda one: one["spec"].update(replica=2)),
        ("Deployment", lambda one: one["spec"].pop("selector")),
        ("Service", lambda one: one["spec"]["ports"][0].update(port="eighty")),
        ("ConfigMap", lambda one: one["data"].update(port=80)),
    ],
)
def test_the_schemas_find_what_is_wrong(kind, change):
    one = of_kind(rendered("kubernetes.yaml"), kind)
    change(one)
    assert faults(one)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["headGroupSpec"].pop("template"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["workerGroupSpecs"][0].update(replica=2),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(container=[]),
    ],
)
def test_the_schema_of_a_ray_cluster_finds_what_is_wrong(change):
    cluster = of_kind(rendered("kuberay.yaml"), "RayCluster")
    change(cluster["spec"])
    assert faults(cluster)


@pytest.mark.parametrize("name", RENDERED)
def test_services_lead_to_ports_of_pods(name):
    found = rendered(name)
    for service in (one for one in found if one["kind"] == "Service"):
        selector = service["spec"]["selector"].items()
        led_to = [
            pod for pod in pods(found).values() if selector <= pod["metadata"]["labels"].items()
        ]
        assert len(led_to) == 1, service["metadata"]["name"]
        ports = {
            port["name"] for one in led_to[0]["spec"]["containers"] for port in one.get("ports", ())
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_mounted_is_there_and_shared_memory_is_sized(name):
    for place, pod in pods(rendered(name)).items():
        spec = pod["spec"]
        volumes = {one["name"]: one for one in spec["volumes"]}
        if place.endswith("redis"):
            volumes["data"] = {}  # a claim of its own
        for container in spec["containers"]:
            mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes.keys()
            if place.endswith("redis"):
                continue
            shared = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shared["medium"] == "Memory" and shared["sizeLimit"]
            assert mounts["/models"]


def test_probes_ask_what_the_server_answers():
    routes = {"/health/live", "/health/ready"}
    (single,) = pods(rendered("kubernetes.yaml")).values()
    (container,) = single["spec"]["containers"]
    asked = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "startup")}
    assert set(asked.values()) == {"/health/live"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    cluster = pods(rendered("kuberay.yaml"))
    (worker,) = cluster["workers"]["spec"]["containers"]
    assert worker["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    # Workers wait for a head that is ready, and a proxy is ready only with them.
    for one in cluster["head"]["spec"]["containers"]:
        assert not {"readinessProbe", "livenessProbe", "startupProbe"} & one.keys()
    text = (ROOT / "aegaeon" / "proxy").rglob("*.py")
    told = " ".join(path.read_text() for path in text)
    assert all(f'"{route}"' in told for route in routes)


# What they ask of aegaeon


def settings_in(found, tmp_path):
    (text,) = of_kind(found, "ConfigMap")["data"].values()
    file = tmp_path / "server.yaml"
    file.write_text(text)
    return load_settings({}, {}, str(file))


def place_of(settings, tmp_path):
    """Where Redis is; the password's file is looked for, so there must be one."""
    assert f"password_file={SECRETS}/password" in settings.redis_url
    (tmp_path / "password").write_text("secret")
    return read_place(settings.redis_url.replace(SECRETS, str(tmp_path)))


def test_the_settings_of_one_node_are_known(tmp_path):
    settings = settings_in(rendered("kubernetes.yaml"), tmp_path)
    assert (settings.host, settings.port, settings.clustered) == ("0.0.0.0", 8080, None)
    assert settings.models_dir == "/models"


def test_the_settings_of_a_cluster_can_serve_on_one(tmp_path):
    found = rendered("kuberay.yaml")
    settings = settings_in(found, tmp_path)
    check(settings)
    assert settings.clustered.address == "auto" and settings.clustered.proxies == 0
    place = place_of(settings, tmp_path)
    service = of_kind(found, "Service", "aegaeon-redis")
    assert place.servers == (("aegaeon-redis", service["spec"]["ports"][0]["port"]),)
    # Each node reads the password at each connection.
    for pod in ("head", "workers"):
        for one in pods(found)[pod]["spec"]["containers"]:
            assert SECRETS in {mount["mountPath"] for mount in one["volumeMounts"]}


def test_who_serves_is_given_time_to_drain():
    settings = load_settings({}, {})
    for name in RENDERED:
        for place, pod in pods(rendered(name)).items():
            if not place.endswith("redis"):
                assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * settings.drain_s


# The chart


def values():
    return yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_values_are_as_their_schema_says():
    schema = json.loads((CHART / "values.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [fault.message for fault in validator.iter_errors(values())] == []
    known = json.loads((ROOT / "docs" / "settings.schema.json").read_text())
    jsonschema.validate(values()["settings"], known)
    for change in (
        {"mode": "many"},
        {"replicas": 2},
        {"sharedMemory": "16 GB"},
        {"settings": {"models": ["m"], "redis_url": "redis://elsewhere"}},
    ):
        assert list(validator.iter_errors({**values(), **change})), change


@needs_helm
@pytest.mark.parametrize("name", RENDERED)
def test_the_chart_makes_what_stands_beside_it(name):
    done = helm("template", "aegaeon", str(CHART), *RENDERED[name])
    assert done.returncode == 0, done.stderr
    assert manifests(done.stdout) == rendered(name), f"its first lines say how to make {name}"


@needs_helm
def test_helm_finds_nothing_wrong_with_the_chart():
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@needs_helm
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("mode=many", "mode"),
        ("replicas=2", "replicas"),
        ("settings.port=80", "settings"),
        ("redis.maxMemory=lots", "maxMemory"),
    ],
)
def test_helm_refuses_values_that_make_no_sense(flags, words):
    done = helm("template", "aegaeon", str(CHART), "--set", flags)
    assert done.returncode != 0 and words in done.stderr


@needs_helm
def test_all_that_may_be_set_makes_manifests_that_are_right(tmp_path):
    flags = {
        "mode": "cluster",
        "keysSecret": "keys",
        "models.existingClaim": "weights",
        "redis.address": "redis.example:6380",
        "service.type": "LoadBalancer",
        "serviceMonitor.enabled": "true",
        "serviceMonitor.keySecret": "metrics-key",
    }
    given = [part for key, value in flags.items() for part in ("--set", f"{key}={value}")]
    done = helm("template", "one", str(CHART), *given)
    assert done.returncode == 0, done.stderr
    found = manifests(done.stdout)
    monitor = of_kind(found, "ServiceMonitor")
    found.remove(monitor)  # Prometheus' operator says what it is
    assert [fault for one in found for fault in faults(one)] == []
    assert {one["kind"] for one in found} == {"ConfigMap", "Service", "RayCluster"}
    settings = settings_in(found, tmp_path)
    check(settings)
    assert place_of(settings, tmp_path).servers == (("redis.example", 6380),)
    assert Path(settings.keys_file) == Path("/run/secrets/aegaeon/keys")
    spec = pods(found)["workers"]["spec"]
    claims = [
        one["persistentVolumeClaim"]["claimName"]
        for one in spec["volumes"]
        if "persistentVolumeClaim" in one
    ]
    assert claims == ["weights"]
    service = of_kind(found, "Service", "one-metrics")
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    assert monitor["spec"]["endpoints"][0]["port"] in {
        port["name"] for port in service["spec"]["ports"]
    }
