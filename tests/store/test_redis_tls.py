"""Redis over TLS and with passwords: what is wrong is one line with the remedy, and shows none."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import aegaeon.store.redis_link
from aegaeon.errors import ConfigError, StoreUnavailable
from aegaeon.store.redis import RedisDomain
from aegaeon.store.redis_url import read_place
from tests.support.redis_server import RedisServer, require_redis
from tests.support.redis_tls import Certificates, require_tls

PASSWORD = "s3cret/#?@"
ENCODED = "s3cret%2F%23%3F%40"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    require_redis()
    require_tls()
    return Certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    servers = []

    def start(*flags: str, query: str, password: str = "") -> RedisServer:
        servers.append(RedisServer(tmp_path, password, flags, query))
        servers[-1].start(persistent=False)
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def works(url: str) -> None:
    domain = RedisDomain("d", url)
    box = domain.create_mailbox("box")
    domain.open_mailbox("box").send(b"x")
    assert box.receive(5) == [b"x"]
    domain.unlink()
    domain.close()


def fault(url: str, caplog: pytest.LogCaptureFixture) -> str:
    """Why it cannot be used; found at once, and told in one line that shows no password."""
    caplog.set_level(logging.DEBUG)
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        RedisDomain("d", url, patience_s=60)
    assert time.monotonic() - began_s < 55  # not after all its patience
    told = str(caught.value)
    assert "\n" not in told
    assert "s3cret" not in told + caplog.text
    return told


def test_tls_with_an_authority_a_user_and_a_certificate_of_ours(
    authority: Certificates, start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.sign("client")
    ours = f"&ssl_certfile={certificate}&ssl_keyfile={key}"
    query = f"?ssl_ca_certs={authority.ca}"
    server = start(
        *authority.server_flags(asks=True),
        *("--user", "aegaeon", "on", f">{PASSWORD}", "~*", "&*", "+@all"),
        query=query + ours,
    )
    plain = server.url
    secret = tmp_path / "password"
    secret.write_text(PASSWORD + "\n")
    works(plain.replace("//", f"//aegaeon:{ENCODED}@"))
    works(plain.replace("//", "//aegaeon@") + f"&password_file={secret}")
    assert "password" in fault(plain.replace("//", f"//aegaeon:{ENCODED}x@"), caplog)
    without = plain.replace("//", f"//aegaeon:{ENCODED}@").replace(ours, "")
    assert "ssl_certfile" in fault(without, caplog)


def test_a_certificate_that_is_not_trusted_or_for_another_name_is_said(
    authority: Certificates, start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = authority.server_flags(asks=False, alternative="DNS:elsewhere")
    blind = "&ssl_check_hostname=false"
    url = start(*flags, query=f"?ssl_ca_certs={authority.ca}{blind}").url.replace(blind, "")
    other = Certificates(tmp_path / "other")
    assert "ssl_ca_certs" in fault(url.replace(str(authority.ca), str(other.ca)), caplog)
    assert "ssl_ca_certs" in fault(url.partition("?")[0], caplog)
    assert "another name" in fault(url, caplog)
    works(url + blind)
    assert "rediss://" in fault(url.replace("rediss", "redis"), caplog)


def test_tls_to_a_port_without_it_is_said(
    authority: Certificates, start, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(aegaeon.store.redis_link, "SOCKET_TIMEOUT_S", 0.5)
    url = start(query="", password="s3cret").url
    assert "does not speak TLS" in fault(url.replace("redis", "rediss"), caplog)


def test_a_password_file_is_read_at_each_connection(start, tmp_path: Path) -> None:
    url = start(query="", password="first").url
    secret = tmp_path / "password"
    secret.write_text("first\n")
    domain = RedisDomain("d", url.replace(":first@", "") + f"?password_file={secret}")
    domain._link.client.config_set("requirepass", "second")
    secret.write_text("second\n")
    domain._link.client.connection_pool.disconnect()
    assert domain.metadata().sync_for_routing() == ()
    domain.close()


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("redis://u:s3cret/x@host/0", "%XX"),
        ("redis://u:1?s3cret@host/0", "%XX"),
        ("redis://u:1#s3cret@host/0", "%XX"),
        ("redis://u:1/s3cret@host/0", "%XX"),
        ("redis://u:s3cret@host/0?ssl_ca_cert=x", "known are"),
        ("rediss://u:s3cret@host/0?ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("redis://u@host/0?password_file=/nowhere/s", "/nowhere/s"),
        ("rediss://u:s3cret@host/0?ssl_cert_reqs=never", "rediss://"),
        ("redis://u:s3cret@host,other/0", "redis+sentinel://host,host"),
        ("redis+sentinel://u:s3cret@host,other", "service"),
        ("redis://u:s3cret@host/zero", "number"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(url: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_place(url)
    assert remedy in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("joined", [True, False])
def test_a_password_on_the_command_line_is_covered_once_it_is_read(joined: bool) -> None:
    script = (
        "import argparse; from pathlib import Path; from aegaeon.flags import add_setting;"
        "parser = argparse.ArgumentParser(); add_setting(parser, 'redis_url');"
        "print(parser.parse_args().redis_url); print(Path('/proc/self/cmdline').read_text())"
    )
    url = "redis://u:s3cret@host:1/0?password_file=f"
    words = [f"--redis-url={url}"] if joined else ["--redis-url", url]
    told = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    read, seen = told.stdout.splitlines()
    assert read == url
    assert "redis://**" in seen and "s3cret" not in seen


def test_what_a_url_of_sentinels_says() -> None:
    place = read_place("rediss+sentinel://u:p%40@one:1,two,[::1]:3/main/2?sentinel_password=s")
    assert place.servers == (("one", 1), ("two", 26379), ("::1", 3))
    assert (place.service, place.database, place.is_tls) == ("main", 2, True)
    assert (place.login.username, place.login.read()) == ("u", "p@")
    assert place.sentinel_login.read() == "s"
    assert place.shown == "rediss+sentinel://u@one:1,two,[::1]:3/main/2"
    assert "p@" not in repr(place)
