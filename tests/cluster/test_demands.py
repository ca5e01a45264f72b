"""What models need, measured from what proxies and instances tell on the board."""

import msgspec
import pytest

from aegaeon.cluster.demands import Demands, labelled
from aegaeon.config import Settings
from aegaeon.figures import (
    DeviceFigures,
    Histogram,
    InstanceFigures,
    ModelFigures,
    ProxyFigures,
    encode_figures,
)
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.demand import busy, loads_per_s
from tests.support.specs import make_spec

MEMORY_S = 60.0
SETTINGS = Settings(slo_ttft_s=10.0, slo_tbt_s=0.1)


def proxy(ended=0, open=0, prompt=0, output=0, model="m", **more):
    figures = ModelFigures(
        request=Histogram([ended, *[0] * 19]), open=open, prompt_tokens=prompt,
        generated_tokens=output,
    )  # fmt: skip
    return encode_figures(ProxyFigures(models={model: figures}, **more))


def instance(decode, prefill=(1e-3, 0.0, 1e-2)):
    figures = DeviceFigures(prefill=prefill, decode=decode)
    return encode_figures(InstanceFigures(models={"m": figures}))


def needs(demands, alive=(), devices=2, specs=None):
    return {n.model: n for n in demands.needs(specs or [make_spec("m")], SETTINGS, devices, alive)}


def test_the_flow_is_what_came_in_the_mean():
    demands = Demands(MEMORY_S)
    for turn in range(60):
        record = proxy(turn * 10, turn % 2, turn * 1000, turn * 500)
        demands.note({"p": record}, turn * 5.0)
    flow = demands.flow("m")
    assert flow.requests_per_s == pytest.approx(2.0, rel=0.02)
    assert flow.prompt_tokens == pytest.approx(100, rel=0.02)
    assert flow.output_tokens == pytest.approx(50, rel=0.02)
    assert demands.flow("other").requests_per_s == 0.0


def test_the_first_look_counts_from_there_on_and_is_no_smaller_for_being_the_first():
    demands = Demands(MEMORY_S)
    demands.note({"p": proxy(1_000_000)}, 100.0)
    assert demands.flow("m").requests_per_s == 0.0 and demands.is_young
    demands.note({"p": proxy(1_000_020)}, 110.0)
    assert demands.flow("m").requests_per_s == pytest.approx(2.0)
    for turn in range(20):
        demands.note({"p": proxy(1_000_020)}, 120.0 + 10 * turn)
    assert demands.flow("m").requests_per_s < 0.1 and not demands.is_young


def test_a_proxy_that_comes_back_or_begins_anew_is_not_counted_twice():
    demands = Demands(MEMORY_S)
    demands.note({"p": proxy(100)}, 0.0)
    demands.note({}, 10.0)  # the store has lost it
    demands.note({"p": proxy(120)}, 20.0)
    demands.note({"p": proxy(5)}, 30.0)
    demands.note({"p": proxy(5), "q": proxy(500)}, 40.0)
    demands.note({"p": proxy(5), "gone": proxy(500, folded=("q",))}, 50.0)
    rate = demands.flow("m").requests_per_s
    assert 0.4 < rate < 0.6  # 25 in 50 s


def test_answers_that_go_on_count_when_nothing_comes_any_more():
    demands = Demands(MEMORY_S)
    for turn in range(100):
        demands.note({"p": proxy(0, 1, 10, 100 * turn)}, turn * 5.0)
    flow = demands.flow("m")
    assert flow.requests_per_s * flow.output_tokens == pytest.approx(20.0, rel=0.01)


def test_a_need_is_the_simulators_from_what_was_measured():
    demands = Demands(MEMORY_S)
    for turn in range(100):
        demands.note(
            {
                "p": proxy(turn * 10, 0, turn * 1000, turn * 500),
                "i": instance((0.0, 0.002, 0.02)),
                "j": instance((0.0, 0.004, 0.04)),
                "dead": instance((0.0, 9.0, 9.0)),
                "words": b"no figures",
            },
            turn * 5.0,
        )
    need = needs(demands, {"i", "j"}, specs=[make_spec("m"), make_spec("n")])["m"]
    cost = ModelCost(
        weight_gb=1e-7, kv_gb_per_token=1e-9, max_len=4096,
        prefill=(1e-3, 0.0, 1e-2), decode=(0.0, 0.003, 0.03),
    )  # fmt: skip
    flow, target = demands.flow("m"), Target(10.0, 0.1)
    assert need.busy == pytest.approx(0.05 + busy(flow, cost, target))
    assert need.loads_per_s == loads_per_s(flow, target)


def test_what_nobody_has_asked_for_needs_as_much_as_the_others():
    specs = [make_spec("a", weight_bytes=5), make_spec("b", weight_bytes=500)]
    found = needs(Demands(MEMORY_S), specs=specs, devices=4)
    assert found["a"].busy == found["b"].busy == pytest.approx(0.1)
    assert [need.weight_bytes for need in found.values()] == [5, 500]


def test_a_models_own_labels_replicas_and_promise_are_its_needs():
    own = {"labels": {"pool": "x"}, "replicas": 3, "slo_tbt_s": 0.05}
    spec = msgspec.structs.replace(make_spec("m"), **own)
    demands = Demands(MEMORY_S)
    for turn in range(100):
        demands.note({"p": proxy(turn * 10, 0, 0, turn * 500)}, turn * 5.0)
    need, plain = needs(demands, specs=[spec])["m"], needs(demands)["m"]
    assert (need.labels, need.least) == (frozenset({"pool=x"}), 3)
    assert need.busy > plain.busy
    assert labelled({"a": "1", "b": "2"}) == {"a=1", "b=2"}
