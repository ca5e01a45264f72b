"""Models over wires with delay and loss, in a network of their own where the system allows one."""

import shutil
import subprocess
import sys

import pytest

from tests.support.sharing import make_large

FETCH = """
import subprocess, sys, threading, time
from pathlib import Path
from tests.support.sharing import SECRET, assert_same, sharing
from tests.support.wire import Wire
from aegaeon.transfer.fetch import Sources, fetch

held, target = map(Path, sys.argv[1:3])
is_cut = threading.Event()

def cut(before, data):
    if sys.argv[3] and before > 20_000_000 and not is_cut.is_set():
        is_cut.set()
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        time.sleep(float(sys.argv[3]))
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return data

with sharing(held) as share:
    wire = Wire(share.port, cut)
    sources = Sources(peers=(wire.address,), secret=SECRET, has_hub=False)
    fetch("Org/large", target, sources)
    wire.close()
    assert_same(held / "Org__large", target / "Org__large")
    assert is_cut.is_set() == bool(sys.argv[3])
"""


def fetch_over(directory, prepare, cut_s=""):
    """Fetch in a network of its own, made by the command `prepare`, and cut for so long."""
    make_large(directory / "held" / "Org__large")
    unshare = shutil.which("unshare")
    made = unshare and subprocess.run(
        [unshare, "-Urn", "sh", "-c", prepare], check=False, capture_output=True, text=True
    )
    if not made or made.returncode:
        pytest.skip(f"no such network may be had here ({made.stderr.strip() if made else ''})")
    run = [unshare, "-Urn", "sh", "-c", f'{prepare} && exec "$0" "$@"', sys.executable, "-c", FETCH]
    command = [*run, str(directory / "held"), str(directory / "target"), cut_s]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr


def test_a_wire_that_is_cut_for_seconds_delays_and_no_more(tmp_path):
    fetch_over(tmp_path, "ip link set lo up", "2")


@pytest.mark.parametrize(
    "fault", ["delay 20ms 5ms", "delay 5ms loss 2%", "delay 2ms reorder 10%", "duplicate 5%"]
)
def test_a_bad_wire_delays_and_no_more(fault, tmp_path):
    fetch_over(tmp_path, f"ip link set lo up && tc qdisc add dev lo root netem {fault}")
