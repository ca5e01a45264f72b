"""Streams past the interpreter: the same bytes as through it, whatever comes and whoever reads."""

import json
import random
import re
import socket
import time
from contextlib import closing

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from aegaeon.measures import Waited
from aegaeon.proxy import streams
from aegaeon.proxy.http_limits import wire_of
from aegaeon.proxy.lane import Lane
from aegaeon.types import TokenEvent
from tests.support.fake_instance import wait_until
from tests.support.proxy_server import Proxy, listening

HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
END = b"0\r\n\r\n"
HELLO = [{"role": "user", "content": "hello"}]
PATHS = ("/v1/chat/completions", "/v1/completions")
USAGE = {"include_usage": True, "continuous_usage_stats": True}


class Talk:
    """One streamed answer: its events are said one by one, its bytes read as they are."""

    def __init__(self, proxy, address, **body):
        self.proxy = proxy
        path = PATHS["prompt" in body]
        content = json.dumps({"model": "m", "stream": True, "max_tokens": 200, **body}).encode()
        host, _, port = address.removeprefix("http://").partition(":")
        self.client = socket.create_connection((host, int(port)), timeout=20)
        head = f"{HEAD.format(path)}Content-Length: {len(content)}\r\n\r\n"
        self.client.sendall(head.encode() + content)
        wait_until(lambda: proxy.instance.submitted)
        self.request = proxy.instance.submitted[-1]
        (self.opened,) = proxy.service.gateway._open.values()
        self.position = 0

    def say(self, *token_ids, finish_reason=None, **fields):
        """Tell of tokens, and wait until they are taken in."""
        self.tell(*token_ids, finish_reason=finish_reason, **fields)
        wait_until(lambda: self.opened.made == self.position)

    def tell(self, *token_ids, **fields):
        event = TokenEvent(
            self.request.id, self.request.attempt, self.position, token_ids, "instance-0", **fields
        )
        self.position += len(token_ids)
        self.proxy.instance.say(self.request, event)

    def again(self, *token_ids, **fields):
        """Tell of tokens that nobody is to hear of."""
        place = {"attempt": self.request.attempt, "position": 0, **fields}
        event = TokenEvent(
            self.request.id, place["attempt"], place["position"], token_ids, "instance-0"
        )
        self.proxy.instance.say(self.request, event)

    def answer(self):
        """Return all that has come, up to the end of the body."""
        received = b""
        while not received.endswith(END):
            part = self.client.recv(1 << 16)
            assert part, received[-300:]
            received += part
        return received


@pytest.fixture
def lent(monkeypatch):
    """The tokens that went past the interpreter, in a list that grows."""
    taken = []
    absorb = Lane.absorb

    def noted(lane, token_ids, *rest):
        taken.extend(token_ids)
        absorb(lane, token_ids, *rest)

    monkeypatch.setattr(Lane, "absorb", noted)
    return taken


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


@pytest.fixture
def address(proxy):
    with listening(proxy) as address:
        proxy.instance.reply = lambda _: ()  # nothing by itself
        yield address


def plain(answer):
    """The answer without what differs from request to request."""
    answer = re.sub(rb"((?:chatcmpl|cmpl|req)[-_])[0-9a-f]{24}", rb"\1", answer)
    return re.sub(rb'(date: [^\r]*|"created":\d+)', b"", answer)


