"""What every Board promises (aegaeon/store/base.py), and how files keep it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aegaeon.errors import ConfigError, RegionError
from aegaeon.store.base import Domain
from aegaeon.store.board import _HEADER, FileBoard
from aegaeon.store.names import BOARDS, region_path


def test_the_last_record_of_each_name_is_seen_by_everyone(
    open_domain: Callable[[], Domain],
) -> None:
    one, other, reader = (open_domain().board() for _ in range(3))
    assert reader.read() == {}
    one.publish("i-0", b"first")
    other.publish("proxy", b"")
    assert reader.read() == {"i-0": b"first", "proxy": b""}
    for number in range(5):
        one.publish("i-0", b"%d" % number * (5 - number))
        assert reader.read()["i-0"] == b"%d" % number * (5 - number)


def test_a_record_outlives_its_writer_and_its_successor_goes_on(
    open_domain: Callable[[], Domain],
) -> None:
    first = open_domain().board()
    for record in (b"a", b"b", b"c"):
        first.publish("i", record)
    first.close()
    reader = open_domain().board()
    assert reader.read() == {"i": b"c"}
    second = open_domain().board()
    for record in (b"d", b"e", b"f"):
        second.publish("i", record)
        assert reader.read() == {"i": record}


def test_it_goes_with_the_domain(open_domain: Callable[[], Domain]) -> None:
    domain = open_domain()
    domain.board().publish("i", b"x")
    domain.unlink()
    assert open_domain().board().read() == {}


@pytest.mark.parametrize("name", ["", "a/b", "a+b", ".a"])
def test_a_name_leads_nowhere_else(domain: Domain, name: str) -> None:
    with pytest.raises(ConfigError):
        domain.board().publish(name, b"x")


def test_records_are_whole_while_they_are_replaced(open_domain: Callable[[], Domain]) -> None:
    writer, reader = open_domain().board(), open_domain().board()
    is_over = threading.Event()

    def write() -> None:
        for number in range(300):
            writer.publish("i", b"%03d" % number * (1 + number * 37 % 5000))
        is_over.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not is_over.is_set():
        record = reader.read().get("i", b"")
        assert record == record[:3] * (len(record) // 3)
        seen.append(record[:3])
    thread.join()
    assert seen == sorted(seen) and reader.read()["i"][:3] == b"299"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [region_path(tmp_path, "d", kind, "i") for kind in BOARDS]


@pytest.mark.parametrize("spoilt", [b"", b"x" * 100, b"\0" * 28])
def test_a_writer_that_was_killed_spoils_one_record_only(
    tmp_path: Path, paths: list[Path], spoilt: bytes
) -> None:
    board = FileBoard("d", tmp_path)
    for record in (b"one", b"two", b"three"):
        board.publish("i", record)
    three = max(paths, key=lambda path: _HEADER.unpack_from(path.read_bytes())[1])
    three.write_bytes(three.read_bytes()[: _HEADER.size] + spoilt if spoilt else b"")
    assert FileBoard("d", tmp_path).read() == {"i": b"two"}
    after = FileBoard("d", tmp_path)
    after.publish("i", b"four")
    assert board.read() == {"i": b"four"}
    after.publish("i", b"five")
    assert board.read() == {"i": b"five"}


def test_what_is_written_after_the_domain_was_removed_leaves_nothing(
    tmp_path: Path, paths: list[Path]
) -> None:
    board = FileBoard("d", tmp_path)
    board.publish("i", b"x")
    for path in paths:
        path.unlink()
    board.publish("i", b"y")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_takes_nothing_is_an_error_with_its_numbers(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="cannot publish 1 bytes"):
        FileBoard("d", tmp_path / "gone").publish("i", b"x")
