"""Traces on their way to a collector, and what becomes of them and of requests where there is none.

The collector is a server of this process: nothing leaves the machine.
"""

import asyncio
import json
import subprocess
import sys
import time

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes

from aegaeon.config import check_settings
from aegaeon.errors import ConfigError
from aegaeon.measures import Waited
from aegaeon.proxy.traces import Trace
from aegaeon.proxy.tracing import FLUSH_S, INTERVAL_S, MAX_WAITING, Tracer, check_tracing, url_of
from tests.support.collector import attributes_of, collecting
from tests.support.fake_instance import wait_until
from tests.support.proxy_server import TEXT, Proxy, in_memory

SECRET = "the prompt is nobody's business"
CHAT = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "stop": ["my stop"]}
CHAT_PATH = "/v1/chat/completions"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
# Of an address that takes no connections.
NOBODY = "http://127.0.0.1:1"
KNOWN = {
    value
    for module in (gen_ai_attributes, http_attributes, error_attributes)
    for value in vars(module).values()
    if isinstance(value, str)
}


@pytest.fixture
def collector():
    with collecting() as found:
        yield found


def served(proxy, *calls, before=None):
    """Send chats, each a body and headers; return the answers. The server has ended by then."""

    async def test():
        async with in_memory(proxy) as client:
            if before is not None:
                before()
            return [
                await client.post(CHAT_PATH, json=body, headers=headers) for body, headers in calls
            ]

    return asyncio.run(asyncio.wait_for(test(), 60))


