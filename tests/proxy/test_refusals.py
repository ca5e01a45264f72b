"""Refusals for want of room, as clients see them."""

import pytest

from tests.proxy.test_gateway import generation
from tests.proxy.test_routes import CHAT, CHAT_PATH, ask, error_of, post
from tests.support.proxy_server import Proxy


def test_too_many_open_requests_are_a_429(tmp_path):
    proxy = Proxy(tmp_path, max_waiting=1)

    def wait():
        proxy.service.gateway.open(generation(), lambda: None)

    body = {"json": CHAT}
    (response,) = ask(proxy, ("POST", CHAT_PATH, body), before=wait)
    assert response.status_code == 429
    assert error_of(response)["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 120


def test_more_choices_than_there_are_places_are_a_400(tmp_path):
    proxy = Proxy(tmp_path, max_waiting=4)
    response = post(proxy, CHAT_PATH, {**CHAT, "n": 5})
    assert response.status_code == 400
    assert "send fewer at a time, or raise --max-waiting" in error_of(response)["message"]
    assert response.headers["x-should-retry"] == "false"
    assert post(proxy, CHAT_PATH, {**CHAT, "n": 4}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_that_have_begun_are_a_503_of_its_own(tmp_path, stream):
    proxy = Proxy(tmp_path, max_open=1)

    def begin():
        proxy.service.gateway.open(generation(), lambda: None).on_begun()

    body = {"json": {**CHAT, "stream": stream}}
    (response,) = ask(proxy, ("POST", CHAT_PATH, body), before=begin)
    assert response.status_code == 503
    assert error_of(response)["code"] == "overloaded"
    assert "--max-open" in error_of(response)["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 120
