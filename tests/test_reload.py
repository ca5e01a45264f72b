"""A running server follows its file: models and bounds at once, the rest not, a broken one not."""

import json
import os
import signal

import httpx
import msgspec
import pytest

from aegaeon.cli import main
from aegaeon.config import ModelSettings, Settings, check_settings, load_settings
from aegaeon.config_command import settings_schema
from aegaeon.errors import ConfigError
from aegaeon.models.references import resolve_all, served_models
from aegaeon.reload import Reloader
from aegaeon.specs import Catalog
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.server import ROOT, Server


def test_the_published_schema_is_that_of_the_settings():
    published = json.loads((ROOT / "docs" / "settings.schema.json").read_text())
    assert published == settings_schema(), "run: aegaeon config schema > docs/settings.schema.json"
    settings = published["$defs"]["Settings"]
    assert set(settings["properties"]) == set(Settings.__struct_fields__)
    assert settings["additionalProperties"] is False
    assert set(published["$defs"]["ModelSettings"]["properties"]) == set(
        ModelSettings.__struct_fields__
    )


def test_a_file_is_checked_without_serving_it(tmp_path, capsys):
    file = tmp_path / "server.toml"
    file.write_text('[[models]]\nreference = "a"\nslo-ttft-s = 2.0\naliases = ["x"]\n')
    assert main(["config", "check", str(file)]) == 0
    assert "is valid" in capsys.readouterr().out
    file.write_text('models = [{reference = "a", priority = 1}]\n')
    assert main(["config", "check", str(file)]) == 2
    assert "priority" in capsys.readouterr().err
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == settings_schema()


def test_models_have_settings_of_their_own(tmp_path):
    make_checkpoint(tmp_path / "a", "llama")
    file = tmp_path / "server.yaml"
    file.write_text(
        "models:\n- plain=a\n- {reference: a, id: mine, aliases: [x, y], slo_tbt_s: 0.5,"
        " slo_ttft_s: 3, pinned: true, priority: low, idle-s: 60}\n"
    )
    settings = load_settings({"models_dir": str(tmp_path)}, {}, str(file))
    plain, mine = resolve_all(settings.models, settings.models_dir)
    assert (plain.id, plain.aliases, plain.slo_ttft_s) == ("plain", (), 0.0)
    assert (mine.id, mine.names, mine.is_pinned) == ("mine", ("mine", "x", "y"), True)
    assert (mine.slo_ttft_s, mine.slo_tbt_s) == (3.0, 0.5)
    assert (plain.priority, plain.idle_s) == ("normal", 0.0)
    assert (mine.priority, mine.idle_s) == ("low", 60.0)
    again = check_settings(msgspec.to_builtins(settings))
    assert again == settings
    with pytest.raises(ConfigError, match="both be served as 'plain'"):
        resolve_all(("plain=a", ModelSettings(reference="a", id="b", aliases=("plain",))), tmp_path)


class Followed:
    """A server on the null device whose file is rewritten; models a and b are there."""

    def __init__(self, directory):
        self._models_dir = directory / "models"
        for name in ("a", "b"):
            make_checkpoint(self._models_dir / name, "llama")
        self._file, self._part = directory / "server.toml", directory / "part"
        self.write('["a"]')
        self.server = Server(directory, {}, "--device", "null", "--config", str(self._file))
        flags = self.server._flags
        del flags[flags.index("--models") :]

    def write(self, models, *more):
        lines = [f"models = {models}", f'models_dir = "{self._models_dir}"', *more]
        self._part.write_text("\n".join(lines))
        self._part.replace(self._file)

    def get(self, path):
        return httpx.get(self.server.url + path, timeout=30).json()

    def ids(self):
        return [card["id"] for card in self.get("/v1/models")["data"]]

    def complete(self, model, size=1):
        body = {"model": model, "prompt": "x" * size, "max_tokens": 2}
        return httpx.post(self.server.url + "/v1/completions", json=body, timeout=30).status_code

    def has_read(self, times):
        return self.server.log.read_text().count("configuration read again") >= times


