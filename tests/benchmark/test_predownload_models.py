"""predownload_models: what it fetches, skips and refuses, with the hub's library replaced."""

import pytest

from aegaeon.models import hub
from benchmark import predownload_models
from tests.support.checkpoints import make_checkpoint


@pytest.fixture
def fetched(monkeypatch):
    """Ids that were asked of the hub, which serves random checkpoints."""
    asked = []

    def snapshot_download(hub_id, local_dir, **_):
        asked.append(hub_id)
        if "Missing" in hub_id:
            raise OSError("Repository Not Found\nfor url: ...")
        make_checkpoint(local_dir, "qwen3")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def run(models, root):
    return predownload_models.main(["--models", models, "--local-root", str(root)])


def test_models_land_in_directories_named_after_their_ids(tmp_path, fetched, capsys):
    assert run("Qwen/Qwen3-0.6B, Qwen/Qwen3-1.7B", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"Qwen__Qwen3-0.6B", "Qwen__Qwen3-1.7B"}
    assert (tmp_path / "Qwen__Qwen3-0.6B" / "model.safetensors").is_file()
    assert capsys.readouterr().out.count("downloaded") == 2


def test_a_complete_model_is_not_fetched_again(tmp_path, fetched, capsys):
    make_checkpoint(tmp_path / "Qwen__Qwen3-0.6B", "qwen3")
    assert run("Qwen/Qwen3-0.6B", tmp_path) == 0
    assert fetched == []
    assert "already there" in capsys.readouterr().out


def test_one_missing_model_does_not_keep_the_others_away(tmp_path, fetched, capsys):
    assert run("Org/Missing,Qwen/Qwen3-0.6B", tmp_path) == 1
    out, err = capsys.readouterr()
    assert "Qwen/Qwen3-0.6B downloaded" in out
    assert err.startswith("error: Org/Missing: cannot download") and err.count("\n") == 1


def test_a_damaged_directory_is_named_with_the_remedy(tmp_path, fetched, capsys):
    directory = make_checkpoint(tmp_path / "Qwen__Qwen3-0.6B", "qwen3")
    (directory / "model.safetensors").write_bytes(b"short")
    assert run("Qwen/Qwen3-0.6B", tmp_path) == 1
    assert f"remove {directory}" in capsys.readouterr().err


def test_what_is_no_hub_id_is_refused(tmp_path, fetched, capsys):
    assert run("../outside", tmp_path) == 1
    assert "not a hub id" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(" ,", tmp_path)
    assert ended.value.code == 2
