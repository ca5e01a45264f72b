"""The command line: flags, errors in one line, and a whole server by signals."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aegaeon import __version__
from aegaeon.cli import main, serve_parser, split_command
from aegaeon.config import Settings
from aegaeon.ports import free_port
from tests.support.checkpoints import make_checkpoint


def parse(*arguments: str) -> dict[str, object]:
    return vars(serve_parser("serve").parse_args(arguments))


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch, tmp_path):
    monkeypatch.delenv("AEGAEON_CONFIG", raising=False)
    monkeypatch.setenv("AEGAEON_MODELS_DIR", str(tmp_path / "models"))


@pytest.mark.parametrize(
    ("given", "command", "rest"),
    [
        ([], "serve", []),
        (["--port", "1"], "serve", ["--port", "1"]),
        (["serve", "--port", "1"], "serve", ["--port", "1"]),
        (["--port", "1", "serve", "--host", "x"], "serve", ["--port", "1", "--host", "x"]),
        (["--models", "serve"], "serve", ["--models", "serve"]),
        (["--models=a", "--preload-models", "serve"], "serve", ["--models=a", "--preload-models"]),
        (["--no-preload-models", "instances"], "instances", ["--no-preload-models"]),
        (["--config", "models", "models", "list"], "models", ["--config", "models", "list"]),
        (["models", "list"], "models", ["list"]),
        (["--port", "1", "plan", "a.toml"], "plan", ["--port", "1", "a.toml"]),
    ],
)
def test_the_command_is_found_among_flags(given, command, rest):
    assert split_command(given) == (command, rest)


def test_every_setting_is_a_flag_and_only_given_ones_count():
    assert parse() == {}
    assert parse("--port", "1", "--models", "a,b", "--lease-s", "2") == {
        "port": 1,
        "models": ["a", "b"],
        "lease_s": 2.0,
    }
    assert parse("--preload-models") == {"preload_models": True}
    assert parse("--no-preload-models") == {"preload_models": False}
    text = serve_parser("serve").format_help()
    for field in msgspec.structs.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
    assert "examples:" in text and "(default: 8080)" in text
    assert "(default: 0)" in text and "(default: 0.0)" not in text


def test_each_command_describes_itself():
    texts = {name: serve_parser(name).format_help() for name in ("serve", "plan", "instances")}
    assert "Serve models over" in texts["serve"]
    assert "Serve models over" not in texts["plan"] + texts["instances"]
    assert "aegaeon plan server.toml" in texts["plan"] and "aegaeon serve --" not in texts["plan"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--port", "eighty"], "--port must be of type int"),
        (["--port", "70000"], "port"),
        (["--prot", "1"], "unrecognized arguments: --prot"),
        (["--device", "tpu"], "give cpu, staged, null, or cuda:N"),
        (
            ["--models", "a", "--colocated-count", "0", "--prefill-count", "1"],
            "no instance decodes",
        ),
        (["frobnicate"], "unknown command 'frobnicate'"),
        ([], "no models to serve"),
        (["models"], "see `aegaeon models --help`"),
        (["models", "list", "--jsonn"], "unrecognized"),
        (["--config", "/nonexistent.toml"], "cannot read the configuration"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_two(given, message, capsys):
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"aegaeon: error: .*\n", captured.err)
    assert message in captured.err


def test_an_unknown_model_is_one_line_and_exit_code_one(capsys):
    assert main(["--models", "nobody"]) == 1
    assert capsys.readouterr().err.startswith("aegaeon: error: no model 'nobody'")


def test_a_budget_too_small_is_told_before_anything_starts(tmp_path, capsys):
    make_checkpoint(tmp_path / "models" / "a", "llama")
    port = str(free_port("127.0.0.1"))
    given = ["--models", "a", "--model-cache-budget-gb", "0.000001", "--port", port]
    assert main(given) == 1
    assert "raise --model-cache-budget-gb" in capsys.readouterr().err


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("aegaeon-test-plan*")}


def test_a_plan_tells_bytes_tiers_and_times_and_leaves_nothing(tmp_path, capsys):
    make_checkpoint(tmp_path / "models" / "a", "llama")
    make_checkpoint(tmp_path / "models" / "b", "qwen3")
    config = tmp_path / "server.toml"
    config.write_text('models = ["a", "b"]\ndomain = "test-plan"\nkv_budget_gb = 0.05\n')
    sizes = ["--model-cache-budget-gb", "0.1"]
    assert main(["plan", str(config), *sizes]) == 0
    text = capsys.readouterr().out
    for part in ("weight cache", "0.100 GB", "keys and values", "pointer change", "2 of 2 models"):
        assert part in text
    staged = ["--device", "staged", "--link-gb-per-s", "2", "--device-memory-gb", "0.2"]
    assert main(["plan", "--json", *sizes, *staged, str(config)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [model["tier"] for model in plan["models"]] == ["device", "device"]
    assert plan["node"]["instance"]["device_kv_bytes"] == 50_000_000
    assert plan["link_bytes_per_s"] == 2e9
    assert main(["plan", "--json", *sizes, "--quantize", "int8", str(config)]) == 0
    int8 = json.loads(capsys.readouterr().out)
    for before, after in zip(plan["models"], int8["models"], strict=True):
        assert after["weight_bytes"] < before["weight_bytes"] / 2  # which are float32
        assert after["file_bytes"] == before["file_bytes"]
    assert main(["plan", *sizes, *staged, "--config", str(config)]) == 0
    assert "2.00 GB/s in each direction (as set)" in capsys.readouterr().out
    assert shared_memory_files() == set()


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["plan"], 2, "no models to serve"),
        (["plan", "x.toml", "--config", "y.toml"], 2, "name one file"),
        (["plan", "--models", "a", "--device", "null"], 2, "null device holds no bytes"),
        (["plan", "--models", "Nobody/Nothing"], 1, "aegaeon models pull Nobody/Nothing"),
        (["plan", "--models", "a", "--model-cache-budget-gb", "1e6"], 1, "1000000.000 GB"),
        (["plan", "--models", "a", "--kv-budget-gb", "1e-9"], 1, "raise --kv-budget-gb"),
    ],
)
def test_a_plan_that_cannot_work_is_one_line(given, code, message, tmp_path, capsys):
    make_checkpoint(tmp_path / "models" / "a", "llama")
    assert main(given) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"aegaeon: error: .*\n", captured.err)
    assert message in captured.err


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aegaeon {__version__}\n"
    assert main(["--help"]) == 0
    assert "aegaeon models list" in capsys.readouterr().out


def test_models_are_listed_for_people_and_programs(tmp_path, capsys):
    assert main(["models", "list"]) == 0
    assert "no models in" in capsys.readouterr().out
    make_checkpoint(tmp_path / "models" / "Org__small", "qwen3")
    broken = tmp_path / "models" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert main(["models", "list", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["Org/small"]["architecture"] == "Qwen3ForCausalLM"
    assert rows["broken"]["error"]
    assert main(["models", "list"]) == 0
    text = capsys.readouterr().out
    assert "Org/small" in text and "damaged" in text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_models_directory_may_be_named_anywhere(place, tmp_path, capsys):
    make_checkpoint(tmp_path / "other" / "found", "llama")
    given = ["models", "list"]
    given[place:place] = ["--models-dir", str(tmp_path / "other")]
    assert main(given) == 0
    assert "found" in capsys.readouterr().out


def test_a_gguf_that_is_none_is_refused_in_one_line(tmp_path, capsys):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"not a gguf")
    assert main(["models", "import", str(file)]) == 1
    assert re.search(r"aegaeon: error: .*\n$", capsys.readouterr().err)


def test_a_server_starts_answers_signals_and_ends_well(tmp_path):
    make_checkpoint(tmp_path / "models" / "a", "llama")
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "aegaeon", "--port", str(port), "--device", "null"]
    command += ["--models", "a", "--models-dir", str(tmp_path / "models"), "--drain-s", "3"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("ready on"):
            lines.append(server.stdout.readline())
            assert lines[-1], "the server ended early"
        assert lines[0] == f"aegaeon {__version__} listens on http://127.0.0.1:{port}\n"
        assert any("model a: LlamaForCausalLM" in line for line in lines)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert "choose another --port" in second.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait(10)
        server.stdout.close()
