"""What strangers can have the server hold is bounded before it knows who they are; raw sockets."""

import json
import socket
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as read_plain

from aegaeon.proxy.http_limits import HttpBounds
from tests.proxy.test_metrics import samples, value
from tests.support.fake_instance import wait_until
from tests.support.proxy_server import Proxy, listening

LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
HASTE = HttpBounds(head_s=0.3, message_s=0.6, stalled_s=0.5)
COMPLETION = json.dumps({"model": "m", "prompt": "x", "max_tokens": 80, "stream": True}).encode()


def post(body, length=None, extra=b""):
    """A completion with `body`, which may say that it is longer."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + extra + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


@contextmanager
def connected(url):
    with closing(socket.create_connection(("127.0.0.1", httpx.URL(url).port), 30)) as one:
        yield one


def all_from(one):
    """What comes until the server closes, however it does."""
    came = b""
    try:
        while more := one.recv(1 << 16):
            came += more
    except ConnectionError:
        pass
    return came


def until(one, mark):
    """What comes until `mark` has come."""
    came = b""
    while mark not in came:
        more = one.recv(1 << 16)
        assert more, came
        came += more
    return came


def said(url, sent):
    """All that the server says to `sent`; the last of it must have it close."""
    with connected(url) as one:
        with suppress(ConnectionError):
            one.sendall(sent)
        return all_from(one)


def assert_error(answer, status, code):
    """One answer in the shape of all errors, after which the connection is closed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("ascii").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert int(lines[0].split()[1]) == status, answer
    assert headers["x-request-id"].startswith("req_")
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


@pytest.mark.parametrize(
    "sent",
    [
        LIVE + b"X: " + b"a" * (4 << 20),
        LIVE + b"X: " + b"a" * (4 << 20) + b"\r\n\r\n",
        LIVE + b"A: b\r\n" * 200_000,
        b"GET /" + b"a" * (4 << 20),
        b"a" * (4 << 20),
    ],
    ids=["endless", "whole", "many", "path", "method"],
)
def test_a_head_without_end_is_refused_without_a_key(tmp_path, sent):
    with listening(Proxy(tmp_path)) as url:
        answer = said(url, sent)
        if not sent.startswith(b"a"):
            assert_error(answer, 431, "headers_too_large")
        else:
            assert_error(answer, 400, "invalid_http")
        assert httpx.get(f"{url}/health/live").is_success


def test_a_head_is_served_up_to_the_bound(tmp_path):
    with listening(Proxy(tmp_path)) as url:
        for size, status in ((1000, 200), (60_000, 200), (66_000, 431), (100_000, 431)):
            answer = httpx.get(f"{url}/health/live", headers={"x-long": "a" * size})
            assert answer.status_code == status


@pytest.mark.parametrize(
    "end", [b"0\r\nX: " + b"a" * (4 << 20), b"1;" + b"a" * (4 << 20)], ids=["trailer", "extension"]
)
def test_what_stands_around_chunks_is_bounded_too(tmp_path, end):
    proxy = Proxy(tmp_path)
    start = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with listening(proxy) as url:
        assert_error(said(url, start + b"2\r\n{}\r\n" + end), 431, "headers_too_large")


def test_a_body_far_beyond_the_bound_on_heads_is_served_in_one_or_in_chunks(tmp_path):
    body = json.dumps({**json.loads(COMPLETION), "stream": False, "x": "a" * 2_000_000}).encode()
    kind = {"content-type": "application/json"}
    with listening(Proxy(tmp_path)) as url:
        for content in (body, (body[at : at + 700] for at in range(0, len(body), 700))):
            answer = httpx.post(f"{url}/v1/completions", content=content, headers=kind, timeout=30)
            assert answer.is_success, answer.text


def test_connections_without_a_whole_head_are_closed(tmp_path):
    with listening(Proxy(tmp_path), HASTE) as url, ExitStack() as stack:
        idle, begun, blank = (stack.enter_context(connected(url)) for _ in range(3))
        begun.sendall(LIVE)
        blank.sendall(b"\r\n")
        assert all_from(idle) == b""
        assert_error(all_from(begun), 408, "request_timeout")
        all_from(blank)


def test_a_connection_that_has_been_answered_is_given_no_longer(tmp_path):
    with listening(Proxy(tmp_path), HASTE) as url, connected(url) as one:
        one.sendall(LIVE + b"\r\n")
        assert b"200 OK" in one.recv(1 << 16)
        one.sendall(b"\r\n")  # which has uvicorn's own timer stopped
        all_from(one)


def test_a_head_that_trickles_is_given_no_longer(tmp_path):
    with listening(Proxy(tmp_path), HASTE) as url, connected(url) as one:
        started_s = time.monotonic()
        with pytest.raises(OSError):
            for byte in LIVE + b"X: " + b"a" * 1000:
                one.sendall(bytes([byte]))
                time.sleep(0.01)
        assert time.monotonic() - started_s < 60


def test_who_is_answered_before_the_end_of_a_body_cannot_stay_for_it(tmp_path):
    with listening(Proxy(tmp_path), HASTE) as url, connected(url) as one:
        one.sendall(post(b"{", 1000).replace(b"application/json", b"text/plain"))
        assert b" 415 " in one.recv(1 << 16)
        one.sendall(b"x")
        all_from(one)


