"""What deploy/ asks of `ray start` is what this Ray takes."""

import re
from pathlib import Path

import yaml

from tests.support.ray_cluster import require_ray

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
