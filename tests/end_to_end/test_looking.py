"""Lists, health, metrics and status load nothing, wake nothing and change no order."""

import httpx

from tests.support.polling import eventually
from tests.support.server import Server

ROUTES = (
    *("/metrics", "/v1/models", "/v1/models/ada", "/health", "/health/live", "/health/ready"),
    *("/admin/status", "/admin/decisions"),
)


def look(server, times=20):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for _ in range(times):
            for route in ROUTES:
                assert client.get(route).status_code == 200, route


def state(server):
    (row,) = server._rows()
    status = row.status
    return (status.resident, status.current, status.loading, status.switches, status.compute_s)


def test_looking_at_a_server_that_has_not_been_asked_loads_nothing(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints) as server:
        look(server)
        assert state(server) == ((), None, None, 0, 0.0)
        assert server.cached() == set()


def test_looking_leaves_models_where_they_are_in_the_order_of_their_use(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints) as server:
        for model in ("bob", "cleo", "ada"):
            assert server.ask(model).status_code == 200
        eventually(lambda: server.requests() == 0)
        eventually(lambda: len(server.resident()) == 3)
        before = state(server)
        look(server)
        assert state(server) == before and before[0] == ("bob", "cleo", "ada")
        with httpx.Client(base_url=server.url, timeout=20) as client:
            eventually(lambda: 'tier="host"} 1' in client.get("/metrics").text, within_s=20)
            (instance,) = client.get("/admin/status").json()["instances"]
        assert instance["switches"] == 3 and instance["state"] == "ready"