def test_an_answer_may_take_longer_than_heads_and_bodies(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy, HASTE) as url, connected(url) as one:
        proxy.instance.hold_after = 3
        one.sendall(post(COMPLETION))
        time.sleep(1.0)
        proxy.instance.release()
        assert b'"finish_reason":"stop"' in until(one, b"[DONE]")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\r\n\r\n",
        post(b"").replace(b": 0", b": abc"),
        post(b"0\r\n\r\n", extra=b"Transfer-Encoding: chunked\r\n"),
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post(b"zz\r\n").replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"),
    ],
    ids=["bytes", "length", "both", "path", "url", "chunk"],
)
def test_what_is_no_http_gets_an_error_like_any_other(tmp_path, sent):
    with listening(Proxy(tmp_path)) as url:
        assert_error(said(url, sent), 400, "invalid_http")


def test_garbage_behind_a_request_does_not_get_into_its_answer(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy) as url, connected(url) as one:
        proxy.instance.hold_after = 3
        one.sendall(post(COMPLETION))
        came = until(one, b"data: ")
        one.sendall(b"\x00\x00garbage\r\n\r\n")
        assert b"400 Bad" not in came + all_from(one)
        wait_until(lambda: proxy.instance.cancelled)


def test_requests_that_wait_for_no_answer_are_bounded(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy) as url:
        some = (LIVE + b"\r\n") * 10 + LIVE + b"Connection: close\r\n\r\n"
        assert said(url, some).count(b" 200 OK") == 11
        answer = said(url, (LIVE + b"\r\n") * 10_000)
        assert answer.count(b" 200 OK") <= HttpBounds().pipelined + 1


def test_an_upgrade_that_we_do_not_know_is_served_as_http(tmp_path):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with listening(Proxy(tmp_path)) as url, connected(url) as one:
        one.sendall(LIVE + upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert b" 200 OK" in one.recv(1 << 16)


def test_idle_connections_make_room_for_new_ones(tmp_path):
    with listening(Proxy(tmp_path), HttpBounds(connections=5)) as url, connected(url) as first:
        first.sendall(LIVE)
        others = [socket.create_connection(first.getpeername()) for _ in range(20)]
        assert httpx.get(f"{url}/health/live").is_success
        all_from(first)
        for one in others:
            one.close()


def test_connections_that_are_served_make_no_room(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy, HttpBounds(connections=2)) as url, ExitStack() as stack:
        proxy.instance.hold_after = 3
        streams = [stack.enter_context(connected(url)) for _ in range(2)]
        for stream in streams:
            stream.sendall(post(COMPLETION))
        wait_until(lambda: len(proxy.instance.submitted) == 2)
        assert_error(said(url, b""), 503, "overloaded")
        proxy.instance.release()
        for stream in streams:
            until(stream, b"[DONE]")


def test_a_client_that_closes_its_sending_side_has_gone(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy) as url, connected(url) as one:
        proxy.instance.hold_after = 3
        one.sendall(post(COMPLETION))
        wait_until(lambda: proxy.instance.submitted)
        one.shutdown(socket.SHUT_WR)
        all_from(one)
        wait_until(lambda: proxy.instance.cancelled)
        assert proxy.service.gateway.open_requests == 0


def stalled(proxy, url, wait_s):
    """What a client gets that does not read for `wait_s` while megabytes are sent to it."""
    proxy.answer = proxy.answer * 2000
    body = {**json.loads(COMPLETION), "max_tokens": 80_000, "logprobs": 5}
    with closing(socket.socket()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(30)
        one.connect(("127.0.0.1", httpx.URL(url).port))
        one.sendall(post(json.dumps(body).encode(), extra=b"Connection: close\r\n"))
        wait_until(lambda: proxy.instance.submitted)
        time.sleep(wait_s)
        return all_from(one)


def test_a_client_that_never_reads_is_given_up(tmp_path):
    proxy = Proxy(tmp_path, context_tokens=200_000)
    with listening(proxy, HttpBounds(stalled_s=0.3)) as url:
        assert b"[DONE]" not in stalled(proxy, url, wait_s=4.0)
        wait_until(lambda: proxy.service.gateway.open_requests == 0)


def dropped(proxy, why):
    """How often that was counted, as a scraper reads it."""
    text = proxy.service.metrics(is_openmetrics=False).decode()
    return value(samples(text, read_plain), "http_dropped_total", reason=why)


def test_what_is_refused_below_the_routes_is_counted_by_why(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy, HttpBounds(connections=6, head_s=0.3, message_s=0.6)) as url:
        said(url, LIVE + b"X: " + b"a" * (4 << 20))
        for _ in range(2):
            said(url, b"nonsense\r\n\r\n")
        with connected(url) as begun, connected(url) as open_ended:
            begun.sendall(LIVE)
            open_ended.sendall(post(COMPLETION, length=5000))
            all_from(begun)
            all_from(open_ended)
        counts = {"headers_too_large": 1, "invalid_http": 2, "request_timeout": 2}
        assert {why: dropped(proxy, why) for why in counts} == counts


def test_connections_that_make_room_or_find_none_are_counted(tmp_path):
    proxy = Proxy(tmp_path)
    with listening(proxy, HttpBounds(connections=2)) as url, ExitStack() as stack:
        proxy.instance.hold_after = 3
        idle = stack.enter_context(connected(url))
        wait_until(lambda: len(proxy.server.server_state.connections) == 1)
        for count in (1, 2):
            stack.enter_context(connected(url)).sendall(post(COMPLETION))
            wait_until(lambda count=count: len(proxy.instance.submitted) == count)
        all_from(idle)
        said(url, b"")
        assert (dropped(proxy, "displaced"), dropped(proxy, "overloaded")) == (1, 1)


def test_a_client_that_never_reads_is_counted(tmp_path):
    proxy = Proxy(tmp_path, context_tokens=200_000)
    with listening(proxy, HttpBounds(stalled_s=0.3)) as url:
        stalled(proxy, url, wait_s=4.0)
        wait_until(lambda: proxy.service.gateway.open_requests == 0)
        assert dropped(proxy, "client_stalled") == 1
