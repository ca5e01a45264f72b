"""What a proxy counts and what it says of all: read back by the parsers of Prometheus's library."""

import asyncio

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open
from prometheus_client.parser import text_string_to_metric_families as read_plain

from aegaeon.config import check_settings
from aegaeon.errors import DeadlineExceeded, QueueFull, RegionError
from aegaeon.figures import (
    ModelFigures,
    ProxyFigures,
    encode_figures,
)
from aegaeon.measures import Waited
from aegaeon.metrics import Target
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.metrics import MAX_REMOVED, Meter, Timing
from aegaeon.types import TokenEvent
from tests.proxy.test_gateway import SPECS, Setup, collect, generation, run, until
from tests.support.deltas import deltas_of
from tests.support.proxy_server import Proxy, in_memory

OPEN = {"accept": "application/openmetrics-text; version=1.0.0"}


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


def with_client(proxy, test):
    async def whole():
        async with in_memory(proxy) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


def samples(text, read=read_plain):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in read(text)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[f"aegaeon_{name}", tuple(sorted(labels.items()))]


def ask(client, **changes):
    body = {"model": "m", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, **changes}
    return client.post("/v1/completions", json=body)


def test_a_request_shows_in_both_formats(proxy):
    async def test(client):
        assert (await ask(client)).status_code == 200
        plain = await client.get("/metrics")
        return plain, await client.get("/metrics", headers=OPEN)

    plain, opened = with_client(proxy, test)
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    for found in (samples(plain.text), samples(opened.text, read_open)):
        for name, count in (
            ("time_to_first_token_seconds_count", 1),
            ("inter_token_latency_seconds_count", 4),
            ("e2e_request_latency_seconds_count", 1),
            ("generation_tokens_total", 5),
            ("tokens_in_time_total", 5),
            ("num_requests_open", 0),
        ):
            assert value(found, name, model_name="m") == count, name
            assert value(found, name, model_name="org/other") == 0
        assert value(found, "request_success_total", model_name="m", finished_reason="length") == 1
        assert value(found, "request_slo_total", model_name="m", within="both") == 1
        route = {"route": "/v1/completions", "status": "200"}
        assert value(found, "http_responses_total", **route) == 1
        buckets = [
            v for (name, _), v in found.items() if name.endswith("first_token_seconds_bucket")
        ]
        assert max(buckets) == 1


def test_the_text_ends_where_its_format_says(proxy):
    async def test(client):
        return [(await client.get("/metrics", headers=h)).text for h in ({}, OPEN)]

    plain, opened = with_client(proxy, test)
    assert "# EOF" not in plain and opened.endswith("# EOF\n")


def test_head_has_no_body_and_other_methods_are_refused(proxy):
    async def test(client):
        return await client.head("/metrics"), await client.post("/metrics")

    head, posted = with_client(proxy, test)
    assert (head.status_code, head.content, posted.status_code) == (200, b"", 405)


def test_looking_sends_nothing_to_instances_and_resets_nothing(proxy):
    """Lists, metrics and the status read what is here; only readiness asks, and loads nothing."""

    async def test(client):
        for path in ("/metrics", "/v1/models", "/v1/models/m", "/health", "/health/live"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/admin/status")).status_code == 200
        assert proxy.instance.asked == []
        proxy.instance.decisions = []
        assert (await client.get("/health/ready")).status_code == 200

    with_client(proxy, test)
    assert proxy.instance.submitted == [] and proxy.instance.cancelled == []
    assert proxy.instance.asked == [None]


def test_errors_cancels_and_stops_are_told_apart(proxy):
    async def test(client):
        proxy.instance.fail_with = ("overloaded", "full")
        assert (await ask(client)).status_code == 503
        proxy.instance.fail_with = ("out_of_blocks", "too long")
        assert (await ask(client)).status_code == 400
        proxy.instance.fail_with = None
        first = proxy.text.decode(proxy.answer[:1]) if hasattr(proxy.text, "decode") else "T"
        assert (await ask(client, stop=[first], max_tokens=50)).status_code == 200
        proxy.instance.hold_after = 1
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(client), 1.0)
        await asyncio.to_thread(lambda: None)
        return samples((await client.get("/metrics")).text)

    found = with_client(proxy, test)
    assert value(found, "request_failure_total", model_name="m", code="overloaded") == 1
    assert value(found, "request_failure_total", model_name="m", code="out_of_blocks") == 1
    assert value(found, "request_success_total", model_name="m", finished_reason="stop") == 1
    assert value(found, "request_cancelled_total", model_name="m") == 1
    # A request that could never be served breaks no promise, nor does one that was left.
    assert value(found, "request_slo_total", model_name="m", within="neither") == 1


