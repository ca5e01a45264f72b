"""Which of a cluster's models are on a node, by its models directory."""

import shutil

import msgspec

from aegaeon.memory.front import tokenizer_bytes
from aegaeon.models.config import config_of, read_config
from aegaeon.models.here import LOOK_S, TEXTS, Here, for_all_nodes, stored_name
from aegaeon.models.references import describe_model
from tests.support.checkpoints import make_checkpoint


def made(tmp_path):
    """A model in node a's directory, as all nodes are told of it."""
    path = make_checkpoint(tmp_path / "a" / "Org__ada")
    return for_all_nodes(describe_model(path), tmp_path / "a")


def test_a_model_of_the_models_directory_is_told_by_its_name_alone(tmp_path):
    spec = made(tmp_path)
    assert (spec.id, spec.path, stored_name(spec)) == ("Org/ada", "Org__ada", "Org__ada")
    elsewhere = describe_model(tmp_path / "a" / "Org__ada", "chat")
    told = for_all_nodes(elsewhere, tmp_path / "b")
    assert told == elsewhere and stored_name(told) == "Org__ada"


def test_each_node_has_it_in_its_own_directory_once_it_has_come(tmp_path):
    spec, now = made(tmp_path), [0.0]
    (mine,) = Here(tmp_path / "a").present([spec])
    assert mine.path == str(tmp_path / "a" / "Org__ada")
    here = Here(tmp_path / "b", clock=lambda: now[0])
    assert here.present([spec]) == () and here.why_not(spec) == ""
    assert here.local(spec).path == str(tmp_path / "b" / "Org__ada")
    shutil.copytree(tmp_path / "a" / "Org__ada", tmp_path / "b" / "Org__ada")
    now[0] += LOOK_S
    (there,) = here.present([spec])
    assert there == msgspec.structs.replace(spec, path=str(tmp_path / "b" / "Org__ada"))


def test_a_model_named_by_its_path_is_used_from_there_where_that_is(tmp_path):
    path = make_checkpoint(tmp_path / "elsewhere" / "ada")
    spec = for_all_nodes(describe_model(path), tmp_path / "a")
    assert Here(tmp_path / "b").present([spec]) == (spec,)
    shutil.move(path, tmp_path / "gone")
    assert Here(tmp_path / "b").present([spec]) == ()
    assert Here(tmp_path / "b").local(spec).path == str(tmp_path / "b" / "ada")


def test_another_model_of_that_name_is_not_taken_for_it(tmp_path):
    spec = made(tmp_path)
    make_checkpoint(tmp_path / "b" / "Org__ada", num_hidden_layers=3)
    here = Here(tmp_path / "b")
    assert here.present([spec]) == ()
    why = here.why_not(spec)
    assert "not the model that the cluster serves as Org/ada" in why and "weight_bytes" in why
    (tmp_path / "c" / "Org__ada").mkdir(parents=True)
    assert "config.json" in Here(tmp_path / "c").why_not(spec)


def test_what_a_proxy_needs_of_a_model_may_be_there_without_its_weights(tmp_path):
    spec, here = made(tmp_path), Here(tmp_path / "b")
    assert here.for_text(spec) is None
    texts = tmp_path / "b" / TEXTS / "Org__ada"
    texts.mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "Org__ada" / "tokenizer.json", texts)
    assert here.for_text(spec).path == str(texts)
    assert here.present([spec]) == ()


def test_a_node_plans_with_what_the_spec_says_before_files_are_there(tmp_path, monkeypatch):
    spec = made(tmp_path)
    monkeypatch.chdir(tmp_path / "a")  # where a name alone would be found
    local = Here(tmp_path / "b").local(spec)
    assert config_of(local) == read_config(tmp_path / "a" / "Org__ada")
    assert tokenizer_bytes([local]) == tokenizer_bytes([Here(tmp_path / "a").local(spec)]) > 0
