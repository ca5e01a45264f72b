"""The load generator against a server that answers as it is told, and its loads and rows."""

import asyncio
import itertools
import json
import statistics
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from aegaeon.errors import ConfigError
from aegaeon.metrics import Served, Target
from aegaeon.sim.workloads import Arrival
from benchmark import serve
from benchmark.open_loop import Punctuality, send_on_time
from benchmark.serve_load import Ask, loads_of, prompt_of, renamed, renewal_of
from benchmark.serve_rows import Run, rows_of, served_of
from benchmark.stream_client import Exchange, StreamClient, StreamError

HEADERS = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = "data: [DONE]\n\n"


def text_frame(text, finish=None, **more):
    choice = {"text": text, "index": 0, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'cmpl-1', 'choices': [choice], **more})}\n\n"


def usage(made):
    return {"prompt_tokens": 5, "completion_tokens": made, "total_tokens": 5 + made}


@asynccontextmanager
async def serving(answer, **options):
    """A server whose `answer(number, body, writer)` writes the response to request `number`."""
    numbers = itertools.count()
    heads = []

    async def serve_one(reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                heads.append(head.decode())
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                await answer(next(numbers), body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with StreamClient(f"http://127.0.0.1:{port}/v1", "secret", **options) as client:
            yield client, heads


def part(text):
    data = text.encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def exchanges_of(count, due_s=0.0):
    return [Exchange("/v1/completions", b"{}", due_s) for _ in range(count)]


def ask(answer, count=1, patience_s=10.0, **options):
    async def run():
        async with serving(answer, **options) as (client, heads):
            exchanges = exchanges_of(count)
            punctuality = await send_on_time(client, exchanges, patience_s)
            return exchanges, punctuality, heads

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_what_is_read_at_the_end_was_stamped_when_it_came():
    async def answer(number, _, writer):
        writer.write(HEADERS.encode())
        for made in (1, 2):
            writer.write(part(text_frame("a", usage=usage(made))))
            await asyncio.sleep(0.1)
        frames = [text_frame("", "length", usage=usage(2)), DONE]
        whole = b"".join(map(part, frames)) + b"0\r\n\r\n"
        for torn in (whole[:-3], whole[-3:]):
            writer.write(torn)
            await asyncio.sleep(0.01)

    exchanges, _, _ = ask(answer, count=2, reads_at_end=True)
    for exchange in exchanges:
        assert exchange.error is None
        first_s, second_s = exchange.token_times_s
        assert 0.05 < second_s - first_s < 5


def test_tokens_are_counted_by_the_servers_usage_and_else_by_frames():
    async def answer(number, _, writer):
        frames = [text_frame("a"), text_frame(""), text_frame("b"), text_frame("c", "length")]
        if number == 1:
            frames = [text_frame("ab", usage=usage(2)), text_frame("c", "stop", usage=usage(3))]
        whole = HEADERS.encode() + b"".join(map(part, [*frames, DONE])) + b"0\r\n\r\n"
        # Torn anywhere, also inside a line.
        for at in range(0, len(whole), 37):
            writer.write(whole[at : at + 37])
            await asyncio.sleep(0)

    for number in (1, 2):
        exchanges, punctuality, heads = ask(answer, number)
        assert [one.error for one in exchanges] == [None] * number
        assert [len(one.token_times_s) for one in exchanges] == [3] * number
        assert all(one.id == "cmpl-1" and one.finish_reason for one in exchanges)
        assert punctuality.tokens == 3 * number
    assert sorted(one.prompt_tokens for one in exchanges) == [0, 5]
    assert heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "authorization: Bearer secret\r\n" in heads[0]


def test_every_way_to_fail_is_told_apart():
    async def answer(number, _, writer):
        body = json.dumps({"error": {"message": "no", "type": "x", "code": "queue_full"}})
        match number:
            case 0:
                head = f"HTTP/1.1 429 No\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write((head + body).encode())
            case 1:
                frames = [text_frame("a"), 'data: {"error": {"code": "timeout"}}\n\n', DONE]
                writer.write(HEADERS.encode() + b"".join(map(part, frames)) + b"0\r\n\r\n")
            case 2:
                writer.write(HEADERS.encode() + part(text_frame("a")))
                writer.close()
            case 3:
                writer.write(HEADERS.encode() + part("data: {nonsense\n\n"))
            case 4:
                writer.write(HEADERS.encode() + part(text_frame("a")))
            case 5:
                writer.close()

    async def run():
        async with serving(answer) as (client, _):
            found = []
            for _ in range(6):
                (exchange,) = exchanges_of(1)
                await send_on_time(client, [exchange], 0.3)
                found.append(exchange.error)
            return found

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [
        "429 queue_full",
        "stream timeout",
        "incomplete",
        "unreadable",
        "timeout",
        "connection",
    ]


def test_a_connection_is_used_again_for_the_next_request_and_each_has_its_own_answer():
    ports = []

    async def answer(number, _, writer):
        ports.append(writer.get_extra_info("peername")[1])
        frames = [text_frame("a", "length", usage=usage(number + 1)), DONE]
        writer.write(HEADERS.encode() + b"".join(map(part, frames)) + b"0\r\n\r\n")

    async def run():
        async with serving(answer) as (client, _):
            made = []

            async def one_after_another():
                for _ in range(5):
                    (exchange,) = exchanges_of(1)
                    # The next one begins on the connection before this one's task goes on.
                    await client.ask(exchange)
                    made.append((exchange.error, len(exchange.token_times_s)))

            await asyncio.gather(*(one_after_another() for _ in range(3)))
            return made

    made = asyncio.run(asyncio.wait_for(run(), 30))
    assert [error for error, _ in made] == [None] * 15
    assert sorted(tokens for _, tokens in made) == list(range(1, 16))
    assert len(set(ports)) == 3


def test_requests_leave_when_they_are_due_whatever_the_server_does():
    came_s = []

    async def answer(*_):
        came_s.append(asyncio.get_running_loop().time())

    async def run():
        async with serving(answer) as (client, _):
            exchanges = [Exchange("/v1/completions", b"{}", 0.1 * n) for n in (2, 0, 1)]
            await send_on_time(client, exchanges, 0.2)
            return exchanges

    exchanges = asyncio.run(asyncio.wait_for(run(), 30))
    assert [one.error for one in exchanges] == ["timeout"] * 3
    assert len(came_s) == 3 and came_s[-1] - came_s[0] >= 0.15
    assert all(one.begun_s >= one.due_s for one in exchanges)


def test_a_bad_address_is_refused():
    for url in ("localhost:80", "ftp://host", "http://", "http://host:port"):
        with pytest.raises(StreamError, match="address"):
            StreamClient(url)


@pytest.mark.parametrize("cv", [0.0, 0.5, 3.0])
def test_distances_have_the_mean_and_the_variation_that_were_asked_for(cv):
    load = renewal_of({"a": 30.0, "b": 10.0}, 500.0, [(4, 5)], cv, seed=1)
    gaps = [later.at_s - one.at_s for one, later in itertools.pairwise(load)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 40, rel=0.1)
    assert statistics.pstdev(gaps) / mean == pytest.approx(cv, rel=0.15, abs=1e-9)
    counts = Counter(one.model for one in load)
    assert counts["a"] / counts["b"] == pytest.approx(3, rel=0.1)
    assert load == renewal_of({"a": 30.0, "b": 10.0}, 500.0, [(4, 5)], cv, seed=1)


def test_the_flags_name_a_load(tmp_path):
    parser = serve.make_parser()
    asked = ["--rate", "5,10", "--horizon-s", "100", "--zipf", "1", "--seed", "3"]
    loads = loads_of(parser.parse_args(asked), ["a", "b"])
    assert list(loads) == [5.0, 10.0]
    counts = Counter(one.model for one in loads[10.0])
    assert counts.total() == pytest.approx(1000, rel=0.15)
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.3)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,7,9\n")
    (load,) = loads_of(parser.parse_args(["--trace", str(trace)]), ["a"]).values()
    assert load == (Arrival(0.0, "a", 7, 9),)
    for wrong in (["--rate", "x"], ["--prompt-tokens", "0"], ["--rate", "0"]):
        with pytest.raises(ConfigError):
            loads_of(parser.parse_args(wrong), ["a"])


def test_a_traces_models_become_those_that_are_served():
    load = tuple(Arrival(float(n), name, 1, 1) for n, name in enumerate("xaybx"))
    assert [one.model for one in renamed(load, ("a", "b"))] == ["a", "a", "b", "b", "a"]


def test_bodies_say_what_each_dialect_understands():
    one = Arrival(0.0, "m", 6, 9)
    body = json.loads(Ask().body(one, 1))
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", 9, True)
    assert body["stream_options"]["continuous_usage_stats"] is True
    assert len(body["prompt"].split()) == 6
    assert body["prompt"] != json.loads(Ask().body(one, 2))["prompt"]
    plain = json.loads(Ask(is_chat=True, dialect="openai").body(one, 1))
    assert plain["messages"][0]["content"] == prompt_of(6, 1)
    assert "ignore_eos" not in plain and "prompt" not in plain
    assert plain["stream_options"] == {"include_usage": True}
    theirs = json.loads(Ask(dialect="transformers").body(one, 1))
    assert json.loads(theirs["generation_config"])["min_new_tokens"] == 9


def make_run(who, gaps_s, failed=0, switches=None):
    times = tuple(itertools.accumulate(gaps_s, initial=1.0))
    served = [Served("m", 0.5, times, len(times)) for _ in range(4)]
    served += [Served("m", 0.5, (), 3, is_failed=True)] * failed
    punctuality = Punctuality(0.001, 0.002, 0.02, 0.5, 1000)
    errors = Counter({"429 queue_full": failed} if failed else {})
    waits = {"queue_ms": (1.0, 3.0)}
    return Run(who, 2.0, 2.0, tuple(served), errors, waits, 40, switches, punctuality)


def test_rows_tell_goodput_latencies_failures_and_the_generator():
    ours, theirs = make_run("aegaeon", [0.05] * 4, switches=7), make_run("other", [0.2] * 4, 2)
    rows = {row.case: row for row in rows_of([ours], [[theirs]], Target(1.0, 0.1))}
    good = rows["goodput, 2 requests/s"]
    assert (good.ours, good.peer, good.peer_value, good.ratio_to_peer) == (2.0, "other", 0.0, None)
    first = rows["TTFT p90, 2 requests/s"]
    assert (first.ours, first.peer_value, first.met) == (0.5, 0.5, True)
    between = rows["TBT p50, 2 requests/s"]
    assert between.ours == pytest.approx(50) and between.ratio_to_peer == pytest.approx(4)
    assert rows["failed, 2 requests/s"].peer_value == 2
    assert rows["switches, 2 requests/s"].ours == 7
    assert rows["waited, queue, 2 requests/s"].ours == 2.0
    assert rows["generator late by p99, 2 requests/s"].met is True
    assert rows["its stamps late by p99, 2 requests/s"].met is False
    assert rows["its ceiling, 2 requests/s"].ours == 2000
    alone = {row.case: row for row in rows_of([theirs], [], Target(1.0, 0.1))}
    assert alone["failed: 429 queue_full, 2 requests/s"].ours == 2
    assert alone["goodput, 2 requests/s"].peer is None


def test_an_answer_that_ends_early_in_order_is_whole():
    early, broken = exchanges_of(2)
    early.token_times_s, early.error = [1.0, 2.0], None
    broken.token_times_s, broken.error = [1.0], "incomplete"
    load = (Arrival(0.0, "m", 1, 8), Arrival(0.0, "m", 1, 8))
    assert [one.is_complete for one in served_of(load, [early, broken])] == [True, False]


def test_the_command_says_what_is_wrong(capsys):
    assert serve.main(["--base-url", "http://127.0.0.1:1"]) == 1
    assert "--models" in capsys.readouterr().err
    url = ["--base-url", "http://127.0.0.1:1", "--models", "m"]
    assert serve.main(url) == 1
    assert "does not serve 'm': connection" in capsys.readouterr().err