def test_a_request_refused_at_the_door_counts_too():
    async def test():
        async with Setup(max_waiting=1) as setup:
            setup.instance().hold_after = 1
            async with deltas_of(setup.gateway, generation()) as stream:
                await anext(stream)
                with pytest.raises(QueueFull):
                    await collect(setup.gateway, generation())
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.failed, figures.cancelled) == ({"queue_full": 1}, 1)

    run(test())


def test_a_request_that_gets_nothing_has_waited_in_the_queue_all_the_time():
    async def test():
        async with Setup(request_timeout_s=0.3) as setup:
            setup.instance().hold_after = 0
            with pytest.raises(DeadlineExceeded):
                await collect(setup.gateway, generation())
            figures = setup.gateway.meter.sums().models["m"]
            assert figures.failed == {"timeout": 1} and figures.within == {"neither": 1}
            assert figures.queue.sum_s == figures.request.sum_s >= 0.3
            assert figures.ttft.count == 0

    run(test())


def test_oldest_wait_counts_until_the_first_token():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 0
            asking = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: instance.submitted)
            await asyncio.sleep(0.05)
            figures = setup.gateway.meter.sums().models["m"]
            assert figures.open == 1 and figures.oldest_wait_s >= 0.05
            instance.release()
            await asking
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.open, figures.oldest_wait_s) == (0, 0.0)

    run(test())


def test_times_between_tokens_and_promises_are_counted_as_everywhere():
    figures = ModelFigures()
    timing = Timing(figures, Target(1.0, 0.1), 7, 10.0)
    timing.note(1, 10.5)
    timing.note(2, 10.75)  # the second of them comes with the first
    timing.note(1, 13.0)  # late
    timing.finished("length", Waited(0.25, 0.5, 2, 0.125), 13.5)
    assert figures.ttft.sum_s == 0.5 and figures.tbt.count == 3
    assert figures.tbt.sum_s == pytest.approx(0.25 + 0.0 + 2.25)
    assert (figures.prompt_tokens, figures.generated_tokens) == (7, 4)
    assert figures.tokens_in_time == 3
    assert figures.within == {"ttft": 1} and figures.request.sum_s == 3.5
    assert (figures.queue.sum_s, figures.switch_s, figures.switches) == (0.25, 0.5, 2)
    assert figures.preempted_s == 0.125


