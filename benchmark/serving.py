"""Servers that benchmarks start, ask over HTTP, and stop."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

START_S = 120.0
STOP_S = 30.0


class ServerError(Exception):
    """The server does not do what a benchmark needs; the message says why."""


@contextlib.contextmanager
def running_server(arguments: Sequence[str], log: IO[str]) -> Iterator[str]:
    """Run `aegaeon serve` on a free port; yields its URL. Raises ServerError if it does not start.

    `arguments` are its flags; what it logs goes to `log`.
    """
    command = [sys.executable, "-m", "aegaeon", "serve", "--port", "0", *arguments]
    # A session of its own: Ctrl-C reaches us, and we stop it in order.
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )
    try:
        yield _ready_url(server)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(STOP_S)
        assert server.stdout is not None
        server.stdout.close()


def _ready_url(server: "subprocess.Popen[str]") -> str:
    """Read the server's lines until it says that it is ready."""
    assert server.stdout is not None
    stdout = server.stdout
    lines: queue.Queue[str] = queue.Queue(1000)
    give_up_s = time.monotonic() + START_S
    # Ends with the server's stdout; a daemon, since nothing is lost when it is cut off.
    threading.Thread(target=_pass_lines, args=(stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.1, give_up_s - time.monotonic()))
        except queue.Empty:
            raise ServerError(f"the server was not ready within {START_S:.0f} s") from None
        if line == "":
            raise ServerError("the server ended before it was ready")
        if line.startswith("ready on "):
            return line.split()[-1]


def _pass_lines(stdout: IO[str], lines: "queue.Queue[str]") -> None:
    with contextlib.suppress(ValueError, queue.Full):  # closed, or nobody reads any more
        for line in stdout:
            lines.put(line, timeout=1.0)
        lines.put("", timeout=1.0)


def free_port() -> int:
    """Return a port of this host that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for_port(process: "subprocess.Popen[Any]", port: int) -> None:
    """Return once `process` takes connections. Raises ServerError."""
    give_up_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.05)
    raise ServerError(f"nothing listens on port {port}; see what it said")


@contextlib.contextmanager
def running_command(
    command: Sequence[str], port: int, log: IO[str], cwd: Path | None = None
) -> Iterator[str]:
    """Run another server, which takes connections at `port` when it is up; yields its URL. Raises
    ServerError if it does not start."""
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        wait_for_port(server, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        # All of its session: what it has started may not end with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(STOP_S)
