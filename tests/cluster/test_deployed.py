"""What deploy/ asks of `ray start` is what Ray takes, and the settings of its cluster serve."""

import json
import re
from pathlib import Path

import httpx
import yaml

from benchmark.serving import running_server
from tests.support.checkpoints import make_checkpoint
from tests.support.ray_cluster import ray_cluster, require_ray
from tests.support.redis_server import RedisServer, require_redis
from tests.support.server import run_cli

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def known():
    require_ray()
    from ray.scripts.scripts import start  # noqa: PLC0415  an extra

    return {option for parameter in start.params for option in parameter.opts}


def test_ray_takes_the_flags_of_the_compose_file():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    taken = known()
    for name in ("head", "node"):
        command = services[name]["entrypoint"][-1]
        (words,) = re.findall(r"ray start ([^&]*)", command)
        flags = set(re.findall(r"--[a-z-]+", words))
        assert flags and flags <= taken, name


def test_ray_takes_the_parameters_of_the_ray_cluster():
    found = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    spec = next(one for one in found if one and one["kind"] == "RayCluster")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    taken = known()
    for group in groups:
        assert {f"--{name}" for name in group["rayStartParams"]} <= taken


def deployed_settings():
    found = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    (text,) = next(one for one in found if one and one["kind"] == "ConfigMap")["data"].values()
    return yaml.safe_load(text)


def test_the_settings_of_the_ray_cluster_serve_on_one(tmp_path):
    require_ray()
    require_redis()
    (tmp_path / "password").write_text("a secret\n")
    server = RedisServer(tmp_path, "a secret")
    settings = deployed_settings()
    place = settings["redis_url"].replace("aegaeon-redis:6379", f"127.0.0.1:{server.port}")
    model = make_checkpoint(tmp_path / "ada", "llama", seed=1)
    # What is of this machine and of a test is another here; all nodes have one address.
    del settings["port"]
    settings |= {"host": "127.0.0.1", "models_dir": str(tmp_path), "models": [f"ada={model}"]}
    settings |= {"redis_url": place.replace("/run/secrets/redis", str(tmp_path))}
    settings |= {"device": "null", "drain_s": 0.5}
    with ray_cluster({}) as cluster, (tmp_path / "log").open("w") as log:
        settings["cluster"]["address"] = cluster.address
        file = tmp_path / "server.yaml"
        file.write_text(yaml.safe_dump(settings))
        server.start(persistent=False)
        try:
            with running_server(["--config", str(file)], log) as url:
                asked = {"model": "ada", "prompt": "the device", "max_tokens": 3}
                answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=30.0)
                assert answer.json()["usage"]["completion_tokens"] == 3
                told = json.loads(run_cli("status", "--url", url, "--json").stdout)
                listening = [one["url"] for one in told["members"] if one["kind"] == "proxy"]
                assert len(listening) == 2  # the head and the node: the Service leads to the node
        finally:
            server.kill()
