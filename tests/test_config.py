"""Settings from files, the environment and flags."""

import msgspec
import pytest

from aegaeon.config import (
    Settings,
    check_settings,
    child_environment,
    describe,
    load_settings,
)
from aegaeon.errors import ConfigError
from aegaeon.nodes import ClusterSettings, NodeSettings
from aegaeon.setting_text import parse_text


def test_defaults_are_valid():
    assert load_settings({}, {}) == Settings()


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nhost = "file"\nmodels = ["a"]\nmax-batch = 3\n')
    environ = {"AEGAEON_PORT": "2", "AEGAEON_HOST": "environ", "HOME": "/"}
    settings = load_settings({"port": 3}, environ, str(file))
    assert (settings.port, settings.host, settings.models) == (3, "environ", ("a",))
    assert settings.max_batch == 3


def test_yaml_and_the_file_named_by_the_environment_are_read(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("models: [a, b]\nlease_s: 5\n")
    settings = load_settings({}, {"AEGAEON_CONFIG": str(file)})
    assert settings.models == ("a", "b") and settings.lease_s == 5.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", "port = ", "is not valid toml"),
        ("x.yaml", "a: [", "is not valid yaml"),
        ("x.yaml", "- a", "name: value"),
        ("x.toml", "prot = 1", "unknown setting 'prot'"),
        ("x.toml", 'port = "80"', r"bad setting: Expected `int`, got `str` - at `\$.port`"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings({}, {}, str(file))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_settings({}, {}, str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("AEGAEON_PROT", "1", "unknown environment variable AEGAEON_PROT"),
        ("AEGAEON_PORT", "eighty", "AEGAEON_PORT must be of type int"),
        ("AEGAEON_PRELOAD_MODELS", "maybe", "must be true or false"),
        ("AEGAEON_PORT", "70000", "port"),
        ("AEGAEON_DEVICE", "tpu", "device"),
        ("AEGAEON_SLO_TBT_S", "nan", "slo_tbt_s"),
        ("AEGAEON_LEASE_S", "inf", "lease_s"),
        ("AEGAEON_DOMAIN", "../x", "domain"),
    ],
)
def test_a_bad_variable_is_one_clear_error(key, text, message):
    with pytest.raises(ConfigError, match=message):
        load_settings({}, {key: text})


def test_lists_and_booleans_parse():
    environ = {"AEGAEON_MODELS": "a, b,,c=d", "AEGAEON_PRELOAD_MODELS": "yes"}
    settings = load_settings({}, environ)
    assert settings.models == ("a", "b", "c=d") and settings.preload_models
    assert parse_text(bool, "off", "--x") is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colocated_count": 0, "prefill_count": 1}, "no instance decodes; set --decode-count"),
        ({"colocated_count": 0, "decode_count": 1}, "no instance prefills; set --prefill-count"),
    ],
)
def test_roles_that_do_not_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(values)


@pytest.mark.parametrize(
    ("device", "others", "count"), [("cpu", 0, 2), ("cuda:0", 0, 1), ("null", 0, 1), ("cpu", 1, 0)]
)
def test_the_cpu_is_two_instances_where_nothing_is_said(device, others, count):
    values = {"device": device, "prefill_count": others, "decode_count": others}
    assert check_settings(values).colocated == count
    assert check_settings(values | {"colocated_count": 3}).colocated == 3


def test_instances_have_their_roles_by_index():
    settings = check_settings({"colocated_count": 1, "prefill_count": 2, "decode_count": 1})
    roles = [settings.role_of(index) for index in range(settings.instance_count)]
    assert roles == ["colocated", "prefill", "prefill", "decode"]


def test_every_setting_is_described():
    for field in msgspec.structs.fields(Settings):
        _, text, default = describe(field.name)
        assert text and default == field.default


def test_a_cluster_is_an_address_or_a_table(tmp_path):
    assert load_settings({}, {}).clustered is None
    assert load_settings({"cluster": "auto"}, {}).clustered == ClusterSettings()
    file = tmp_path / "server.toml"
    file.write_text(
        '[cluster]\nproxies = 2\n[[cluster.nodes]]\nlabels = {pool = "gpu"}\ndevice = "cuda"\n'
    )
    rules = (NodeSettings(labels={"pool": "gpu"}, device="cuda"),)
    settings = load_settings({}, {}, str(file))
    assert settings.clustered == ClusterSettings(proxies=2, nodes=rules)
    settings = load_settings({}, {"AEGAEON_CLUSTER": "10.0.0.1:6379"}, str(file))
    assert settings.clustered == ClusterSettings(address="10.0.0.1:6379", proxies=2, nodes=rules)
    with pytest.raises(ConfigError, match="instnces"):
        check_settings({"cluster": {"nodes": [{"instnces": 2}]}})


def test_the_domain_follows_the_port_unless_named():
    assert Settings(port=9).domain_name == "port-9"
    assert Settings(domain="x").domain_name == "x"


def test_settings_survive_json():
    settings = Settings(models=("a",), lease_s=3.0)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_a_childs_environment_has_ours_below(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("CHANGED", "1")
    environment = child_environment({"CHANGED": "2"})
    assert (environment["KEPT"], environment["CHANGED"]) == ("1", "2")


def test_threads_have_an_upper_bound():
    assert check_settings({"threads_per_instance": 1024}).threads_per_instance == 1024
    with pytest.raises(ConfigError, match=r"<= 1024.*threads_per_instance"):
        check_settings({"threads_per_instance": 1025})


def test_float16_keys_and_values_are_for_cuda():
    assert check_settings({"device": "cuda:1", "kv_dtype": "float16"}).stored_kv == "float16"
    for device in ("cpu", "staged", "null"):
        with pytest.raises(ConfigError, match="give --kv-dtype bfloat16, or --device cuda:0"):
            check_settings({"device": device, "kv_dtype": "float16"})


def test_devices_are_known_by_their_names():
    assert check_settings({"device": "cuda:12"}).cuda_number == 12
    numbers = [check_settings({"device": name}).cuda_number for name in ("cpu", "staged")]
    assert numbers == [None, None]
    owns = {name: check_settings({"device": name}).has_own_memory for name in ("cpu", "cuda:0")}
    assert owns == {"cpu": False, "cuda:0": True}
    for wrong in ("cuda", "cuda:", "cuda:-1", "cuda:x", "CPU", ""):
        with pytest.raises(ConfigError, match="give cpu, staged, null, or cuda:N"):
            check_settings({"device": wrong})
