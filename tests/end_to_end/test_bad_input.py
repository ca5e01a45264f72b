"""What an operator can get wrong: one line with the remedy, an exit code, nothing left behind."""

import json
import socket
import struct

import httpx
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.server import SHARED_MEMORY, Server, Streamed, run_cli

FILE = "model.safetensors"


def missing_weights(model):
    (model / FILE).unlink()


def truncated_header(model):
    (model / FILE).write_bytes((model / FILE).read_bytes()[:100])


def truncated_weights(model):
    (model / FILE).write_bytes((model / FILE).read_bytes()[:-100])


def absurd_header_length(model):
    (model / FILE).write_bytes(struct.pack("<Q", 1 << 60) + (model / FILE).read_bytes()[8:])


def header_that_is_no_json(model):
    content = bytearray((model / FILE).read_bytes())
    content[8:12] = b"\xff\xfe{["
    (model / FILE).write_bytes(content)


def unknown_architecture(model):
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))


def config_that_is_no_json(model):
    (model / "config.json").write_text("{")


def missing_tokenizer(model):
    (model / "tokenizer.json").unlink()


def assert_one_line(done, *hints, domain=""):
    assert done.returncode in (1, 2), done.stderr
    errors = [line for line in done.stderr.splitlines() if "aegaeon: error: " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for hint in hints:
        assert hint in errors[0], errors[0]
    assert list(SHARED_MEMORY.glob(f"aegaeon-{domain}.*")) == []


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (missing_weights, FILE),
        (truncated_header, FILE),
        (truncated_weights, FILE),
        (absurd_header_length, FILE),
        (header_that_is_no_json, FILE),
        (unknown_architecture, "LlamaForCausalLM"),
        (config_that_is_no_json, "config.json"),
        (missing_tokenizer, "tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_at_start(tmp_path, damage, hint):
    model = make_checkpoint(tmp_path / "m")
    damage(model)
    domain = f"bad-{damage.__name__}"
    done = run_cli("serve", "--models", str(model), "--port", "0", "--domain", domain)
    assert_one_line(done, hint, domain=domain)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (("--models", "no-such-model"), "models list"),
        (("--models", "{model}", "--model-cache-budget-gb", "0.00001"), "--model-cache-budget-gb"),
        (("--models", "{model}", "--kv-budget-gb", "0.0000001"), "--kv-budget-gb"),
        (
            ("--models", "{model}", "--prefill-count", "1", "--colocated-count", "0"),
            "--decode-count",
        ),
        (("--models", "{model}", "--decode-count", "1"), "--colocated-count"),
        (("--models", "{model}", "--metadata-backend", "redis", "--redis-url", "{dead}"), "redis"),
        (("--models", "{model}", "--port", "99999"), "port"),
        (("--models", "{model}", "--nonsense"), "--help"),
        ((), "--models"),
    ],
)
def test_wrong_settings_are_refused_at_start(checkpoints, flags, hint):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    flags = [flag.format(model=checkpoints["ada"], dead=dead) for flag in flags]
    port = () if "--port" in flags else ("--port", "0")
    done = run_cli("serve", "--domain", "bad-settings", *port, *flags)
    assert_one_line(done, hint, domain="bad-settings")


def test_a_port_in_use_is_refused(checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ("--models", str(checkpoints["ada"]), "--port", port, "--domain", "bad-port")
        assert_one_line(run_cli("serve", *flags), "--port", port, domain="bad-port")


@pytest.mark.thorough
def test_a_file_that_is_no_known_gguf_is_refused(tmp_path):
    magic_only = tmp_path / "a.gguf"
    magic_only.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    no_gguf = tmp_path / "b.gguf"
    no_gguf.write_bytes(b"\x00" * 1000)
    for file in (magic_only, no_gguf, tmp_path / "missing.gguf"):
        done = run_cli("models", "import", str(file), "--models-dir", str(tmp_path / "models"))
        assert_one_line(done, file.name)
    assert not list(tmp_path.glob("models/*"))


def test_weights_that_vanish_under_a_server_fail_their_requests_and_no_others(
    checkpoints, tmp_path
):
    damaged = make_checkpoint(tmp_path / "damaged", seed=5)
    with Server(tmp_path, {"ada": checkpoints["ada"], "damaged": damaged}) as server:
        missing_weights(damaged)
        body = {"model": "damaged", "prompt": "the", "max_tokens": 3}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "checkpoint_error"
        assert str(tmp_path) not in answer.text
        assert Streamed(server.url, "ada", "the", 3).whole()
