"""What every Board promises (aegaeon/store/base.py), and how files keep it."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aegaeon.errors import ConfigError, RegionError
from aegaeon.store import board
from aegaeon.store.base import Board, Domain
from aegaeon.store.board import _HEADER, FileBoard
from aegaeon.store.local import LocalBoard
from aegaeon.store.names import BOARDS, region_path
from aegaeon.store.redis import RedisBoard


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


def end(board: Board, name: str) -> None:
    """Let the writer of `name` end."""
    match board:
        case LocalBoard():
            board.end(name)
        case RedisBoard():
            board._link.client.delete(board._lease(name))
        case FileBoard():
            board.close()


def joined(before: bytes | None, added: bytes) -> bytes:
    return (b"" if before is None else before) + added


def test_the_record_of_one_that_has_ended_is_folded_into_anothers(
    open_domain: Callable[[], Domain],
) -> None:
    writers = {name: open_domain().board() for name in ("a", "b", "c")}
    reader, other = open_domain().board(), open_domain().board()
    for name, writer in writers.items():
        writer.publish(name, name.encode() * 2)
    for name in writers:
        assert not reader.fold(name, "gone", joined)  # it lives
    end(writers["a"], "a")
    assert reader.fold("a", "gone", joined)
    assert not reader.fold("a", "gone", joined) and not other.fold("a", "gone", joined)
    assert not reader.fold("never", "gone", joined)
    end(writers["b"], "b")
    assert other.fold("b", "gone", joined)
    assert reader.read() == {"c": b"cc", "gone": b"aabb"}
    writers["c"].publish("c", b"x")
    assert reader.read()["c"] == b"x"


def test_a_join_that_fails_leaves_the_record(open_domain: Callable[[], Domain]) -> None:
    writer, reader = open_domain().board(), open_domain().board()
    writer.publish("a", b"x")
    end(writer, "a")

    def fail(*_: object) -> bytes:
        raise RegionError("not readable")

    with pytest.raises(RegionError):
        reader.fold("a", "gone", fail)
    assert reader.read() == {"a": b"x"}
    assert reader.fold("a", "gone", joined)


def test_many_fold_at_once_and_each_record_counts_once(open_domain: Callable[[], Domain]) -> None:
    for number in range(20):
        writer = open_domain().board()
        writer.publish(f"p-{number}", b"x")
        end(writer, f"p-{number}")

    def fold(board: Board) -> None:
        while True:
            left = [name for name in board.read() if name != "gone"]
            if not left:
                return
            for name in left:
                board.fold(name, "gone", joined)

    threads = [threading.Thread(target=fold, args=(open_domain().board(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert open_domain().board().read() == {"gone": b"x" * 20}


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


def test_a_writer_that_is_killed_has_ended_and_one_that_is_stopped_has_not(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from aegaeon.store.board import FileBoard
board = FileBoard("d", Path(sys.argv[1]))
board.publish("i", b"x")
print("published", flush=True)
time.sleep(60)
"""
    reader = FileBoard("d", tmp_path)
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"published\n"
        process.send_signal(signal.SIGSTOP)
        assert not reader.fold("i", "gone", joined)
        process.kill()
        process.wait(20)
    assert reader.fold("i", "gone", joined)
    assert reader.read() == {"gone": b"x"}
    assert not any(path.exists() for path in (region_path(tmp_path, "d", k, "i") for k in BOARDS))


def test_a_death_between_joining_and_removing_leaves_both(paths: list[Path]) -> None:
    """Whoever reads then is to know, from what is in the joined record, what it has."""
    writer = FileBoard("d", paths[0].parent)
    writer.publish("i", b"x")
    writer.close()
    reader = FileBoard("d", paths[0].parent)
    seen = []

    def look(before: bytes | None, added: bytes) -> bytes:
        seen.append(reader.read())
        return joined(before, added)

    assert reader.fold("i", "gone", look)
    assert seen == [{"i": b"x"}]


def test_a_reader_that_was_overtaken_twice_does_not_go_back(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FileBoard("d", tmp_path)
    for record in (b"one", b"two"):
        writer.publish("i", record)
    plain, looks = board._read, list[Path]()

    def slow(path: Path) -> tuple[int, bytes] | None:
        looks.append(path)
        if len(looks) == 2:  # the writer is in the middle of the fourth, over the second
            writer.publish("i", b"three")
            return None
        return plain(path)

    monkeypatch.setattr(board, "_read", slow)
    assert FileBoard("d", tmp_path).read() == {"i": b"three"}
    assert len(looks) == 4
