"""The goodput benchmark, without a server."""

import asyncio
import json
from pathlib import Path

import httpx
import msgspec
import pytest

from aegaeon.metrics import Attainment, Served, Target
from aegaeon.scheduler.cost import Costs, ModelCost
from benchmark import goodput_load
from benchmark.goodput import Setup, goodputs, loads_of
from benchmark.goodput_rows import Point, rows_of
from benchmark.goodput_simulated import predict

COST = ModelCost(
    weight_gb=0.5, kv_gb_per_token=4e-5, max_len=2048, prefill=(4e-3, 0.0, 0.02),
    decode=(1e-6, 2e-3, 0.025),
)  # fmt: skip
COSTS = Costs(link_gb_per_s=1.0, device_memory_gb=1.5, models={"m": COST}, model_mix=("m",))
SETUP = Setup(Path("models"), "m", 6, 1.5, 1.0, Target(5.0, 0.15), Path("costs.json"), COSTS)


def make_point(policy, rate, reached, predicted):
    served = (Served("model-0000", 0.0, (1.0, 1.1), 2),)
    everywhere = Attainment(reached, reached, reached)
    return Point(policy, rate, everywhere, predicted, 1.0, served, 3, 0.01, 0.2, 1.1)


def test_goodput_is_where_nine_in_ten_keep_their_targets():
    points = [make_point("slack", 1.0, 1.0, 1.0), make_point("slack", 2.0, 0.8, 0.95)]
    assert goodputs(points) == {"slack": (pytest.approx(1.5), pytest.approx(2.0))}


def test_rows_compare_each_policy_with_the_next():
    points = [make_point("slack", 1.0, 1.0, 0.9), make_point("paper", 1.0, 0.5, 0.9)]
    rows = {row.case: row for row in rows_of(points, goodputs(points))}
    assert rows["goodput, slack (simulated 1.00)"].ours == 1.0
    assert rows["simulated and measured differ by, slack, 1 requests/s"].met is True
    assert rows["simulated and measured differ by, paper, 1 requests/s"].met is False
    assert rows["TTFT p50, model-0000, slack, 1 requests/s"].ours == 1.0


def test_the_same_seed_is_the_same_load_and_the_simulator_serves_it():
    (load,) = loads_of(SETUP, [1.0], 20.0, seed=3)
    assert load == loads_of(SETUP, [1.0], 20.0, seed=3)[0]
    assert predict(load, COSTS, "slack", SETUP.target).request > 0.5


def answer(request):
    if request.url.path == "/health":
        instance = {"switches": 4, "switch_s": 0.5, "stall_s": 0.25}
        instance |= {"compute_s": 3.0, "expected_s": 2.0}
        return httpx.Response(200, json={"instances": [instance]})
    body = msgspec.json.decode(request.content)
    if body["model"] == "bad":
        return httpx.Response(503, json={"error": {"message": "overloaded"}})
    chunks = [{"usage": {"completion_tokens": n + 1}} for n in range(body["max_tokens"])]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


def test_a_refused_request_is_a_miss_and_tokens_count_as_they_come(monkeypatch):
    client = httpx.AsyncClient
    monkeypatch.setattr(
        goodput_load.httpx,
        "AsyncClient",
        lambda **kwargs: client(base_url=kwargs["base_url"], transport=httpx.MockTransport(answer)),
    )
    arrivals = [(0.0, "a", 4, 3), (0.01, "bad", 4, 3)]
    load = tuple(goodput_load.Arrival(*one) for one in arrivals)
    served, health = asyncio.run(goodput_load.replay("http://server", ("a",), load))
    assert [one.is_failed for one in served] == [False, True]
    assert len(served[0].token_times_s) == 3 and served[0].is_complete
    assert health == goodput_load.Health(0, 0.0, 0.0, 1.0)