class Kept:
    """A reloader whose supervisor only keeps a catalogue; models a, b and c are there."""

    def __init__(self, directory):
        for name in ("a", "b", "c"):
            make_checkpoint(directory / name, "llama")
        self.models_dir, self.file = directory, directory / "server.json"
        self.write(["a", "b"])
        self.settings = self.load()
        specs = served_models(self.settings)
        self.catalog = Catalog(models=specs)
        self.reloader = Reloader(self.file, self.load, self.settings, self, specs)

    def write(self, models, **more):
        values = {"models": models, "models_dir": str(self.models_dir), "device": "null", **more}
        self.file.write_text(json.dumps(values))

    def load(self):
        return load_settings({}, {}, str(self.file))

    def change(self, make):
        self.catalog = make(self.catalog)

    def administer(self, name, **changes):
        spec = msgspec.structs.replace(self.catalog.find(name), **changes)
        self.catalog = self.catalog.with_model(spec)

    def follow(self, models, **more):
        self.write(models, **more)
        self.reloader.ask()
        self.reloader.look()
        assert self.catalog.complaint == ""

    def served(self):
        return {spec.id: (spec.is_pinned, spec.is_draining) for spec in self.catalog.models}


def test_what_administrators_did_outlives_changes_of_other_entries(tmp_path):
    one = Kept(tmp_path)
    one.administer("a", is_pinned=True)
    one.administer("b", is_draining=True)
    one.follow(["a", "b"], max_body_bytes=5000)
    assert one.served() == {"a": (True, False), "b": (False, True)}
    assert one.catalog.bounds.max_body_bytes == 5000
    one.catalog = one.catalog.without_model("b")  # it has drained
    one.follow(["a", "b", "c"])
    assert one.served() == {"a": (True, False), "c": (False, False)}


def test_an_entry_that_changed_is_served_as_it_says(tmp_path):
    one = Kept(tmp_path)
    one.administer("a", is_pinned=True)
    one.administer("b", is_draining=True)
    one.follow([{"reference": "a", "aliases": ["x"]}, {"reference": "b", "aliases": ["y"]}])
    # The entry says of pinning what it said before, so the administrator's word holds.
    assert one.served() == {"a": (True, False), "b": (False, False)}
    assert one.catalog.find("x").id == "a"
    one.follow([{"reference": "a", "aliases": ["x"], "pinned": True}])
    one.follow([{"reference": "a", "aliases": ["x"]}, "b"])
    assert one.served() == {"a": (False, False), "b": (False, False)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"models_dir": "elsewhere"}, "models_dir"),
        ({"quantize": "int8"}, "quantize"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype"),
    ],
)
def test_what_needs_a_restart_keeps_no_model_away(tmp_path, caplog, changes, named):
    one = Kept(tmp_path)
    before = one.catalog.find("a")
    if "models_dir" in changes:
        for name in ("a", "b", "c"):
            make_checkpoint(tmp_path / "elsewhere" / name, "llama")
        changes = {"models_dir": str(tmp_path / "elsewhere")}
    one.follow(["a", "b", "c"], **changes)
    assert f"restart the server for what has changed of: {named}" in caplog.text
    assert set(one.served()) == {"a", "b", "c"} and one.catalog.find("a") == before
    # As those that were there: the rest of the server still is what it was.
    new = one.catalog.find("c")
    assert (new.path, new.quantize) == (str(tmp_path / "c"), "none")
    assert new.kv_token_bytes == before.kv_token_bytes
    caplog.clear()
    one.follow(["a", "b"])
    assert "restart" not in caplog.text


def test_half_a_file_that_an_editor_writes_is_not_followed(tmp_path, caplog):
    one = Kept(tmp_path)
    one.write(["a"])  # what has been written so far
    one.reloader.look()
    assert set(one.served()) == {"a", "b"}
    one.write(["a", "b", "c"])
    one.reloader.look()
    assert one.served() == {"a": (False, False), "b": (False, False)}
    one.reloader.look()
    assert one.served() == dict.fromkeys("abc", (False, False))
    assert "not read again" not in caplog.text