def test_proxies_of_a_domain_tell_the_sum_of_all(monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.metrics.INTERVAL_S", 0.05)

    async def test():
        async with Setup() as setup:
            setup.instance()
            other = Gateway(setup.domain, setup.settings, SPECS, "proxy-other")
            await other.start()
            for gateway in (setup.gateway, other, other):
                await collect(gateway, generation())
            for gateway in (setup.gateway, other):
                await until(lambda g=gateway: g.meter.sums().models["m"].finished == {"length": 3})
            await other.close()
            assert setup.gateway.meter.sums().models["m"].finished == {"length": 3}

    run(test())


def test_a_supervised_proxy_goes_on_counting_after_its_death(monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.metrics.INTERVAL_S", 0.05)

    async def test():
        async with Setup() as setup:
            setup.instance()
            for life in (1, 2, 3):
                gateway = Gateway(setup.domain, setup.settings, SPECS, f"supervised.{life}")
                await gateway.start()
                await collect(gateway, generation())
                sums = gateway.meter.sums()
                assert sums.models["m"].finished == {"length": life}
                assert sums.proxy_restarts == life - 1
                await gateway.close()

    run(test())


def test_a_proxy_that_died_has_no_open_requests(monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.metrics.INTERVAL_S", 0.02)
    monkeypatch.setattr("aegaeon.proxy.metrics.SILENT_S", 0.2)

    async def test():
        async with Setup() as setup:
            dead = ProxyFigures(starts=1)
            dead.of("m").open, dead.of("m").oldest_wait_s = 3, 99.0
            dead.of("m").generated_tokens = 5
            setup.domain.board().publish("proxy-dead", encode_figures(dead))
            await until(lambda: setup.gateway.meter.sums().models["m"].open == 3)
            await until(lambda: setup.gateway.meter.sums().models["m"].open == 0)
            figures = setup.gateway.meter.sums().models["m"]
            assert (figures.oldest_wait_s, figures.generated_tokens) == (0.0, 5)

    run(test())


def test_a_board_without_room_is_told_once_in_a_while_and_harms_nobody(monkeypatch, caplog):
    async def test():
        async with Setup() as setup:
            setup.instance()
            monkeypatch.setattr(setup.gateway.meter, "_due_s", 0.0)
            monkeypatch.setattr(setup.gateway.meter, "_exchange", fail)
            await until(lambda: "figures not exchanged" in caplog.text)
            await collect(setup.gateway, generation())
            assert setup.gateway.meter.sums().models["m"].finished == {"length": 1}

    def fail(_):

        raise RegionError("no room")

    run(test())


def test_the_window_forgets_what_is_long_ago(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("aegaeon.proxy.metrics.time.monotonic", lambda: now[0])
    meter = Meter(Setup().settings, lambda _: {})
    timing = meter.begin("m", 1, 99.0)
    for second in range(120):
        now[0] = 100.0 + second
        meter._record()
        timing.note(1, now[0])
    recent = meter.recent(meter.sums())["m"]
    assert 55 <= recent.seconds <= 60 and abs(recent.tokens - recent.seconds) <= 2
    assert recent.tbt.quantile_s(0.5) == pytest.approx(1.0, abs=0.5)
    assert recent.ttft.count == 0


def test_an_answer_tells_what_its_choices_waited_for(proxy):
    async def test(client):
        say = proxy.instance._send

        def with_waits(request, reply):
            if isinstance(reply, TokenEvent) and reply.finish_reason is not None:
                first = request.id.endswith(".0")
                waited = Waited(0.5, 0.25, 1, 0.0) if first else Waited(0.125, 0.5, 2, 1.0)
                reply = msgspec.structs.replace(reply, waited=waited)
            say(request, reply)

        proxy.instance._send = with_waits
        whole = (await ask(client, n=2)).json()
        lines = (await ask(client, n=2, stream=True)).text.splitlines()
        chunks = [msgspec.json.decode(x[6:]) for x in lines if x.startswith("data: {")]
        return whole, chunks

    whole, chunks = with_client(proxy, test)
    assert whole["aegaeon"] == {
        **{"instance": "instance-0", "queue_ms": 500.0, "switch_ms": 500.0, "switches": 2},
        **{"preempted_ms": 1000.0, "cached_tokens": 0},
    }
    ends = {
        chunk["choices"][0]["index"]: chunk["aegaeon"]
        for chunk in chunks
        if chunk["choices"][0]["finish_reason"]
    }
    assert (ends[0]["queue_ms"], ends[0]["switches"]) == (500.0, 1)
    assert (ends[1]["queue_ms"], ends[1]["preempted_ms"]) == (125.0, 1000.0)
    others = [c["aegaeon"] for c in chunks if not c["choices"][0]["finish_reason"]]
    assert all(set(one) == {"instance"} for one in others)


def spec_named(name, **changes):
    return msgspec.structs.replace(SPECS[0], id=name, **changes)


def test_figures_of_models_that_are_gone_are_bounded():
    opened = {"gone-0": (1, 0.0)}
    meter = Meter(check_settings({}), lambda _: opened)
    meter.serve([spec_named("stays")])
    meter.begin("stays", 1, 0.0).note(3, 0.1)
    for number in range(200):
        meter.serve([spec_named("stays"), spec_named(f"gone-{number}", slo_ttft_s=0.5)])
        meter.begin(f"gone-{number}", 1, 0.0).note(2, 0.1)
    meter.serve([spec_named("stays")])
    kept = meter.sums().models
    last = [f"gone-{number}" for number in range(200 - MAX_REMOVED, 200)]
    assert sorted(kept) == sorted(["stays", "gone-0", *last])  # gone-0 is still answered
    assert kept["stays"].generated_tokens == 3 and kept["gone-199"].generated_tokens == 2
    assert meter.target_of("gone-199") == meter.target
    opened.clear()
    meter.serve([spec_named("stays"), spec_named("gone-150")])
    meter.serve([spec_named("stays")])
    assert sorted(meter.sums().models) == sorted(["stays", *last])
    # It is the last one that was removed now.
    for number in range(MAX_REMOVED):
        meter.serve([spec_named("stays"), spec_named(f"new-{number}")])
        assert "gone-150" in meter.sums().models
    meter.serve([spec_named("stays")])
    assert "gone-150" not in meter.sums().models and len(meter.sums().models) == MAX_REMOVED + 1
