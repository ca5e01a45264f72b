"""The supervisor with real processes on the null device."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.deaths import Death, Work, decode_deaths, name_of
from aegaeon.errors import BudgetTooSmall, ConfigError
from aegaeon.holding import Layout
from aegaeon.instance.launch import neighbours_path
from aegaeon.ports import check_port, free_port
from aegaeon.store.codec import decode_replies, encode
from aegaeon.store.domains import domain_is_live, open_domain
from aegaeon.supervisor import Supervisor
from aegaeon.types import Instance, Moved, Submit, TokenEvent
from tests.support.specs import make_request, make_spec

SPECS = (make_spec("a"), make_spec("b"))
READY_S = 60.0
NEIGHBOURS_BODY = 4096  # the header's bytes


def make_settings(**changes) -> Settings:
    name = f"test-supervisor-{os.getpid()}-{time.monotonic_ns()}"
    return Settings(**{"device": "null", "domain": name, "drain_s": 5.0, **changes})


def left_overs(settings: Settings) -> list[Path]:
    return list(Path("/dev/shm").glob(f"aegaeon-{settings.domain_name}*"))


def poll(condition: Callable[[], object], timeout_s: float = READY_S) -> object:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not so within {timeout_s} s")


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def rows(settings: Settings) -> dict[str, Instance]:
    domain = open_domain(settings)
    try:
        return {row.record.id: row for row in domain.metadata().sync_for_routing()}
    finally:
        domain.close()


def test_instances_answer_and_leave_nothing_in_shared_memory():
    settings = make_settings(colocated_count=2)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        domain = open_domain(settings)
        inbox = domain.create_mailbox("tester")
        row = domain.metadata().sync_for_routing()[1]
        request = make_request("r", "a", reply_to="tester", deadline_s=time.monotonic() + 60)
        domain.open_mailbox(row.record.mailbox).send(encode(Submit(request)))
        replies = []
        deadline_s = time.monotonic() + READY_S
        while len(replies) < 4 and time.monotonic() < deadline_s:
            replies += [one for record in inbox.receive(0.5) for one in decode_replies(record)]
        domain.close()
    assert [type(reply) for reply in replies] == [TokenEvent] * 4
    assert replies[-1].finish_reason == "length"
    assert left_overs(settings) == []


def test_a_killed_instance_comes_back_with_a_higher_incarnation():
    settings = make_settings(lease_s=60.0)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        before = rows(settings)["instance-0"].record
        os.kill(before.pid, signal.SIGKILL)

        def successor() -> Instance | None:
            row = rows(settings).get("instance-0")
            return row if row and row.record.pid != before.pid else None

        # Long before its lease ends.
        after = poll(successor, timeout_s=30.0)
        assert after.record.incarnation > before.incarnation
        assert after.record.mailbox != before.mailbox
        assert not list(Path("/dev/shm").glob(f"aegaeon-*{before.mailbox}*"))
    assert left_overs(settings) == []


def test_an_instance_that_died_in_a_step_has_no_part_of_the_processors():
    settings = make_settings(lease_s=60.0, colocated_count=2)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        # Instances of this device compute nothing, so neither they nor successors take a seat.
        path = Path(neighbours_path(settings, ""))
        seats = _native.ThreadPool(1, str(path), 63)
        with path.open("r+b") as region:
            region.seek(NEIGHBOURS_BODY)
            region.write(bytes([1, 1]))
        os.kill(rows(settings)["instance-1"].record.pid, signal.SIGKILL)
        poll(lambda: path.read_bytes()[NEIGHBOURS_BODY:][:2] == bytes([1, 0]))
        del seats
    assert left_overs(settings) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_what_a_dead_instance_did_is_told_before_it_is_seen_to_be_gone(number):
    settings = make_settings(lease_s=60.0)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        before = rows(settings)["instance-0"].record
        domain = open_domain(settings)
        domain.create_mailbox("tester")
        deadline_s = time.monotonic() + 600
        request = make_request("r", "a", reply_to="tester", deadline_s=deadline_s, max_tokens=4000)
        domain.open_mailbox(before.mailbox).send(encode(Submit(request)))
        poll(lambda: rows(settings)["instance-0"].status.running)
        os.kill(before.pid, number)
        poll(lambda: (row := rows(settings).get("instance-0")) is None or row.record != before)
        told = domain.board().read()[name_of("instance-0")]
        assert decode_deaths(told) == (Death(before.incarnation, Work("a", ("r",))),)
        domain.close()
    assert left_overs(settings) == []


def test_children_of_a_killed_supervisor_die_and_the_next_start_works():
    settings = make_settings()
    script = textwrap.dedent(f"""
        import msgspec, sys, time
        from aegaeon.config import Settings
        from aegaeon.supervisor import Supervisor
        from aegaeon.types import ModelSpec
        settings = msgspec.json.decode({msgspec.json.encode(settings)!r}, type=Settings)
        specs = msgspec.json.decode({msgspec.json.encode(SPECS)!r}, type=tuple[ModelSpec, ...])
        with Supervisor(settings, specs) as supervisor:
            supervisor.wait_ready({READY_S})
            print("ready", flush=True)
            time.sleep(300)
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"ready\n"
        child = rows(settings)["instance-0"].record.pid
        with pytest.raises(ConfigError, match="belongs to a running server"):
            Supervisor(settings, SPECS).start()
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
    poll(lambda: not is_alive(child), 10.0)
    assert left_overs(settings)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        assert domain_is_live(settings)
    assert left_overs(settings) == []


