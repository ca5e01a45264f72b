"""The relay of streams: text as Python decodes it, damaged records, sockets in trouble."""

import codecs
import contextlib
import random
import socket
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.explanations import Explained
from aegaeon.measures import Waited
from aegaeon.store.codec import decode_replies, decode_waited, encode, joined
from aegaeon.types import Moved, RequestFailed, TokenEvent


class Transport:
    """The half of a connection that the relay is told of."""

    def __init__(self):
        self.end, self.peer = socket.socketpair()
        self.is_closed, self.held, self.written = False, 0, b""
        self.error = None

    def is_closing(self):
        return self.is_closed

    def get_write_buffer_size(self):
        return self.held

    def write(self, data):
        if self.error is not None:
            raise self.error
        self.written += data

    def chunks(self):
        """Return the bodies of the chunks that have been sent."""
        self.peer.setblocking(False)
        received = b""
        while True:
            try:
                received += self.peer.recv(1 << 16)
            except BlockingIOError:
                break
        found = []
        while received:
            size, _, received = received.partition(b"\r\n")
            length = int(size, 16)
            assert received[length : length + 2] == b"\r\n"
            found.append(received[:length])
            received = received[length + 2 :]
        return found


class Stream:
    """A stream `name` of the vocabulary in which token n is `tokens[n]`, lent at once."""

    def __init__(self, tokens, relay=None, name="r", parts=(b"<", b">"), hears_waits=False):
        self.relay = relay or _native.StreamRelay()
        self.transport = Transport()
        self.taken, self.errors = [], []
        vocabulary = _native.TokenVocabulary(lambda token_id: tokens[token_id])
        wire = self.transport, self.transport.end.fileno()
        self.line = _native.StreamLine(
            vocabulary, self, wire, (name, "i"), (list(parts), 5), hears_waits
        )
        self.relay.lend(self.line, 0, 1, 1, b"")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.transport.end.close()
        self.transport.peer.close()

    def absorb(self, token_ids, received_s, is_sent, waited):
        self.waited = waited
        self.taken.append((list(token_ids), received_s, is_sent))

    def fail(self, error):
        self.errors.append(error)


@pytest.fixture
def lend():
    """Makes streams, whose sockets are closed at the end."""
    with contextlib.ExitStack() as ends:

        def made(*given, **named):
            return ends.enter_context(Stream(*given, **named))

        yield made


def event(position, *token_ids, name="r", attempt=0, instance="i", **fields):
    return TokenEvent(name, attempt, position, token_ids, instance, **fields)


def take(relay, *events, at_s=2.0):
    """Give the relay a record of `events`; return those that it hands back."""
    rest = relay.take([(joined([encode(one) for one in events]), at_s)])
    assert all(received_s == at_s for _, received_s in rest)
    return [reply for record, _ in rest for reply in decode_replies(record)]


def texts(chunks):
    assert all(chunk[:1] == b"<" and chunk[-1:] == b">" for chunk in chunks)
    return [chunk[1:-1] for chunk in chunks]


def test_each_character_is_escaped_as_elsewhere(lend):
    characters = [chr(code) for code in (*range(0x300), 0x4E16, 0x2028, 0xFFFD, 0x1F642, 0x10FFFF)]
    stream = lend([one.encode() for one in characters])
    for position, one in enumerate(characters):
        assert take(stream.relay, event(1 + position, position)) == []
        assert texts(stream.transport.chunks()) == [msgspec.json.encode(one)]


@pytest.mark.parametrize("seed", range(20))
def test_torn_and_broken_characters_are_as_python_decodes_them(lend, seed):
    source = random.Random(seed)
    alphabet = 'aé世🙂\x00"'.encode() + bytes([0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xC0, 0x80, 0xBF])
    tokens = [bytes(source.choices(alphabet, k=source.randrange(4))) for _ in range(200)]
    stream, decoder = lend(tokens), codecs.getincrementaldecoder("utf-8")("replace")
    for position, token in enumerate(tokens):
        assert take(stream.relay, event(1 + position, position)) == []
        text = decoder.decode(token)
        wanted = [msgspec.json.encode(text)] if text else []
        assert texts(stream.transport.chunks()) == wanted
        assert stream.taken[-1] == ([position], 2.0, bool(text))
    assert stream.relay.recall(stream.line) == decoder.getstate()[0]


def test_a_line_goes_on_behind_what_was_torn(lend):
    stream = lend([b"\x96\x8c", b"x"])
    stream.relay.lend(stream.line, 0, 1, 1, "世".encode()[:1])
    assert take(stream.relay, event(1, 0)) == []
    assert texts(stream.transport.chunks()) == ['"䖌"'.encode()]


