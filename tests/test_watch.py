"""What a supervisor ends because it lives and does nothing, before anybody has heard of it."""

import signal
import subprocess
import sys
import time

import msgspec
import pytest

from aegaeon import watch
from aegaeon.child import Child
from aegaeon.config import Settings
from aegaeon.deaths import WORDS_S
from aegaeon.store.local import LocalDomain, LocalMetadataStore
from aegaeon.types import InstanceStatus
from aegaeon.watch import Watch, processor_ticks
from tests.support.polling import eventually
from tests.test_keeper import RECORD

BUSY = "while True: pass"


@pytest.fixture
def starting():
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    yield Child("instance-0", 0, process=process, incarnation=1)
    process.kill()
    process.wait()


def test_one_that_stands_in_its_start_is_ended(starting, monkeypatch):
    monkeypatch.setattr(watch, "START_S", 1.0)
    monkeypatch.setattr(watch, "LOOK_S", 0.0)
    seen, store = Watch(Settings()), LocalDomain().metadata()
    give_up_s = time.monotonic() + 2.5
    while time.monotonic() < give_up_s:  # it is busy for longer than that
        assert seen.hung([starting], None, store) == {}
        time.sleep(0.05)
    assert starting.process is not None
    starting.process.send_signal(signal.SIGSTOP)
    eventually(lambda: "instance-0" in seen.hung([starting], None, store))
    assert "stood in its start" in seen.hung([starting], None, store)["instance-0"]
    # Its successor begins anew.
    starting.incarnation = 2
    assert seen.hung([starting], None, store) == {}


def test_what_hangs_is_ended_while_proxies_still_wait_for_what_it_did(starting, monkeypatch):
    now, period_s = [0.0], 0.05  # of the supervisor
    monkeypatch.setattr("aegaeon.watch.time.monotonic", lambda: now[0])
    seen, store = Watch(Settings()), LocalMetadataStore(lambda: now[0])
    store.register_instance(msgspec.structs.replace(RECORD, id="instance-0", incarnation=1), 0.26)
    store.update_instance_status("instance-0", 1, InstanceStatus(state="ready"))
    gone_s = None
    while not seen.hung([starting], None, store):
        now[0] += period_s
        if gone_s is None and not store.sync_for_routing():
            gone_s = now[0] - period_s
        assert now[0] < 60.0
    ended_s, buried_s = now[0] - gone_s, 0.5
    assert 1.0 < ended_s <= WORDS_S - buried_s


def test_what_a_process_has_used_is_read_whatever_its_name(starting):
    assert starting.process is not None
    eventually(lambda: processor_ticks(starting.process.pid) > 5)
    assert processor_ticks(2**22 - 1) == -1
