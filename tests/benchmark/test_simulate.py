"""benchmark/simulate.py asks all its questions, here of loads too small to answer them."""

import json

import msgspec
import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.sim.workloads import Arrival
from benchmark.simulate import main
from benchmark.simulate_bounds import device_seconds, device_share, link_share
from benchmark.simulate_cases import Bench, Workload
from benchmark.simulate_reproduction import REFERENCE
from benchmark.simulate_speed import large
from benchmark.simulate_suite import LADDERS, STRICT
from tests.support.simulated import COSTS

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,4
2023-11-16 18:15:50.9951690,396,9
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory like the published data, with a request for each of few models."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "paper").mkdir()
    (directory / "traces").mkdir()
    (directory / "paper" / "h100-cost-model.json").write_bytes(msgspec.json.encode(COSTS))
    loads = {*REFERENCE, *STRICT}
    loads |= {Workload(sizes, rate) for rate, ladder in LADDERS.items() for sizes in ladder}
    for one in loads:
        for size in one.sizes:
            rows = (f"00:00:{n * 5:02d},m{n % (size // 8)},{n * 9},{n + 1}\n" for n in range(8))
            text = "Request Time,Model Name,Input Length,Output Length\n" + "".join(rows)
            name = f"synth-{size}-{one.rate}-{one.scales}.csv"
            (directory / "paper" / name).write_text(text)
    for kind in ("conv", "code"):
        (directory / "traces" / f"AzureLLMInferenceTrace_{kind}.csv").write_text(AZURE)
    return directory


def rows_of(capsys, *flags):
    assert main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_the_suite_asks_all_questions(data, capsys):
    rows = rows_of(capsys, "--suite", "paper", "--data", str(data), "--devices", "4")
    cases = [row["case"] for row in rows]
    for words in (
        "slack, 80+80 models at 0.1/s: attainment_request",
        "anybody, 54+40 models at 0.5/s, 2 times: device time needed",
        "slack, models at 0.5/s with attainment_request >= 0.90",
        "slack, 80 models at 0.1/s, link of 8 GB/s: attainment_token",
        "slack, 64 models at 0.1/s, 2 devices fail: attainment_time",
        "slack, simulated on one core",
        "request, only used is who computed last: mean distance from the authors' simulator",
        "request, by the fitted rules, 40 models at 0.5/s: attainment_time",
        "paper, only decode of batch -1, 80 models at 0.1/s: attainment_request",
    ):
        assert words in cases
    for policy, aimed in (("paper", 2 * len(REFERENCE) + 2), ("request", 4 * len(REFERENCE))):
        ours = [row for row in rows if row["case"].startswith(f"{policy}, ")]
        near = [row for row in ours if row["peer"] == "the authors' simulator" and row["aim"]]
        assert len(near) == aimed
        for row in near:
            within = float(row["aim"].removeprefix("within "))
            assert row["met"] == (abs(row["ours"] - row["peer_value"]) <= within + 1e-9)
    assert all(0 <= row["ours"] <= 1 for row in rows if row["unit"] == "share")


def test_curves_are_drawn_for_every_policy_rate_and_target(data, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flags = ("--data", str(data), "--curves", str(tmp_path), "--policies", "slack")
    rows = rows_of(capsys, *flags, "--models", "2,4", "--rates", "0.1,0.2", "--scales", "1,0.5")
    assert len(rows) == 8
    assert (tmp_path / "attainment.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "attainment.svg").read_text()


def test_a_large_run_is_measured_in_a_process_of_its_own(data):
    took, memory, *_ = large(data, hours=0.0002)
    assert took.met and memory.met and memory.ours > 0.01


@pytest.mark.parametrize("flags", [[], ["--suite", "paper", "--data", "nowhere"], ["--fast"]])
def test_what_is_wrong_is_said_in_a_line(flags, capsys):
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith("simulate.py: error: ")


def test_a_model_alone_steps_when_a_token_is_due_with_all_its_requests():
    cost = ModelCost(1.0, 0.0, 4096, (0.0, 0.0, 0.5), (0.0, 0.0, 0.01))
    target = Target(10.0, 0.1)
    alone = list(device_seconds([Arrival(0.0, "m", 9, 5)], cost, target))
    assert [at_s for at_s, _ in alone] == pytest.approx([10.0, 10.1, 10.2, 10.3, 10.4])
    assert sum(took for _, took in alone) == pytest.approx(0.5 + 4 * 0.01)
    both = device_seconds([Arrival(0.0, "m", 9, 5), Arrival(9.0, "m", 9, 5)], cost, target)
    assert sum(took for _, took in both) == pytest.approx(0.5 + 4 * 0.01)
    apart = device_seconds([Arrival(0.0, "m", 9, 5), Arrival(30.0, "m", 9, 5)], cost, target)
    assert sum(took for _, took in apart) == pytest.approx(2 * (0.5 + 4 * 0.01))


def test_needs_fall_with_devices_and_with_what_has_to_be_kept(data):
    bench = Bench(data)
    case = bench.case(Workload((80, 80)))
    assert device_share(case, 8) == pytest.approx(2 * device_share(case, 16))
    assert 0 < device_share(case, 16, 0.5) < device_share(case, 16)
    assert link_share(case, 1) > 0.0 == link_share(case, 1000)
