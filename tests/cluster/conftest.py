"""What tests of several nodes share."""

from collections.abc import Iterator

import pytest

from tests.support.redis_server import RedisServer, require_redis


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start(persistent=False)
    yield server
    server.kill()
