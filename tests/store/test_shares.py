"""Memory of a machine that several owners share: made once, removed by the last."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aegaeon.config import Settings
from aegaeon.errors import BudgetTooSmall, ConfigError
from aegaeon.store.domains import claim_domain, sweep_domains
from aegaeon.store.names import region_path
from aegaeon.store.shares import share_memory, sweep_share


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def weights(directory: Path, name: str = "d") -> Path:
    return region_path(directory, name, "weights")


@pytest.fixture
def owner(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that has a share of `d`, and memory there."""
    script = textwrap.dedent(f"""
        import pathlib, time
        from aegaeon.store.shares import share_memory
        share = share_memory("d", lambda: b"theirs", pathlib.Path({str(directory)!r}))
        pathlib.Path({str(weights(directory))!r}).write_bytes(b"weights")
        print("up", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"up\n"
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_the_first_makes_it_and_the_last_removes_it(directory: Path):
    left_over = weights(directory)
    left_over.write_bytes(b"of the dead")
    first = share_memory("d", lambda: b"first", directory)
    assert not left_over.exists()
    left_over.write_bytes(b"weights")
    second = share_memory("d", lambda: b"second", directory)
    assert (first.layout, second.layout) == (b"first", b"first")
    first.release()
    first.release()
    assert left_over.exists()
    second.release()
    assert list(directory.iterdir()) == []


def test_it_is_nobody_elses_while_a_share_lives(directory: Path):
    share = share_memory("d", lambda: b"", directory)
    weights(directory).write_bytes(b"weights")
    with pytest.raises(ConfigError, match="belongs to a running server"):
        claim_domain(Settings(domain="d"), directory)
    assert sweep_domains(directory) == 0
    assert not sweep_share("d", directory)
    assert weights(directory).exists()
    share.release()


def test_one_whose_making_fails_leaves_it_to_the_next(directory: Path):
    def fail() -> bytes:
        raise BudgetTooSmall("no room")

    with pytest.raises(BudgetTooSmall):
        share_memory("d", fail, directory)
    assert list(directory.iterdir()) == []
    share = share_memory("d", lambda: b"made", directory)
    assert share.layout == b"made"
    share.release()


def test_a_killed_owner_leaves_it_to_those_that_live_and_then_to_the_next(directory, owner):
    mine = share_memory("d", lambda: b"mine", directory)
    assert mine.layout == b"theirs"
    owner.kill()
    owner.wait(10)
    assert weights(directory).exists()
    mine.release()
    assert list(directory.iterdir()) == []


def test_what_the_last_owner_left_by_dying_can_be_swept(directory, owner):
    assert not sweep_share("d", directory)
    owner.kill()
    owner.wait(10)
    assert weights(directory).exists()
    assert sweep_share("d", directory)
    assert list(directory.iterdir()) == []
    assert sweep_share("d", directory)


def test_owners_that_come_and_go_at_once_always_agree(directory: Path):
    """Each sees a layout that nobody has removed while it holds its share."""
    wrong: list[object] = []

    def come_and_go(number: int) -> None:
        try:
            for turn in range(30):
                share = share_memory("d", f"{number}.{turn}".encode, directory)
                held = region_path(directory, "d", "layout").read_bytes()
                if held != share.layout:
                    wrong.append((held, share.layout))
                share.release()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert list(directory.iterdir()) == []
