"""The offline benchmark's flags, load and report, without running instances."""

import msgspec
import pytest

from aegaeon.errors import ConfigError, ContextLengthExceeded
from aegaeon.models.references import resolve_all
from benchmark import offline_qwen3_colocation as offline
from tests.support.checkpoints import make_checkpoint


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


def test_the_report_counts_tokens_and_switches():
    one = served("a", "instance-0", (1.0, 1.5, 2.5))
    two = served("b", "instance-0", (2.0, 2.2), arrival_s=1.0)
    bad = served("b", "", ())
    report = offline.make_report(
        [one, two, bad],
        4.0,
        {"instance-0": 3, "instance-1": 0},
        device="cpu",
        machine={},
        options={},
    )
    plain = msgspec.to_builtins(report)
    assert (plain["generated_tokens"], plain["token_per_s"]) == (5, 1.25)
    assert (plain["requests"], plain["failed_requests"], plain["req_per_s"]) == (3, 1, 0.5)
    assert plain["ttft_ms"] == {"avg": 1000.0, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert plain["per_model"]["b"]["tbt_ms"]["avg"] == pytest.approx(200.0)
    assert plain["instance_switching"] == {
        "instance-0": {"requests": 2, "models_seen": 2, "switches": 3, "switch_rate": 1.5},
        "instance-1": {"requests": 0, "models_seen": 0, "switches": 0, "switch_rate": 0.0},
    }


def test_errors_are_one_line_with_an_exit_code(capsys, tmp_path):
    assert offline.main([]) == 2
    assert offline.main(["--model", "nowhere", "--local-root", str(tmp_path)]) == 1
    assert offline.main(["--model", "a", "--out-json", str(tmp_path / "no" / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3 and err.count("error: ") == 3
