"""The three stores behind one fixture: `domains()` opens another handle on one fresh domain."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aegaeon.store.base import Domain
from aegaeon.store.local import LocalDomain
from aegaeon.store.redis import RedisDomain
from aegaeon.store.shm import ShmDomain
from tests.support.redis_server import RedisServer, require_redis

OpenDomain = Callable[[], Domain]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def domain_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["local", "shm", "redis"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_domain(
    backend: str, domain_name: str, request: pytest.FixtureRequest
) -> Iterator[OpenDomain]:
    """Handles as separate processes would have; all are closed, and the domain removed, after."""
    first: Domain
    match backend:
        case "local":
            first = local = LocalDomain()
            make: OpenDomain = local.join
        case "shm":
            first = ShmDomain(domain_name)
            make = lambda: ShmDomain(domain_name)  # noqa: E731
        case _:
            url = request.getfixturevalue("redis_server").url
            first = RedisDomain(domain_name, url)
            make = lambda: RedisDomain(domain_name, url)  # noqa: E731
    opened = [first]

    def open_another() -> Domain:
        opened.append(make())
        return opened[-1]

    yield open_another
    for domain in opened[1:]:
        domain.close()
    first.unlink()
    first.close()
    assert not list(Path("/dev/shm").glob(f"aegaeon-{domain_name}.*"))


@pytest.fixture
def domain(open_domain: OpenDomain) -> Domain:
    return open_domain()
