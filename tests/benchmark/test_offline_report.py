"""The offline benchmark's flags, load and report, without running instances."""

import msgspec
import pytest

from aegaeon.errors import ConfigError, ContextLengthExceeded
from aegaeon.measures import PhaseTotal
from aegaeon.models.references import resolve_all
from aegaeon.types import Instance, InstanceRecord, InstanceStatus
from benchmark import offline_qwen3_colocation as offline
from benchmark.offline_report import Activity, Memory, activity_between
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually


def parsed(*arguments):
    return offline.make_parser().parse_args(arguments)


def served(model, instance, times, arrival_s=0.0):
    ttft_s = times[0] - arrival_s if times else None
    return offline.Served(
        model=model,
        instance=instance,
        arrival_s=arrival_s,
        ttft_s=ttft_s,
        token_times_s=times,
        prompt_tokens=3,
        error=None if times else "timeout: too late",
    )


def test_one_model_goes_before_those_of_the_list():
    settings = offline.settings_of(parsed("--model", "a", "--models", "b, a,c"))
    assert settings.models == ("a", "b", "c")


def test_preloading_per_instance_means_preloading():
    assert offline.settings_of(parsed("--model", "a", "--preload-per-instance", "2")).preload_models
    assert not offline.settings_of(parsed("--model", "a")).preload_models


@pytest.mark.parametrize(
    "arguments",
    [(), ("--model", "a", "--num-requests", "0"), ("--model", "a", "--max-new-tokens", "0")],
)
def test_a_load_of_nothing_is_refused(arguments):
    with pytest.raises(ConfigError):
        offline.settings_of(parsed(*arguments))


def test_the_load_follows_the_mix_and_ignores_end_of_text(tmp_path):
    specs = resolve_all([f"a={make_checkpoint(tmp_path)}", f"b={tmp_path}"], tmp_path)
    options = parsed("--num-requests", "4", "--prompt-chars", "20", "--max-new-tokens", "8")
    load = offline.make_load(options, specs)
    assert [one.model for one in load] == ["a", "b", "a", "b"]
    assert {one.max_tokens for one in load} == {8} and {one.stop_token_ids for one in load} == {()}
    assert len({one.prompt_token_ids for one in load}) == 4

    with pytest.raises(ContextLengthExceeded, match="--prompt-chars"):
        offline.make_load(parsed("--max-new-tokens", "1000000"), specs)


def instance(name, status, incarnation=1):
    record = InstanceRecord(
        id=name,
        incarnation=incarnation,
        role="colocated",
        device="cpu",
        mailbox=f"{name}.1",
        pid=1,
        models=("a", "b"),
    )
    return Instance(record, status)


def test_the_report_counts_tokens_switches_and_moves():
    one = served("a", "instance-0", (1.0, 1.5, 2.5))
    two = served("b", "instance-0", (2.0, 2.2), arrival_s=1.0)
    bad = served("b", "", ())
    moved = {"disk": PhaseTotal(1, 50, 0.25)}
    report = offline.make_report(
        [one, two, bad],
        4.0,
        {"instance-0": Activity(3, moved), "instance-1": Activity(0, {})},
        device="cpu",
        machine={},
        memory=Memory(90, 100),
        options={},
    )
    plain = msgspec.to_builtins(report)
    assert (plain["generated_tokens"], plain["token_per_s"]) == (5, 1.25)
    assert (plain["requests"], plain["failed_requests"], plain["req_per_s"]) == (3, 1, 0.5)
    assert plain["ttft_ms"] == {"avg": 1000.0, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert plain["per_model"]["b"]["tbt_ms"]["avg"] == pytest.approx(200.0)
    disk = {"count": 1, "moved_bytes": 50, "seconds": 0.25}
    assert plain["instance_switching"] == {
        "instance-0": {
            "requests": 2,
            "models_seen": 2,
            "switches": 3,
            "switch_rate": 1.5,
            "phases": {"disk": disk},
        },
        "instance-1": {
            "requests": 0,
            "models_seen": 0,
            "switches": 0,
            "switch_rate": 0.0,
            "phases": {},
        },
    }
    assert plain["memory"] == {"weight_bytes_peak": 90, "weight_budget_bytes": 100}


def test_only_what_happened_during_the_run_counts():
    early = InstanceStatus(switches=2, moved={"kv_in": PhaseTotal(1, 10, 0.5)})
    late = InstanceStatus(switches=5, moved={"kv_in": PhaseTotal(4, 70, 2.0)})
    before = {"i": instance("i", early), "restarted": instance("restarted", early)}
    after = [instance("i", late), instance("restarted", late, incarnation=2)]
    done = activity_between(before, after)
    assert done["i"].switches == 3 and done["i"].phases["kv_in"] == PhaseTotal(3, 60, 1.5)
    assert done["restarted"].switches == 5
    assert done["restarted"].phases["kv_in"] == PhaseTotal(4, 70, 2.0)
    assert done["i"].phases["disk"] == PhaseTotal()


def test_resident_weights_are_the_data_files_of_the_domain(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "SHARED_MEMORY", tmp_path)
    for name, pages in (("x.weights", 1), ("x.weights+0-0", 3), ("x.kv+0", 5), ("y.weights+0", 7)):
        (tmp_path / f"aegaeon-{name}").write_bytes(bytes(4096 * pages))
    with offline.ResidentWeights("x") as weights:
        eventually(lambda: weights.peak_bytes > 0)
    assert weights.peak_bytes == 3 * 4096


def test_errors_are_one_line_with_an_exit_code(capsys, tmp_path):
    assert offline.main([]) == 2
    assert offline.main(["--model", "nowhere", "--local-root", str(tmp_path)]) == 1
    assert offline.main(["--model", "a", "--out-json", str(tmp_path / "no" / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3 and err.count("error: ") == 3