def test_numbers_count_the_tokens(lend):
    stream = lend([b"a", b""], parts=(b"<", b",", b"/", b">"))
    stream.relay.lend(stream.line, 0, 1, 98, b"")
    assert take(stream.relay, event(1, 0), event(2, 1), event(3, 1, 0)) == []
    assert stream.transport.chunks() == [b'<"aa",102/107>']
    assert [ids for ids, _, _ in stream.taken] == [[0], [1], [1, 0]]
    wire, vocabulary = (stream.transport, 0), _native.TokenVocabulary(bytes)
    with pytest.raises(ValueError, match="2 or 4 parts, not 3"):
        _native.StreamLine(vocabulary, stream, wire, ("r", "i"), ([b"", b"", b""], 5), False)


OTHERS = [
    event(1, 0, attempt=1),
    event(0, 0),
    event(2, 0),
    event(1, 0, instance="j"),
    event(1, 0, finish_reason="length"),
    event(1, 0, waited=Waited()),
    event(1),
    event(1, 1 << 31),
    Moved("r", 0, "i", 1),
    RequestFailed("r", 0, "code", "message", "i"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_the_next_tokens_is_handed_back_with_all_behind_it(lend, other):
    stream = lend([b"a"])
    beside = lend([b"b"], stream.relay, "s")
    explained = Explained(1, "i", ())
    told = [event(1, 0, name="s"), other, event(1, 0), explained, event(2, 0, name="s")]
    assert take(stream.relay, *told) == [other, event(1, 0), explained]
    assert stream.taken == [] and stream.transport.chunks() == []
    assert texts(beside.transport.chunks()) == [b'"bb"']
    stream.relay.lend(stream.line, 0, 1, 1, b"")
    assert take(stream.relay, event(1, 0)) == []


def test_waits_are_told_to_who_hears_them(lend):
    stream, waited = lend([b"a"], hears_waits=True), Waited(1.5, 0.25, 300, 0.0, 2.0)
    assert take(stream.relay, event(1, 0, waited=waited)) == []
    assert decode_waited(stream.waited) == waited
    assert take(stream.relay, event(2, 0)) == []
    assert stream.waited == b""


def test_what_came_before_it_is_sent_first(lend):
    stream = lend([b"a"])
    last = event(2, 0, finish_reason="length")
    assert take(stream.relay, event(1, 0), last) == [last]
    assert (texts(stream.transport.chunks()), stream.taken) == ([b'"a"'], [([0], 2.0, True)])


def test_a_transport_that_holds_bytes_or_closes_is_left_alone(lend):
    for change in ({"held": 1}, {"is_closed": True}):
        stream = lend([b"a"])
        vars(stream.transport).update(change)
        assert take(stream.relay, event(1, 0)) == [event(1, 0)]
        assert (stream.transport.chunks(), stream.transport.written) == ([], b"")


def test_what_the_socket_does_not_take_is_the_transports(lend):
    stream = lend([b"a" * (1 << 20)])
    assert take(stream.relay, event(1, 0)) == []
    received = []

    def read():
        while sum(map(len, received)) < (1 << 20) + 14 - len(stream.transport.written):
            received.append(stream.transport.peer.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(10)
    assert 0 < len(stream.transport.written) < 1 << 20
    whole = b"".join(received) + stream.transport.written
    assert whole == b'100004\r\n<"' + b"a" * (1 << 20) + b'">\r\n'


def test_a_broken_socket_is_the_transports_to_find(lend):
    stream = lend([b"a"])
    stream.transport.peer.close()
    assert take(stream.relay, event(1, 0)) == []
    assert stream.transport.written == b'5\r\n<"a">\r\n'


def test_a_fault_is_that_of_its_stream_alone(lend):
    relay = _native.StreamRelay()
    silent, loud = lend([], relay, "silent"), lend([b"a"], relay, "loud")
    unread = lend([b"a" * (1 << 22)], relay, "unread")
    error = unread.transport.error = OSError("no room")
    told = [event(1, 0, name=name) for name in ("silent", "loud", "unread")]
    assert take(relay, *told) == told[:1]  # no such token: who takes it says so
    assert (silent.taken, silent.errors, len(loud.taken)) == ([], [], 1)
    assert unread.errors == [error]
    assert take(relay, event(2, 0, name="unread")) == [event(2, 0, name="unread")]


def test_a_line_that_was_let_go_is_lent_no_more(lend):
    stream = lend([b"a"])
    assert stream.relay.recall(stream.line) == b""
    stream.line.close()
    assert take(stream.relay, event(1, 0)) == [event(1, 0)]


RECORD = joined([encode(event(n, 0)) for n in (1, 2, 3)])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(RECORD)), st.binary(max_size=6)), max_size=4))
def test_damaged_records_are_taken_or_handed_back(changes):
    record = bytearray(RECORD)
    for at, put in changes:
        record[at : at + len(put)] = put
    with Stream([b"a"]) as stream:
        rest = stream.relay.take([(bytes(record), 2.0)])
        taken = sum(len(ids) for ids, _, _ in stream.taken)
        assert taken <= 3 and len(rest) <= 1
        assert taken == 3 or rest
        assert sum(map(len, texts(stream.transport.chunks()))) == (taken and taken + 2)