def text_of(answer):
    frames = [json.loads(found) for found in re.findall(rb"data: ({.*})\n\n", answer)]
    choices = [choice for frame in frames for choice in frame["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@pytest.mark.parametrize("options", [{}, {"stream_options": USAGE}])
@pytest.mark.parametrize("prompt", [{"prompt": "x"}, {"messages": HELLO}])
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_send_the_same_bytes(proxy, address, lent, prompt, options, seed):
    answers = []
    for way in (None, list):
        if way is not None:
            proxy.service.gateway._receiver._first = way
            lent.clear()
        answers.append(plain(story(proxy, address, seed, **prompt, **options)))
        if way is None:
            assert len(lent) > 15
    assert not lent
    assert answers[0] == answers[1]


def story(proxy, address, seed, **body):
    """Tell random tokens, torn characters and control signs among them, with all that may come
    between them; return what the client gets."""
    source = random.Random(seed)
    ids = [source.randrange(-1, 384) for _ in range(60)]
    ids = [one if one >= 0 else source.choice(proxy.text.stop_token_ids) for one in ids]
    proxy.instance.submitted.clear()
    talk = Talk(proxy, address, **body)
    with closing(talk.client):
        while ids:
            count = source.choice((1, 1, 1, 2, 3))
            given, ids = ids[:count], ids[count:]
            match source.randrange(8):
                case 0:
                    talk.say(*given, waited=Waited(switch_s=0.5, switches=talk.position))
                case 1:
                    talk.again(*given)  # the first tokens came twice
                    talk.say(*given)
                case 2:
                    talk.again(*given, attempt=7, position=talk.position)
                    talk.say(*given)
                case _:
                    talk.say(*given)
        talk.say(65, finish_reason="length")
        return talk.answer()


@pytest.mark.thorough
def test_a_client_that_does_not_read_gets_all_of_it_later(proxy, address, lent):
    talk = Talk(proxy, address, prompt="x", stream_options=USAGE)
    talk.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    source, ids = random.Random(1), []
    with closing(talk.client):
        for _ in range(12_000):
            given = [source.randrange(97, 120) for _ in range(source.choice((1, 2)))]
            ids += given
            talk.tell(*given)
            if len(ids) % 64 == 0:
                wait_until(lambda: talk.opened.made == talk.position)
        taken = len(lent)
        assert 0 < taken < len(ids)  # the connection was full
        talk.tell(98, finish_reason="length")
        answer = talk.answer()
    assert text_of(answer) == proxy.text.decode((*ids, 98))


def test_a_client_that_leaves_has_its_request_cancelled(proxy, address, lent):
    talk = Talk(proxy, address, prompt="x")
    for token in range(97, 105):
        talk.say(token)
    assert lent
    talk.client.close()
    for token in range(97, 120):
        talk.tell(token)
        time.sleep(0.002)
    wait_until(lambda: talk.request.id in proxy.instance.cancelled)
    assert proxy.service.gateway.open_requests == 0


def test_what_is_lost_behind_lent_tokens_goes_on_elsewhere(proxy, address, lent):
    talk = Talk(proxy, address, prompt="x")
    ids = tuple(range(97, 105))
    with closing(talk.client):
        for token in ids:
            talk.say(token)
        assert lent
        talk.position += 1  # a record was lost
        talk.tell(120)
        wait_until(lambda: len(proxy.instance.submitted) == 2)
        again = talk.request = proxy.instance.submitted[-1]
        assert (again.generated_token_ids, again.attempt) == (ids, 1)
        talk.position = len(ids)
        for token in ids:
            talk.say(token)
        talk.say(98, finish_reason="length")
        assert text_of(talk.answer()) == proxy.text.decode((*ids, *ids, 98))


def test_what_was_waited_for_is_told_at_the_end(proxy, address, lent):
    talk = Talk(proxy, address, prompt="x")
    with closing(talk.client):
        for token in range(97, 107):
            talk.say(token)
        taken = len(lent)
        talk.say(107, waited=Waited(switch_s=0.25, switches=3))
        assert lent[taken:] == [107]
        talk.say(98, finish_reason="length")
        assert b'"switch_ms":250.0,"switches":3' in talk.answer()


def test_silence_is_filled_and_lent_tokens_are_none(proxy, address, lent, monkeypatch):
    monkeypatch.setattr(streams, "PING_S", 0.5)
    talk = Talk(proxy, address, prompt="x")
    with closing(talk.client):
        talk.say(97)
        talk.say(97)
        time.sleep(0.7)
        for token in range(97, 107):
            talk.say(token)
            time.sleep(0.1)
        time.sleep(0.7)
        talk.say(98, finish_reason="length")
        bodies = re.split(rb"\r\n[0-9a-f]+\r\n", talk.answer())
    assert lent[-10:] == [*range(97, 107)]
    first, second = [at for at, body in enumerate(bodies) if body == b": ping\n\n"]
    assert second - first == 11  # the ten tokens are all there is between them


def test_figures_count_lent_tokens(proxy, address, lent):
    talk = Talk(proxy, address, prompt="x")
    with closing(talk.client):
        for token in range(97, 117):
            talk.say(token)
        talk.say(98, finish_reason="length")
        talk.answer()
    assert len(lent) > 15
    figures = proxy.service.gateway.meter.sums().models["m"]
    assert (figures.generated_tokens, figures.tbt.count, figures.tokens_in_time) == (21, 20, 21)


@pytest.mark.parametrize("body", [{"stop": "zzz"}, {"n": 2}, {"logprobs": 1}, {"echo": True}])
def test_other_answers_go_through_python(proxy, address, lent, body):
    proxy.instance.reply = lambda _: (97, 98, 99, 100)
    talk_body = {"prompt": "x", "max_tokens": 4, **body}
    content = json.dumps({"model": "m", "stream": True, **talk_body}).encode()
    host, _, port = address.removeprefix("http://").partition(":")
    with closing(socket.create_connection((host, int(port)), timeout=20)) as client:
        head = f"{HEAD.format(PATHS[1])}Content-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        received = b""
        while not received.endswith(END):
            received += client.recv(1 << 16)
    assert proxy.text.decode((97, 98)) in text_of(received)
    if "echo" not in body:
        assert not lent


class Connection:
    """A transport by what it tells of itself."""

    def __init__(self, **extra):
        self._extra = extra

    def get_extra_info(self, name):
        return self._extra.get(name)


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"chunked_encoding": False}, {}),
        ({"disconnected": True}, {}),
        ({"scope": {"method": "HEAD"}}, {}),
        ({}, {"sslcontext": object()}),
        ({}, {"socket": None}),
    ],
)
def test_where_more_is_done_to_chunks_there_is_no_way_past_it(changes, extra):
    with socket.socket() as peer:
        cycle = object.__new__(RequestResponseCycle)
        vars(cycle).update(chunked_encoding=True, disconnected=False, scope={"method": "POST"})
        cycle.transport = Connection(socket=peer)
        assert wire_of(cycle.send) == (cycle.transport, peer.fileno())
        vars(cycle).update(changes, transport=Connection(**{"socket": peer, **extra}))
        assert wire_of(cycle.send) is None
        assert wire_of(peer.send) is None
