"""What a region refuses: other versions, sizes, kinds, namespaces, half-made and damaged files."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from aegaeon import _native
from aegaeon.errors import RegionError, RegionMismatch

RING_HEAD, RING_RECORDS = 4096 + 64, 4096 + 4096  # where csrc/shm/ring.cpp puts them
ROOT = Path(__file__).parents[2]


def patch(path: str, offset: int, data: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_attach_without_a_region_says_that_its_server_is_missing(region_path):
    with pytest.raises(RegionError, match="its server has not started"):
        _native.Ring.attach(region_path)


def test_create_does_not_touch_what_is_there(region_path):
    ring = _native.Ring.create(region_path, 4096)
    with pytest.raises(RegionError, match="File exists"):
        _native.Ring.create(region_path, 4096)
    with pytest.raises(RegionError, match="File exists"):
        _native.Table.create(region_path, 4, 4)
    _native.Ring.attach(region_path).send(b"x")
    assert ring.receive(1.0) == [b"x"]


def test_another_layout_version_is_named(region_path):
    _native.Ring.create(region_path, 4096)
    patch(region_path, 8, (99).to_bytes(4, "little"))
    with pytest.raises(RegionMismatch, match=r"layout version 99, this process has \d+; stop"):
        _native.Ring.attach(region_path)


def test_a_file_of_another_size_is_named(region_path):
    _native.Ring.create(region_path, 4096)
    os.truncate(region_path, 8192)
    with pytest.raises(RegionMismatch, match="is 8192 bytes long, its header says 12288"):
        _native.Ring.attach(region_path)


def test_another_process_is_told_of_other_sizes(region_path):
    _native.Table.create(region_path, 64, 128)
    code = (
        "import sys\nfrom aegaeon import _native\n"
        "_native.Table.open_or_create(sys.argv[1], 64, 256)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, region_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "RegionMismatch" in last
    assert "64 slots of 128 bytes, this process wants 64 of 256" in last


def test_a_ring_is_not_a_table(region_path):
    _native.Ring.create(region_path, 4096)
    with pytest.raises(RegionMismatch, match="holds kind 1"):
        _native.Table.attach(region_path)


def test_a_damaged_header_is_refused(region_path):
    _native.Ring.create(region_path, 4096)
    patch(region_path, 24, (8192).to_bytes(8, "little"))
    with pytest.raises(RegionMismatch, match="damaged header"):
        _native.Ring.attach(region_path)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * 10_000])
def test_a_file_of_something_else_is_refused(region_path, content):
    Path(region_path).write_bytes(content)
    with pytest.raises(RegionMismatch):
        _native.Ring.attach(region_path)


def test_a_fifo_or_directory_in_its_place_is_refused(region_path, tmp_path):
    os.mkfifo(region_path)
    with pytest.raises(RegionError):
        _native.Ring.attach(region_path)
    with pytest.raises(RegionError):
        _native.Ring.attach(str(tmp_path))


def test_no_directory_and_absurd_sizes_are_errors(region_path, tmp_path):
    with pytest.raises(RegionError, match="No such file or directory"):
        _native.Ring.create(str(tmp_path / "missing" / "ring"), 4096)
    with pytest.raises(RegionError, match="too large"):
        _native.Ring.create(region_path, 1 << 50)
    for slots, slot_bytes in ((0, 8), (8, 0), (1 << 40, 8), (8, 1 << 40), (1 << 24, 1 << 20)):
        with pytest.raises(RegionError):
            _native.Table.create(region_path, slots, slot_bytes)


def test_damaged_regions_never_crash_or_hang():
    """In its own process, so that a crash is a result and not the end of the tests."""
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.support.fuzz_regions", "1500"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "errors" in result.stdout


def test_a_region_of_another_pid_namespace_or_boot_is_refused(region_path):
    _native.Ring.create(region_path, 4096)
    header = bytearray(Path(region_path).read_bytes()[:48])
    header[40] ^= 1  # of the host's identity, which stands right before the check
    check = 14695981039346656037
    for byte in header:
        check = (check ^ byte) * 1099511628211 % 2**64
    patch(region_path, 40, bytes(header[40:]) + check.to_bytes(8, "little"))
    with pytest.raises(RegionMismatch, match="another pid or time namespace"):
        _native.Ring.attach(region_path)


@pytest.mark.parametrize("head", [4, 1 << 20, 2**64 - 8])
def test_a_damaged_position_is_noticed_on_both_sides(region_path, head):
    ring = _native.Ring.create(region_path, 4096)
    patch(region_path, RING_HEAD, head.to_bytes(8, "little"))
    for use in (lambda: _native.Ring.attach(region_path).send(b"x"), lambda: ring.receive(0.0)):
        with pytest.raises(RegionMismatch, match="positions make no sense"):
            use()


@pytest.mark.parametrize(("length", "is_checked"), [(9, False), (25, True), (1 << 21, True)])
def test_a_damaged_length_is_noticed(region_path, length, is_checked):
    """With a check that is wrong; with the right one, but over what was sent."""
    ring = _native.Ring.create(region_path, 4096)
    _native.Ring.attach(region_path).send(bytes(16))
    check = (length * 0x9E3779B97F4A7C15 % 2**64 >> 32) ^ (not is_checked)
    patch(region_path, RING_RECORDS, struct.pack("<II", length, check))
    with pytest.raises(RegionMismatch, match="impossible length"):
        ring.receive(0.0)


def test_a_symbolic_link_is_not_followed(region_path, tmp_path):
    _native.Ring.create(region_path, 4096)
    (tmp_path / "link").symlink_to(region_path)
    with pytest.raises(RegionError, match="symbolic link"):
        _native.Ring.attach(str(tmp_path / "link"))