def test_a_file_that_is_renamed_away_for_a_moment_is_no_fault(tmp_path, caplog):
    one = Kept(tmp_path)
    one.file.rename(tmp_path / "server.json~")  # as some editors do before they write
    one.reloader.look()
    assert one.catalog.complaint == "" and not caplog.records
    one.write(["a"])
    for _ in range(2):
        one.reloader.look()
    assert one.served() == {"a": (False, False), "b": (False, True)}
    one.file.unlink()
    for _ in range(3):
        one.reloader.look()
    assert one.catalog.complaint and caplog.text.count("not read again, the old one stays") == 1
    assert one.served() == {"a": (False, False), "b": (False, True)}
    one.write(["a", "c"])
    for _ in range(2):
        one.reloader.look()
    assert one.catalog.complaint == "" and "c" in one.served()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "server.json"),
        ("", "server.json"),
        ('{"models": ["a"], "max_opne": 5}', "max_opne"),
        ('{"models": ["a"], "max_open": 0}', "max_open"),
        ('{"models": []}', "models"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing_and_is_told_of(tmp_path, caplog, text, named):
    one = Kept(tmp_path)
    one.file.write_text(text)
    one.reloader.ask()
    one.reloader.look()
    assert one.catalog.complaint and set(one.served()) == {"a", "b"}
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "the old one stays" in told and named in told


def test_a_model_whose_files_would_be_others_stays_until_it_is_taken_out(tmp_path, caplog):
    one = Kept(tmp_path)
    one.write(["a", "b=c"])
    one.reloader.ask()
    one.reloader.look()
    assert one.catalog.complaint and one.catalog.find("b").path == str(tmp_path / "b")
    assert "take it out of the file first" in caplog.text


def test_a_server_follows_its_file(tmp_path):
    one = Followed(tmp_path)
    with one.server as server:
        assert one.ids() == ["a"]
        bee = '{reference = "b", aliases = ["bee"]}'
        one.write(f'["a", {bee}]', "max_body_bytes = 2000", "max_batch = 3")
        eventually(lambda: one.ids() == ["a", "b"], 20)
        eventually(lambda: one.complete("bee") == 200, 20)
        assert one.complete("a", 3000) == 413
        assert "restart the server for what has changed of: max_batch" in server.log.read_text()
        one.write('["a", "nowhere"]')
        eventually(lambda: one.get("/health")["complaint"], 20)
        assert str(tmp_path) not in one.get("/health")["complaint"]
        assert one.ids() == ["a", "b"] and one.complete("bee") == 200
        one.write('["b"]')
        eventually(lambda: one.ids() == ["b"], 20)
        assert one.get("/health")["complaint"] is None and one.has_read(2)
        # A hang-up asks for it, too, and ends nothing.
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: one.has_read(3), 20)
        assert one.complete("b") == 200


def test_commands_change_a_running_server(tmp_path, capsys):
    models_dir = tmp_path / "models"
    for name in ("a", "Org__b"):
        make_checkpoint(models_dir / name, "llama")
    flags = ("--device", "null", "--models-dir", str(models_dir))
    with Server(tmp_path, {"a": models_dir / "a"}, *flags) as server:

        def run(*words):
            code = main(["models", *words, "--url", server.url])
            captured = capsys.readouterr()
            return code, captured.out + captured.err

        assert run("add", "Org/b", "--aliases", "bee") == (0, "Org/b: served\n")
        assert run("pin", "bee") == (0, "Org/b: pinned\n")
        assert run("unpin", "Org/b") == (0, "Org/b: unpinned\n")
        code, said = run("add", str(models_dir / "a"))
        assert code == 1 and "not a path" in said
        code, said = run("add", "Org/b")
        assert code == 1 and "is taken" in said
        assert run("remove", "Org/b") == (0, "Org/b: draining\n")
        code, said = run("remove", "zzz")
        assert code == 1 and "no model 'zzz'" in said
    assert main(["models", "pin", "a", "--url", server.url]) == 1
    assert "no server answers" in capsys.readouterr().err
