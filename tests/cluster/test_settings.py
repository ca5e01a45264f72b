"""What a cluster asks for, said before anything is started, in words that help."""

import sys

import pytest

from aegaeon.cli import main
from aegaeon.cluster.link import ray_module
from aegaeon.cluster.serve import check, check_addresses
from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.nodes import NodeNow

NODES = (NodeNow(id="a", address="10.0.0.1"), NodeNow(id="b", address="10.0.0.2"))


def clustered(**changes) -> Settings:
    return Settings(**{"cluster": "auto", "metadata_backend": "redis", **changes})


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'aegaeon\[ray\]'"):
        ray_module()


def test_a_table_in_shared_memory_is_refused(capsys):
    with pytest.raises(ConfigError, match="--metadata-backend redis"):
        check(clustered(metadata_backend="shared_memory"))
    assert main(["serve", "--cluster", "auto", "--device", "null"]) == 2
    assert "--metadata-backend redis" in capsys.readouterr().err
    check(clustered())


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:6379/0", "redis://localhost", "unix:///run/redis.sock"]
)
def test_a_redis_that_only_this_machine_reaches_is_refused(url):
    settings = clustered(redis_url=url)
    with pytest.raises(ConfigError, match="address that all of them reach"):
        check_addresses(settings, NODES)
    check_addresses(settings, NODES[:1])
    check_addresses(clustered(redis_url="rediss://user:secret@10.0.0.9:6380/0"), NODES)


def test_a_domain_must_leave_room_for_a_nodes_name():
    with pytest.raises(ConfigError, match="80 characters"):
        check(clustered(domain="d" * 81))
