"""Who owns a domain of this node, and what becomes of what its owner leaves."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.store import domains
from aegaeon.store.domains import (
    claim_domain,
    domain_is_live,
    open_domain,
    removable_files,
    sweep_domains,
    sweep_mailboxes,
)
from aegaeon.store.names import domain_of, region_path
from aegaeon.store.redis import RedisDomain
from aegaeon.store.shm import ShmDomain

OWNER = """
    import sys, time
    from pathlib import Path
    from aegaeon.config import Settings
    from aegaeon.store.domains import claim_domain
    from aegaeon.store.shm import ShmDomain
    name, directory = sys.argv[1], Path(sys.argv[2])
    claim = claim_domain(Settings(domain=name), directory)
    domain = ShmDomain(name, directory)
    store = domain.metadata()
    mailbox = domain.create_mailbox("instance-0.1")
    print("claimed", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def owner_process(name: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(OWNER), name, str(directory)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def settings(name: str = "d") -> Settings:
    return Settings(domain=name)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_claim_is_live_until_released_and_leaves_nothing(directory: Path) -> None:
    assert not domain_is_live(settings(), directory)
    claim = claim_domain(settings(), directory)
    assert domain_is_live(settings(), directory)
    domain = ShmDomain("d", directory)
    domain.metadata()
    domain.create_mailbox("proxy-1")
    claim.release()
    claim.release()
    assert not domain_is_live(settings(), directory)
    assert files(directory) == []


def test_claiming_a_live_domain_names_its_owner_and_the_remedy(directory: Path) -> None:
    with claim_domain(settings(), directory):
        with pytest.raises(ConfigError, match=rf"pid {os.getpid()}.*--domain or --port"):
            claim_domain(settings(), directory)
        assert domain_is_live(settings(), directory)


def test_two_domains_live_side_by_side(directory: Path) -> None:
    with claim_domain(settings("a"), directory), claim_domain(settings("a.b"), directory):
        kept = ShmDomain("a.b", directory)
        kept.create_mailbox("box")
        ShmDomain("a", directory).unlink()
        kept.open_mailbox("box").send(b"x")
    assert files(directory) == []


def test_a_killed_owner_blocks_nobody_and_its_left_overs_go(directory: Path) -> None:
    with owner_process("d", directory) as owner:
        assert domain_is_live(settings(), directory)
        with pytest.raises(ConfigError, match=f"pid {owner.pid}"):
            claim_domain(settings(), directory)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert not domain_is_live(settings(), directory)
        assert len(files(directory)) == 4
        with claim_domain(settings(), directory):
            assert files(directory) == ["aegaeon-d.lock"]
            assert ShmDomain("d", directory).metadata().sync_for_routing() == ()
    assert files(directory) == []


def test_a_claim_sweeps_other_dead_domains_and_spares_live_ones(directory: Path) -> None:
    with owner_process("dead", directory) as dead, owner_process("live", directory):
        ShmDomain("unclaimed", directory).metadata()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        with claim_domain(settings("mine"), directory):
            owned = {domain_of(directory / name) for name in files(directory)}
            assert owned == {"live", "mine", "unclaimed"}
            assert sweep_domains(directory) == 0
            assert domain_is_live(settings("live"), directory)


def test_mailboxes_of_the_dead_are_swept_and_those_of_the_living_stay(directory: Path) -> None:
    with owner_process("d", directory) as other:
        mine = ShmDomain("d", directory)
        mine.create_mailbox("living")
        other.send_signal(signal.SIGSTOP)
        assert sweep_mailboxes("d", directory) == 0
        other.kill()
        other.wait()
        assert sweep_mailboxes("other", directory) == 0
        assert sweep_mailboxes("d", directory) == 1
        assert [name for name in files(directory) if "mailbox" in name] == [
            "aegaeon-d.mailbox+living"
        ]
        mine.close()


def test_what_a_claim_would_remove_is_told_without_removing_it(directory: Path) -> None:
    with owner_process("dead", directory) as dead, owner_process("live", directory):
        ShmDomain("unclaimed", directory).metadata()
        ShmDomain("mine", directory).metadata()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        before = files(directory)
        removable = removable_files(settings("mine"), directory)
        assert {domain_of(path) for path in removable} == {"dead", "mine"}
        assert len(removable) == len(set(removable)) == 5
        assert files(directory) == before
        own = removable_files(settings("live"), directory)
        assert {domain_of(path) for path in own} == {"dead", "live"}


def test_half_made_regions_of_killed_processes_are_swept(directory: Path) -> None:
    left_overs = [
        "aegaeon-d.lock",
        "aegaeon-d.mailbox+x.1.new-12-0",
        "aegaeon-d.instances.new-12-3",
    ]
    for name in left_overs:
        (directory / name).write_bytes(b"")
    (directory / "somebody-elses").write_bytes(b"")
    assert sweep_domains(directory) == 1
    assert files(directory) == ["somebody-elses"]


def test_damaged_left_overs_do_not_block_a_claim(directory: Path) -> None:
    region_path(directory, "d", "instances").write_bytes(b"\xff" * 8192)
    with claim_domain(settings(), directory):
        assert ShmDomain("d", directory).metadata().sync_for_routing() == ()


def test_looking_at_a_domain_does_not_disturb_its_claim(directory: Path) -> None:
    for _ in range(20):
        with claim_domain(settings(), directory):
            assert domain_is_live(settings(), directory)
        assert not domain_is_live(settings(), directory)


@pytest.mark.parametrize("name", ["../etc", "a/b", ".x", "a b", "a+b", "x" * 101])
def test_a_domain_name_is_never_a_path(directory: Path, name: str) -> None:
    for use in (claim_domain, domain_is_live):
        with pytest.raises(ConfigError, match="letters, digits"):
            use(settings(name), directory)
    with pytest.raises(ConfigError, match="letters, digits"):
        open_domain(settings(name))
    assert files(directory) == []


def test_no_shared_memory_is_said_with_the_remedy(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*mount a tmpfs"):
        claim_domain(settings(), directory / "missing")


FILL = """
    import sys
    from pathlib import Path
    from aegaeon.errors import RegionError
    from aegaeon.store.shm import ShmDomain
    directory = Path(sys.argv[1])
    domain = ShmDomain("d", directory)
    for make in (domain.metadata, lambda: domain.create_mailbox("box", 8 << 20)):
        try:
            make()
        except RegionError as error:
            print(error)
    print("left:", *directory.iterdir())
"""


def test_full_shared_memory_is_found_when_a_region_is_made(directory: Path) -> None:
    script = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh"]
    try:
        made = subprocess.run([*command[:4], "true"], check=False, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so there is no small tmpfs to fill")
    if made.returncode:
        pytest.skip("no user namespaces here, so there is no small tmpfs to fill")
    arguments = [str(directory), sys.executable, textwrap.dedent(FILL)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, *arguments], check=True, capture_output=True, text=True, cwd=root, timeout=60
    )
    *errors, left = done.stdout.splitlines()
    assert len(errors) == 2
    assert all("shm-size" in error for error in errors)
    assert left == "left:"


def test_the_backend_setting_chooses_the_store(redis_server, domain_name: str) -> None:
    assert isinstance(open_domain(settings(domain_name)), ShmDomain)
    over_redis = Settings(domain=domain_name, metadata_backend="redis", redis_url=redis_server.url)
    domain = open_domain(over_redis)
    assert isinstance(domain, RedisDomain)
    domain.close()


def test_a_claim_over_redis_removes_what_lies_on_this_node(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        def unlink(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setitem(domains._DOMAINS, "redis", lambda settings, _: Elsewhere())
    with claim_domain(Settings(domain="d", metadata_backend="redis"), directory):
        for name in ("d.weights", "d.weights+3-1", "d.kv", "other.weights"):
            (directory / f"aegaeon-{name}").write_bytes(b"on this node")
    assert files(directory) == ["aegaeon-other.weights"]


def test_a_claim_over_redis_begins_empty_and_leaves_nothing(
    redis_server, domain_name: str, directory: Path
) -> None:
    over_redis = Settings(domain=domain_name, metadata_backend="redis", redis_url=redis_server.url)
    left_over = open_domain(over_redis)
    left_over.create_mailbox("box")
    with claim_domain(over_redis, directory):
        assert not left_over._link.client.keys(f"*{domain_name}*")
        with pytest.raises(ConfigError, match="running server"):
            claim_domain(over_redis, directory)
        left_over.metadata().record_assignment("r", "i", 60)
        for name in ("weights", "weights+3-1", "kv"):
            (directory / f"aegaeon-{domain_name}.{name}").write_bytes(b"on this node")
    assert not left_over._link.client.keys(f"*{domain_name}*")
    assert files(directory) == []
    left_over.close()
