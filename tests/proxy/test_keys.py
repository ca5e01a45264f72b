"""The keys file: hashes only, mode 0600, changed whole, and never silently empty."""

import hashlib
import os
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import ConfigError, InvalidRequest
from aegaeon.proxy.keys import KeyRing, checked_key, create_key, read_keys, revoke_key


def test_a_key_is_kept_as_a_hash_only_in_a_file_of_its_owner(tmp_path):
    file = tmp_path / "deep" / "keys.json"
    before = os.umask(0)
    try:
        secret = create_key(file, checked_key({"name": "a"}))
    finally:
        os.umask(before)
    text = file.read_text()
    assert secret.startswith("aeg-") and len(secret) == 47
    assert secret not in text and secret[4:] not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


def test_a_ring_finds_exactly_its_keys(tmp_path):
    file = tmp_path / "keys.json"
    secrets = {name: create_key(file, checked_key({"name": name})) for name in ("a", "b", "c")}
    assert len(set(secrets.values())) == 3
    ring = KeyRing(file)
    for name, secret in secrets.items():
        assert ring.find(secret).name == name
    for wrong in ("", "aeg-", secrets["a"][:-1], secrets["a"] + "A", secrets["a"].swapcase()):
        assert ring.find(wrong) is None
    revoke_key(file, "b")
    assert ring.find(secrets["b"]).name == "b"
    assert ring.refresh() and not ring.refresh()
    assert ring.find(secrets["b"]) is None and ring.find(secrets["c"]).name == "c"


def test_revoking_the_last_key_leaves_nobody_and_not_everybody(tmp_path):
    file = tmp_path / "keys.json"
    secret = create_key(file, checked_key({"name": "a"}))
    revoke_key(file, "a")
    ring = KeyRing(file)
    assert ring.find(secret) is None


@given(st.text(max_size=600))
def test_no_other_text_is_a_key(text):
    ring = KeyRing.__new__(KeyRing)
    ring._keys = ((hashlib.sha256(b"right").digest(), checked_key({"name": "a"})),)
    assert (ring.find(text) is None) == (text != "right")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no keys file"),
        ("[]", "is no keys file"),
        ("[" * 100_000, "is no keys file"),
        ('{"keys": [{"name": "a"}]}', "missing required field `sha256`"),
        ('{"keys": [{"name": "a", "sha256": "00"}]}', "sha256"),
        ('{"keys": [], "key": 1}', "unknown field"),
        ('{"keys": [{"name": "a", "sha256": "%s", "scopes": ["root"]}]}' % ("0" * 64), "root"),
        (
            '{{"keys": [{0}, {0}]}}'.format('{"name": "a", "sha256": "%s"}' % ("0" * 64)),
            "two keys named 'a'",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_error(tmp_path, text, message):
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(file)


def test_a_missing_file_is_an_error_with_its_remedy(tmp_path):
    with pytest.raises(ConfigError, match="aegaeon keys create NAME --keys-file"):
        KeyRing(tmp_path / "none.json")


@pytest.mark.parametrize(
    "values",
    [
        {"name": ""},
        {"name": "../x"},
        {"name": "a b"},
        {"name": "a", "scopes": ["all"]},
        {"name": "a", "weight": 0},
        {"name": "a", "weight": float("nan")},
        {"name": "a", "weight": float("inf")},
    ],
)
def test_keys_that_cannot_be_are_refused(values):
    with pytest.raises(ConfigError, match="bad key"):
        checked_key(values)


def test_names_are_unique_and_only_known_ones_are_revoked(tmp_path):
    file = tmp_path / "keys.json"
    create_key(file, checked_key({"name": "a"}))
    with pytest.raises(ConfigError, match="has a key named 'a'"):
        create_key(file, checked_key({"name": "a"}))
    with pytest.raises(InvalidRequest, match="no key named 'b'"):
        revoke_key(file, "b")


def test_keys_made_at_once_are_all_kept(tmp_path):
    file = tmp_path / "keys.json"
    names = [f"key-{number}" for number in range(12)]
    threads = [
        threading.Thread(target=create_key, args=(file, checked_key({"name": name})))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(key.name for key in read_keys(file)) == sorted(names)
