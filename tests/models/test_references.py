"""From what an operator writes to served models."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aegaeon.errors import CheckpointError, ConfigError, ModelNotFound, UnsupportedModel
from aegaeon.models import hub
from aegaeon.models.references import list_models, resolve, resolve_all
from tests.support.checkpoints import make_checkpoint


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network in tests\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "models" / "Qwen__Qwen3-0.6B", "qwen3")
    make_checkpoint(tmp_path / "models" / "plain", "llama")
    return tmp_path / "models"


def test_a_directory_is_served_under_its_name(models_dir: Path) -> None:
    spec = resolve(str(models_dir / "Qwen__Qwen3-0.6B"), "/nowhere")
    assert (spec.id, spec.path) == ("Qwen/Qwen3-0.6B", str(models_dir / "Qwen__Qwen3-0.6B"))
    assert spec.architecture == "Qwen3ForCausalLM"
    assert spec.kv_token_bytes == 2 * 2 * 2 * 16 * 4
    half = resolve(str(models_dir / "Qwen__Qwen3-0.6B"), "/nowhere", "bfloat16")
    assert half == msgspec.structs.replace(spec, kv_token_bytes=spec.kv_token_bytes // 2)
    assert (spec.context_tokens, spec.vocab_tokens) == (512, 384)


@pytest.mark.parametrize("reference", ["Qwen/Qwen3-0.6B", "Qwen__Qwen3-0.6B"])
def test_a_name_is_looked_up_in_the_models_directory(models_dir: Path, reference: str) -> None:
    assert resolve(reference, models_dir).id == "Qwen/Qwen3-0.6B"


def test_a_relative_directory_works_from_where_one_stands(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models_dir / "plain")
    assert resolve(".", "/nowhere").id == "plain"
    assert resolve("../plain", "/nowhere").path == str(models_dir / "plain")


def test_a_reference_can_be_given_its_name(models_dir: Path) -> None:
    assert resolve("mine=plain", models_dir).id == "mine"
    assert resolve(f"org/mine = {models_dir / 'plain'}", models_dir).id == "org/mine"


def test_a_directory_with_an_equals_sign_is_a_directory(models_dir: Path) -> None:
    (models_dir / "plain").rename(models_dir / "a=b")
    assert resolve(str(models_dir / "a=b"), models_dir).id == "a=b"


@pytest.mark.parametrize("reference", ["=plain", "name=", "="])
def test_half_a_name_is_refused(models_dir: Path, reference: str) -> None:
    with pytest.raises(ConfigError, match="NAME=REFERENCE"):
        resolve(reference, models_dir)


def test_two_models_of_one_name_are_refused(models_dir: Path) -> None:
    with pytest.raises(ConfigError, match="'plain'"):
        resolve_all(["plain", "plain=Qwen/Qwen3-0.6B"], models_dir)
    specs = resolve_all(["plain", "other=plain"], models_dir)
    assert [spec.id for spec in specs] == ["plain", "other"]


@pytest.mark.parametrize(
    "reference", ["none", "../../etc", "a/b/c", "/nowhere", "~nobody/x", "x\0"]
)
def test_what_leads_nowhere_is_not_found(models_dir: Path, reference: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve(reference, models_dir)


def test_a_hub_id_without_network_names_the_remedy(models_dir: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no network in tests.*check the id") as caught:
        resolve("Org/Model", models_dir)
    assert "\n" not in str(caught.value)
    assert not (models_dir / "Org__Model").exists()


def test_a_download_becomes_a_model_only_when_whole(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        assert hub_id == "Org/Model"
        assert not (models_dir / "Org__Model").exists()
        asked.append(allow_patterns)
        make_checkpoint(local_dir, "llama")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("Org/Model", models_dir).id == "Org/Model"
    assert asked[1] == ["*.safetensors"]
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
    assert [entry.id for entry in list_models(models_dir)] == [
        "Org/Model", "Qwen/Qwen3-0.6B", "plain",
    ]  # fmt: skip
    resolve("Org/Model", models_dir)
    assert len(asked) == 2


def test_no_weights_are_fetched_of_an_unsupported_model(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(hub_id: str, *, local_dir: Path, **_: object) -> None:
        calls.append(hub_id)
        (local_dir / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UnsupportedModel):
        resolve("Org/Mamba", models_dir)
    assert len(calls) == 1


def test_damaged_weights_are_noticed_when_the_reference_is_resolved(models_dir: Path) -> None:
    (models_dir / "plain" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        resolve("plain", models_dir)


def test_listing_survives_damaged_models(models_dir: Path) -> None:
    (models_dir / "empty").mkdir()
    (models_dir / "odd").mkdir()
    (models_dir / "odd" / "config.json").write_bytes(b"\xff")
    (models_dir / "plain" / "model.safetensors").write_bytes(b"short")
    (models_dir / "dangling").symlink_to("/nowhere")
    (models_dir / ".hidden.partial").mkdir()
    (models_dir / "file").write_text("no model")
    entries = {entry.id: entry for entry in list_models(models_dir)}
    assert set(entries) == {"Qwen/Qwen3-0.6B", "empty", "odd", "plain"}
    good = entries.pop("Qwen/Qwen3-0.6B")
    assert good.error is None and good.parameters is not None and good.disk_bytes > 1000
    assert all(entry.error and "\n" not in entry.error for entry in entries.values())
    assert entries["plain"].disk_bytes > 5


def test_no_models_directory_is_an_empty_list(tmp_path: Path) -> None:
    assert list_models(tmp_path / "nowhere") == ()


def test_references_import_no_torch() -> None:
    code = "import sys, aegaeon.models.references; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