def test_a_worker_that_cannot_start_stops_the_server_with_its_message():
    damaged = msgspec.structs.replace(SPECS[0], path="/nowhere")
    settings = make_settings(device="cpu", model_cache_budget_gb=0.1, kv_budget_gb=0.1)
    supervisor = Supervisor(settings, (damaged,))
    try:
        supervisor.start()
        with pytest.raises(ConfigError, match="cannot read /nowhere"):
            supervisor.wait_ready(READY_S)
    finally:
        supervisor.stop()
    assert left_overs(settings) == []


def test_a_process_that_the_system_does_not_give_is_asked_for_again(monkeypatch):
    popen, refused = subprocess.Popen, []

    def refuse_once(*args, **options):
        if not refused:
            refused.append(args)
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", refuse_once)
    settings = make_settings()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        assert refused and supervisor.failure is None
    assert left_overs(settings) == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


class Immortal:
    """A process that SIGKILL reaches, but which is never seen to have ended."""

    def __init__(self, process):
        self.process, self.pid, self.returncode = process, process.pid, None

    def poll(self):
        return None

    def kill(self):
        self.process.kill()

    def wait(self, timeout_s):
        raise subprocess.TimeoutExpired("worker", timeout_s)


def test_a_process_that_does_not_go_keeps_nobody_from_ending():
    supervisor = Supervisor(make_settings(colocated_count=2), SPECS)
    supervisor.start()
    try:
        supervisor.wait_ready(READY_S)
        first, second = supervisor._instances
        process = first.process
        first.process = Immortal(process)
        pid = second.process.pid
        supervisor.ask_stop(at_once=True)
        assert supervisor.wait_ended(READY_S)
        assert not is_alive(pid)
    finally:
        supervisor.stop()
        process.wait(10)


def test_why_a_worker_cannot_start_again_is_logged(caplog):
    supervisor = Supervisor(make_settings(), SPECS)
    supervisor._wanted.is_ready = True
    (child,) = supervisor._instances
    script = "import os; os.write(int(input()), b'no room for the KV')"
    caplog.set_level(logging.WARNING)
    child.start("code", lambda fd: f"{script.replace('input()', repr(str(fd)))}\n".encode())
    child.process.wait(30)
    supervisor._on_death(child)
    assert "reason=no room for the KV" in caplog.text


def test_a_layout_that_cannot_work_is_refused_and_nothing_is_left():
    settings = make_settings(device="cpu", model_cache_budget_gb=1e6)
    supervisor = Supervisor(settings, SPECS)
    with pytest.raises(BudgetTooSmall, match="lower --model-cache-budget-gb"):
        supervisor.start()
    assert left_overs(settings) == []


def test_as_many_instances_are_started_as_there_is_room_for(monkeypatch):
    def smaller(settings, *_):
        return Layout(msgspec.structs.replace(settings, colocated_count=1))

    monkeypatch.setattr("aegaeon.holding.lay_out_node", smaller)
    settings = make_settings(colocated_count=2)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        assert list(rows(settings)) == ["instance-0"] == [c.name for c in supervisor.children]
    assert left_overs(settings) == []


def test_stop_before_ready_ends_everything():
    settings = make_settings()
    supervisor = Supervisor(settings, SPECS)
    supervisor.start()
    supervisor.ask_stop(at_once=True)
    supervisor.stop()
    assert supervisor.wait_ended(0.0)
    assert left_overs(settings) == []


def test_a_taken_port_is_refused_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port("127.0.0.1"))


def test_split_roles_hand_a_request_over():
    settings = make_settings(colocated_count=0, prefill_count=1, decode_count=1)
    with Supervisor(settings, SPECS) as supervisor:
        supervisor.wait_ready(READY_S)
        assert [row.record.role for row in rows(settings).values()] == ["prefill", "decode"]
        domain = open_domain(settings)
        inbox = domain.create_mailbox("tester")
        address = rows(settings)["instance-0"].record.mailbox
        request = make_request("r", "a", reply_to="tester", deadline_s=time.monotonic() + 60)
        domain.open_mailbox(address).send(encode(Submit(request)))
        replies = []

        def take() -> bool:
            for record in inbox.receive(0.5):
                replies.extend(decode_replies(record))
            return len(replies) == 5

        poll(take)
        domain.close()
    assert [type(reply) for reply in replies] == [TokenEvent, Moved, *[TokenEvent] * 3]
    instances = [reply.instance for reply in replies]
    assert instances == ["instance-0"] + ["instance-1"] * 4
