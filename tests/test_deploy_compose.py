"""deploy/compose.yaml is as the Compose Specification's schema says, and names what there is; Redis
starts as it and the manifests for Kubernetes say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import redis
import yaml

from aegaeon.cli import serve_parser
from aegaeon.cluster.serve import check
from aegaeon.config import load_settings
from aegaeon.ports import free_port
from aegaeon.store.redis_url import read_place
from tests.support.polling import eventually

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCHEMA = ROOT / "tests" / "deploy_schemas" / "compose.json"


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_compose_file_is_as_its_schema_says():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert [fault.message for fault in validator.iter_errors(compose())] == []
    for change in ({"image": 3}, {"port": ["8080:8080"]}, {"depends_on": {"redis": {}}}):
        wrong = compose()
        wrong["services"]["server"].update(change)
        assert list(validator.iter_errors(wrong)), change


def test_the_compose_file_names_what_there_is(tmp_path):
    file = compose()
    known = set(re.findall(r"--[a-z-]+", serve_parser("serve").format_help()))
    for name, service in file["services"].items():
        for setting in service.get("environment", ()):
            flag = "--" + setting.removeprefix("AEGAEON_").lower().replace("_", "-")
            assert flag in known, (name, setting)
        if "build" in service:
            build = service["build"]
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert {mount.partition(":")[0] for mount in service["volumes"]} <= file["volumes"].keys()
        assert set(service.get("secrets", ())) <= file["secrets"].keys()
        assert set(service.get("depends_on", ())) <= file["services"].keys()
    (words,) = re.findall(r"aegaeon serve (.*)$", file["services"]["head"]["entrypoint"][-1], re.M)
    assert set(re.findall(r"--[a-z-]+", words)) <= known
    asked = {**file["services"]["head"]["environment"], "AEGAEON_CLUSTER": "auto"}
    settings = load_settings({}, {**asked, "AEGAEON_MODELS": "m"})
    check(settings)
    (tmp_path / "redis_password").write_text("secret")
    place = read_place(settings.redis_url.replace("/run/secrets", str(tmp_path)))
    assert place.servers == (("redis", 6379),)


def test_containers_are_given_time_to_drain():
    for name in ("server", "head", "node"):
        grace = compose()["services"][name]["stop_grace_period"]
        assert int(grace.removesuffix("s")) > 2 * load_settings({}, {}).drain_s


# Redis


def shell_of(where):
    """The command that starts Redis, the file with its password, and the command that asks it."""
    if where == "compose":
        service = compose()["services"]["redis"]
        text, probe = service["entrypoint"][-1], service["healthcheck"]["test"][-1]
        return text.replace("$$", "$"), "/run/secrets/redis_password", probe.replace("$$", "$")
    found = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    (one,) = next(one for one in found if one and one["kind"] == "StatefulSet")["spec"]["template"][
        "spec"
    ]["containers"]
    probe = one["readinessProbe"]["exec"]["command"][-1]
    return one["command"][-1], "/run/secrets/redis/password", probe


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
@pytest.mark.parametrize("where", ["compose", "kuberay"])
def test_redis_starts_by_its_command_and_asks_for_the_password(where, tmp_path):
    command, secret, probe = shell_of(where)
    password, port = "a word of 'many' letters", free_port("127.0.0.1")
    file = tmp_path / "password"
    file.write_text(password)

    def here(text):
        changes = {secret: str(file), "--dir /data": f"--dir {tmp_path}", "6379": str(port)}
        for old, new in changes.items():
            text = text.replace(old, new)
        return ["sh", "-ec", text]

    server = subprocess.Popen(here(command), stdout=subprocess.DEVNULL)
    try:
        eventually(
            lambda: subprocess.run(here(probe), capture_output=True, check=False).returncode == 0
        )
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        with redis.Redis(port=port, password=password) as client:
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert client.config_get("appendonly")["appendonly"] == "yes"
        with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    finally:
        server.terminate()  # the shell has become the server: it hears this
        assert server.wait(20) == 0
