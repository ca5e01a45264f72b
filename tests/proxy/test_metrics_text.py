"""Figures as text: read back by the parsers of Prometheus's library."""

import time

from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open
from prometheus_client.parser import text_string_to_metric_families as read_plain

from aegaeon.config import Settings
from aegaeon.figures import DeviceFigures, Done, InstanceFigures, ModelFigures, Sums
from aegaeon.measures import PhaseTotal, Waited
from aegaeon.proxy.metrics import Meter
from aegaeon.proxy.metrics_text import Text, write
from tests.proxy.test_metrics import samples, value
from tests.support.specs import make_instance, make_spec

PUBLISHED = InstanceFigures(
    starts=3,
    hung=1,
    models={
        "m": DeviceFigures(
            moves={"load": {"newcomer": Done(2, 1.5)}},
            evictions={"host": {"room": 4}},
            preemptions=5,
        )
    },
    moved={"disk": PhaseTotal(2, 300, 0.5)},
    weight_budget_bytes=10,
    kv_bytes=5,
    kv_budget_bytes=20,
    stage_bytes=30,
    grammar_host_bytes=40,
    cached=("m",),
)


def test_what_instances_publish_is_told_by_model_instance_and_reason():
    row = make_instance("i", ("m", "n"), resident=("m",), current="m", waiting={"m": 2})
    sums = Sums(models={"m": ModelFigures()}, instances={"i": PUBLISHED, "gone": PUBLISHED})
    text = Text()
    text.begin(is_openmetrics=True)
    write(text, sums, (row,), ("m", "n"))
    found = samples(text.end().decode(), read_open)
    at = {"instance": "i", "model_name": "m"}
    assert value(found, "switches_total", **at, phase="load", reason="newcomer") == 2
    assert value(found, "switch_seconds_total", **at, phase="load", reason="newcomer") == 1.5
    assert value(found, "evictions_total", **at, tier="host", reason="room") == 4
    assert value(found, "num_preemptions_total", **at) == 5
    assert value(found, "moved_bytes_total", instance="i", phase="disk") == 300
    assert value(found, "kv_cache_usage_perc", instance="i") == 0.25
    assert value(found, "stage_bytes", instance="i") == 30
    assert value(found, "grammar_host_bytes", instance="i") == 40
    assert value(found, "instance_restarts_total", instance="i") == 2
    assert value(found, "instance_hangs_total", instance="i") == 1
    assert value(found, "num_requests_waiting", model_name="m") == 2
    assert value(found, "num_requests_waiting", model_name="n") == 0
    places = {
        (m, t): value(found, "model_resident", model_name=m, tier=t)
        for m in "mn"
        for t in ("device", "host", "disk")
    }
    assert [places["m", t] for t in ("device", "host", "disk")] == [1, 1, 1]
    assert [places["n", t] for t in ("device", "host", "disk")] == [0, 0, 1]
    # Sums go on after an instance's end, what it holds does not.
    assert value(found, "instance_restarts_total", instance="gone") == 2
    assert ("aegaeon_kv_bytes", (("instance", "gone"),)) not in found


def test_names_of_models_are_escaped():
    name = 'a"b\\c\nd%d'
    sums = Sums(models={name: ModelFigures(prompt_tokens=3)})
    for is_open, read in ((False, read_plain), (True, read_open)):
        text = Text()
        text.begin(is_open)
        write(text, sums, (), (name,))
        found = samples(text.end().decode(), read)
        assert value(found, "prompt_tokens_total", model_name=name) == 3
        assert value(found, "time_to_first_token_seconds_count", model_name=name) == 0


def test_a_scrape_of_a_hundred_models_takes_less_than_5_ms_of_the_loop():
    meter = Meter(Settings(), lambda _: {})
    meter.serve([make_spec(f"org/model-{n}") for n in range(100)])
    for model, figures in meter._own.models.items():
        timing = meter.begin(model, 10, 0.0)
        for token in range(20):
            timing.note(1, 0.1 * token)
        timing.finished("stop", Waited(), 2.0)
        assert figures.finished
    text, served = Text(), tuple(meter._own.models)
    rows = (make_instance("i", served, waiting=dict.fromkeys(served, 1)),)
    took_s = []
    for _ in range(30):
        began_s = time.thread_time()
        text.begin(is_openmetrics=True)
        write(text, meter.sums(), rows, served)
        text.end()
        took_s.append(time.thread_time() - began_s)
    # The best of them: other processes have this processor, too.
    assert min(took_s) < 0.01
