"""The disturber itself: the same each time, and fair about whose proxy has died."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

from tests.chaos.faults import Faults
from tests.chaos.plan import FAULTS, REDIS_FAULTS, draw
from tests.chaos.proxies import Deaths, Proxy
from tests.support.polling import eventually
from tests.support.server import is_running


def test_a_seed_makes_one_plan_and_seeds_make_all_faults():
    assert draw(3, 60, 3, has_redis=True) == draw(3, 60, 3, has_redis=True)
    assert draw(3, 60, 3, has_redis=True) != draw(4, 60, 3, has_redis=True)
    plans = [draw(seed, 60, 3, has_redis=True) for seed in range(20)]
    assert {planned.what for plan in plans for planned in plan} == {*FAULTS, *REDIS_FAULTS}
    assert all(0 < planned.at_s < 60 for plan in plans for planned in plan)
    assert not any(planned.what in REDIS_FAULTS for planned in draw(1, 600, 3, has_redis=False))


def test_each_fault_that_is_planned_can_be_done():
    faults = Faults(None, None, Deaths(), None, ())  # type: ignore[arg-type]
    assert set(faults._kinds) == {*FAULTS, *REDIS_FAULTS}


ACCEPTING = """
    import socket, sys
    server = socket.socket(fileno=int(sys.argv[1]))
    taken = []
    for line in sys.stdin:
        taken.append(server.accept())
        print("taken", flush=True)
"""


def accepting(server: socket.socket) -> "subprocess.Popen[str]":
    """Start a process that takes one of the connections to `server` for each line it is given."""
    command = [sys.executable, "-c", textwrap.dedent(ACCEPTING), str(server.fileno())]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[server.fileno()],
    )


def taken(process: "subprocess.Popen[str]", port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "taken\n"
    return client


def test_those_are_forgiven_whose_own_proxy_died_and_no_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        dying, living = accepting(server), accepting(server)
        try:
            struck, spared = taken(dying, port), taken(living, port)
            deaths, began_s = Deaths(), time.monotonic()
            proxy = Proxy("one", dying.pid, port, is_alone=False)
            os.kill(dying.pid, signal.SIGSTOP)
            deaths.note(proxy)
            assert not deaths.struck(struck.getsockname()[1], began_s)  # it may go on
            dying.kill()
            eventually(lambda: not is_running(dying.pid))
            assert deaths.struck(struck.getsockname()[1], began_s)
            assert not deaths.struck(spared.getsockname()[1], began_s)
            assert not deaths.struck(struck.getsockname()[1], time.monotonic())  # another stream's
            assert not deaths.any_alone(began_s)  # somebody else listens
            struck.close()
            spared.close()
        finally:
            for process in (dying, living):
                process.kill()
                process.communicate()
