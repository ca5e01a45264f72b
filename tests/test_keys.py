"""`aegaeon keys`, and that a server which is told of keys does not start without them."""

import json
import re

import pytest

from aegaeon.cli import main
from aegaeon.proxy.keys import KeyRing


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_made_shown_and_revoked(file, capsys):
    given = ["--scopes", "inference,admin", "--models", "a, b", "--weight", "2"]
    assert main(["keys", "create", "alice", "--keys-file", str(file), *given]) == 0
    secret = capsys.readouterr().out.strip()
    key = KeyRing(file).find(secret)
    assert (key.name, key.scopes, key.models) == ("alice", ("inference", "admin"), ("a", "b"))
    assert key.weight == 2
    assert main(["keys", "list", "--keys-file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "alice" in shown and "inference, admin" in shown
    assert main(["keys", "list", "--json", "--keys-file", str(file)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["keys"]
    assert row["name"] == "alice" and len(row["sha256"]) == 8
    assert main(["keys", "revoke", "alice", "--keys-file", str(file)]) == 0
    assert KeyRing(file).find(secret) is None


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["create", "a"], 2, "give --keys-file"),
        (["create", "a/b", "--keys-file", "{}"], 2, "bad key"),
        (["create", "a", "--scopes", "root", "--keys-file", "{}"], 2, "bad key"),
        (["create", "a", "--weight", "nan", "--keys-file", "{}"], 2, "bad key"),
        (["revoke", "a", "--keys-file", "{}"], 2, "there is no keys file"),
        (["list", "--keys-file", "{}"], 2, "there is no keys file"),
        (["drop"], 2, "invalid choice"),
    ],
)
def test_what_cannot_be_is_one_line(file, given, code, message, capsys):
    assert main(["keys", *(word.format(file) for word in given)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"aegaeon: error: .*\n", captured.err) and message in captured.err


def test_a_server_never_starts_without_the_keys_it_was_told_of(file, capsys):
    assert main(["serve", "--models", "a", "--keys-file", str(file)]) == 2
    assert "there is no keys file" in capsys.readouterr().err


def test_settings_may_name_the_file(file, tmp_path, capsys):
    config = tmp_path / "server.toml"
    config.write_text(f'keys_file = "{file}"\n')
    assert main(["keys", "create", "a", "--config", str(config)]) == 0
    assert KeyRing(file).find(capsys.readouterr().out.strip()) is not None