def test_a_chat_is_a_span_with_its_phases_within_the_clients_trace(tmp_path, collector):
    proxy = Proxy(tmp_path, trace_endpoint=collector.url)

    def wait():
        proxy.instance.waited = Waited(0.0, 0.0, 1, 0.0, 0.0)

    body = {**CHAT, "stream": True, "seed": 5, "temperature": 0.25}
    (answer,) = served(proxy, (body, PARENT), before=wait)
    assert answer.status_code == 200
    assert collector.paths == ["/v1/traces"]
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == {"chat m", "prepare", "generate", "prefill", "decode"}
    root = by_name["chat m"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert root.kind == root.SPAN_KIND_SERVER and root.status.code == root.status.STATUS_CODE_UNSET
    assert by_name["generate"].parent_span_id == root.span_id == by_name["prepare"].parent_span_id
    for phase in ("prefill", "decode"):
        assert by_name[phase].parent_span_id == by_name["generate"].span_id
        assert by_name[phase].trace_id == root.trace_id
        assert attributes_of(by_name[phase])["aegaeon.instance"] == "instance-0"
    told = attributes_of(root)
    assert told.pop("gen_ai.response.time_to_first_chunk") > 0
    assert told.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert told == {
        "http.request.method": "POST",
        "http.route": CHAT_PATH,
        "http.response.status_code": 200,
        "aegaeon.request_id": answer.headers["x-request-id"],
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "aegaeon",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.seed": 5,
        "gen_ai.request.temperature": 0.25,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": len(proxy.text.encode_chat(CHAT["messages"])),
        "gen_ai.usage.output_tokens": len(proxy.answer) + 1,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }


def test_times_are_those_of_the_clock_and_lie_within_one_another(tmp_path, collector):
    before_ns = time.time_ns()
    served(Proxy(tmp_path, trace_endpoint=collector.url), (CHAT, {}))
    after_ns = time.time_ns()
    by_id = {span.span_id: span for span in collector.spans}
    for span in by_id.values():
        within = by_id.get(span.parent_span_id)
        first_ns, last_ns = before_ns, after_ns
        if within is not None:
            first_ns, last_ns = within.start_time_unix_nano, within.end_time_unix_nano
        assert first_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= last_ns


def test_no_text_of_client_or_model_is_sent(tmp_path, collector):
    bodies = [{**CHAT, "stream": is_stream} for is_stream in (False, True)]
    bodies.append({**CHAT, "n": 2, "max_tokens": 3})
    bodies.append({**CHAT, "temperature": SECRET})
    served(Proxy(tmp_path, trace_endpoint=collector.url), *((body, {}) for body in bodies))
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    assert len(collector.spans) > 8
    for text in (SECRET, "my stop", TEXT, TEXT[:9]):
        assert text.encode() not in sent


def test_every_name_of_the_conventions_is_one_that_they_have(tmp_path, collector):
    proxy = Proxy(tmp_path, trace_endpoint=collector.url)
    every = {"top_p": 0.5, "top_k": 3, "presence_penalty": 1, "frequency_penalty": 1, "n": 2}
    bodies = ({**CHAT, **every, "max_tokens": 4, "response_format": {"type": "text"}}, CHAT)
    served(proxy, *((body, {}) for body in bodies))
    names = {one.key for span in collector.spans for one in span.attributes}
    assert {name for name in names if not name.startswith("aegaeon.")} <= KNOWN
    assert "gen_ai.request.choice.count" in names and "gen_ai.output.type" in names


def test_a_refused_request_is_a_span_by_its_route_and_no_error_of_ours(tmp_path, collector):
    served(Proxy(tmp_path, trace_endpoint=collector.url), ({**CHAT, "model": "x"}, {}))
    (span,) = collector.spans
    assert span.name == f"POST {CHAT_PATH}"
    assert attributes_of(span)["http.response.status_code"] == 404
    assert span.status.code == span.status.STATUS_CODE_UNSET and not span.parent_span_id


def test_a_request_that_fails_is_an_error_with_its_code(tmp_path, collector):
    proxy = Proxy(tmp_path, trace_endpoint=collector.url)

    def fail():
        proxy.instance.fail_with = ("timeout", "too late")

    (answer,) = served(proxy, (CHAT, {}), before=fail)
    assert answer.status_code == 504
    for span in collector.spans:
        if span.name in ("chat m", "generate"):
            assert span.status.code == span.status.STATUS_CODE_ERROR
            assert attributes_of(span)["error.type"] == "timeout"
    assert {span.name for span in collector.spans} == {"chat m", "prepare", "generate", "queue"}


def test_what_the_client_does_not_sample_is_not_sent(tmp_path, collector):
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    bad = {"traceparent": "00-nonsense"}
    served(Proxy(tmp_path, trace_endpoint=collector.url), (CHAT, unsampled), (CHAT, bad))
    roots = [span for span in collector.spans if span.name == "chat m"]
    assert len(roots) == 1 and roots[0].trace_id.hex() != TRACE_ID


def test_looking_makes_no_spans(tmp_path, collector):
    async def test():
        async with in_memory(Proxy(tmp_path, trace_endpoint=collector.url)) as client:
            for path in ("/v1/models", "/metrics", "/health"):
                assert (await client.get(path)).status_code == 200

    asyncio.run(test())
    assert collector.requests == []


@pytest.mark.parametrize("status", [503, 400])
def test_a_collector_that_refuses_or_is_not_there_costs_traces_only(tmp_path, collector, status):
    collector.status = status
    for endpoint in (collector.url, NOBODY):
        proxy = Proxy(tmp_path, trace_endpoint=endpoint)
        answers = served(proxy, *[(CHAT, {})] * 3)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert proxy.app.state.tracer.sent == 0


def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end(tmp_path, collector):
    collector.goes_on.clear()
    proxy = Proxy(tmp_path, trace_endpoint=collector.url)

    async def test():
        async with in_memory(proxy) as client:
            await client.post(CHAT_PATH, json=CHAT)
            await asyncio.sleep(2 * INTERVAL_S)  # it is being sent
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
            answered_s = time.monotonic()
        return time.monotonic() - answered_s

    assert asyncio.run(test()) >= FLUSH_S
    assert not collector.goes_on.is_set()  # it hangs still


class Held:
    """Takes nothing until it is let go."""

    def __init__(self):
        self.taken, self.is_held = 0, True

    def send(self, traces):
        while self.is_held:
            time.sleep(0.001)
        self.taken += len(traces)
        return True

    def close(self):
        self.is_held = False


def test_traces_that_nobody_takes_are_bounded():
    held = Held()
    tracer = Tracer(held)
    for _ in range(3 * MAX_WAITING):
        tracer._take(Trace("POST", CHAT_PATH, "", ""))
    assert tracer._waiting.qsize() <= MAX_WAITING and tracer.lost >= MAX_WAITING
    held.close()
    tracer.close()
    assert tracer.sent + tracer.lost == 3 * MAX_WAITING and tracer.sent == held.taken


class Flaky:
    """Refuses the first batch."""

    def __init__(self):
        self.batches = 0

    def send(self, traces):
        self.batches += 1
        if self.batches == 2:
            raise ValueError("a fault of ours")
        return self.batches > 2

    def close(self):
        pass


def test_an_outage_is_told_once_and_over_when_it_is(caplog):
    tracer = Tracer(Flaky(), outage_s=0.01)
    try:
        for count in range(1, 4):
            tracer._take(Trace("POST", CHAT_PATH, "", ""))
            wait_until(lambda count=count: tracer.sent + tracer.lost == count)
        assert (tracer.sent, tracer.lost) == (1, 2)
        told = [r for r in caplog.records if "takes nothing" in r.message]
        assert len(told) == 1
    finally:
        tracer.close()


def test_nothing_of_it_is_loaded_unless_asked_for(tmp_path):
    proxy = Proxy(tmp_path)
    assert served(proxy, (CHAT, {}))[0].status_code == 200
    assert proxy.app.state.tracer is None
    # Other packages import parts of the library that is traced with, where it is there.
    script = "import sys, aegaeon.cli as _; print('opentelemetry.exporter' in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "aegaeon.proxy.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    check_tracing(check_settings({}))
    with pytest.raises(ConfigError, match=r"pip install 'aegaeon\[otel\]'"):
        check_tracing(check_settings({"trace_endpoint": NOBODY}))


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "http://x:y", "x"])
def test_an_endpoint_that_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match=r"no URL; give one like"):
        check_tracing(check_settings({"trace_endpoint": url}))


@pytest.mark.parametrize(
    ("given", "posted"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_the_path_of_the_protocol_is_added_where_there_is_none(given, posted):
    assert url_of(given) == posted


def test_names_from_the_environment_win(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    served(Proxy(tmp_path, trace_endpoint=collector.url), (CHAT, {}))
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for request in
                   collector.requests}  # fmt: skip
    assert b"mine" in resource and json.dumps("aegaeon").encode() not in resource


def test_lost_traces_are_in_the_metrics_beside_those_that_were_sent(tmp_path, collector):
    proxy = Proxy(tmp_path, trace_endpoint=collector.url)

    async def test():
        async with in_memory(proxy) as client:
            tracer, meter = proxy.app.state.tracer, proxy.service.gateway.meter
            await client.post(CHAT_PATH, json=CHAT)
            await asyncio.to_thread(wait_until, lambda: tracer.sent == 1)
            tracer._sender.send = lambda _: False
            await client.post(CHAT_PATH, json=CHAT)
            await asyncio.to_thread(wait_until, lambda: tracer.lost == 1)
            meter._record()  # what was counted is counted once
            return (await client.get("/metrics")).text

    text = asyncio.run(asyncio.wait_for(test(), 60))
    assert 'aegaeon_traces_total{outcome="sent"} 1\n' in text
    assert 'aegaeon_traces_total{outcome="lost"} 1\n' in text
