"""A real server: `aegaeon serve` as a process on a free port, in a domain of its own."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from aegaeon._native import WeightCache
from aegaeon.store.names import WEIGHTS, region_path
from aegaeon.store.shm import ShmDomain
from aegaeon.types import Instance, InstanceStatus
from tests.support.polling import eventually

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
START_S = 60.0
_numbers = itertools.count()


def run_cli(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run `aegaeon` to its end."""
    command = [sys.executable, "-m", "aegaeon", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def left_in_shared_memory(domain: str) -> list[str]:
    """Return the names that `domain` still has in shared memory."""
    return sorted(path.name for path in SHARED_MEMORY.glob(f"aegaeon-{domain}.*"))


def is_running(pid: int) -> bool:
    """Say whether the process lives (a zombie does not)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in {"Z", "X"}


class Server:
    """A server of `models` from `start` to `stop`; use it in a `with`."""

    def __init__(
        self,
        directory: Path,
        models: dict[str, Path],
        *flags: str,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        """`wrapper` is a command that becomes the one behind it, somewhere else."""
        self.domain = f"test-{os.getpid()}-{next(_numbers)}"
        self._environment = {**os.environ, **(environment or {})}
        self._wrapper = wrapper
        self.log = directory / f"{self.domain}.log"
        self.url = ""
        self._flags = ["--domain", self.domain, "--threads-per-instance", "1"]
        self._flags += ["--colocated-count", "1", *flags]
        self._flags += ["--models", ",".join(f"{name}={path}" for name, path in models.items())]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None
        return self._process.pid

    @property
    def shared_memory(self) -> Path:
        """Where its regions are: as it sees the file system, which may not be ours."""
        return Path(f"/proc/{self.pid}/root{SHARED_MEMORY}")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def start(self, port: int = 0) -> "Server":
        """Start it and wait until it is ready."""
        command = [*self._wrapper, sys.executable, "-m", "aegaeon", "serve"]
        command += ["--port", str(port), *self._flags]
        with self.log.open("ab") as log:
            already = log.tell()
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_S
        while not self.url:
            lines = self.log.read_bytes()[already:].decode(errors="replace").splitlines()
            self.url = next((x.split()[-1] for x in lines if x.startswith("ready on ")), "")
            assert self._process.poll() is None, "\n".join(lines)
            assert time.monotonic() < deadline_s, "\n".join(lines)
            time.sleep(0.02)
        return self

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end and return the exit code."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL the supervisor; what it started has to notice by itself."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        self.url = ""

    def stop(self) -> int:
        """SIGTERM it, wait, and return the exit code. Idempotent."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                raise
        return self._process.returncode

    def instance_pids(self) -> dict[str, int]:
        """Return the pids of the instances that live now."""
        return {row.record.id: row.record.pid for row in self._rows()}

    def requests(self) -> int:
        """Return how many requests the instances say they have."""
        return sum(
            sum(row.status.waiting.values()) + sum(row.status.running.values())
            for row in self._rows()
        )

    def proxy_pid(self) -> int:
        """Return the pid of the proxy, the supervisor's child that is no instance."""
        children = Path(f"/proc/{self.pid}/task").glob("*/children")
        pids = {int(pid) for file in children for pid in file.read_text().split()}
        (pid,) = pids - set(self.instance_pids().values())
        return pid

    def is_listening(self) -> bool:
        """Say whether the proxy answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).is_success
        except httpx.TransportError:
            return False

    def switches(self) -> int:
        """Return the switches of all instances so far."""
        health = httpx.get(f"{self.url}/health", timeout=10).json()
        return sum(instance["switches"] for instance in health["instances"])

    def ask(self, model: str, max_tokens: int = 3, timeout_s: float = 60.0) -> httpx.Response:
        """Post a completion and return the answer, whatever it is."""
        body = {"model": model, "prompt": "the device", "max_tokens": max_tokens}
        body["temperature"] = 0
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)

    @contextmanager
    def weights(self) -> Iterator[WeightCache]:
        """Yield its weight cache, of which we become a client."""
        path = region_path(self.shared_memory, self.domain, WEIGHTS)
        with path.open("rb") as region:
            budget_bytes = int.from_bytes(region.read(4096)[24:32], "little")
        cache = WeightCache.open_or_create(str(path), budget_bytes)
        try:
            yield cache
        finally:
            cache.close()

    def cached(self) -> set[str]:
        """Return the models that its weight cache holds now, whole or coming in."""
        with self.weights() as cache:
            return {entry.model for entry in cache.status()}

    def resident(self) -> set[str]:
        """Return the models that some instance holds to be at hand."""
        return {model for row in self._rows() for model in row.status.resident}

    def loaders(self) -> dict[str, int]:
        """Return the pids of the instances that wait for a model to come in, by model."""
        rows = self._rows()
        return {row.status.loading: row.record.pid for row in rows if row.status.loading}

    def statuses(self) -> dict[str, InstanceStatus]:
        """Return what the instances say of themselves, by name."""
        return {row.record.id: row.status for row in self._rows()}

    def _rows(self) -> tuple[Instance, ...]:
        domain = ShmDomain(self.domain, self.shared_memory)
        try:
            return domain.metadata().sync_for_routing()
        finally:
            domain.close()

    def __enter__(self) -> "Server":
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop, and see that nothing stays in shared memory."""
        self.stop()
        eventually(lambda: not left_in_shared_memory(self.domain))


class Streamed:
    """A completion that streams in a thread of its own: its pieces, their times and instances."""

    def __init__(self, url: str, model: str, prompt: str, max_tokens: int, **asked: object) -> None:
        self.pieces: list[str] = []
        self.times_s: list[float] = []
        self.instances: list[str] = []
        self.finish_reason: str | None = None
        self._url = f"{url}/v1/completions"
        self._body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        # All tokens that were asked for: an answer that ended early would have too few pieces.
        self._body |= {"stream": True, "temperature": 0, "ignore_eos": True, **asked}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self.pieces)

    @property
    def has_begun(self) -> bool:
        """Whether several tokens have come, in however few pieces: a busy proxy sends what has
        gathered in one, so that a short answer may end with its second."""
        return len(self.text) >= 20

    def whole(self, timeout_s: float = 90.0) -> str:
        """Wait for the end and return the text."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still streaming after {timeout_s} s"
        if self._error is not None:
            raise self._error
        assert self.finish_reason is not None
        return self.text

    def ends(self) -> bool:
        """Wait for the end and say whether it was a good one."""
        try:
            self.whole()
        except AssertionError:
            assert not self._thread.is_alive()
            return False
        return True

    def _run(self) -> None:
        try:
            for chunk in stream_chunks(self._url, self._body):
                self._take(chunk)
        except BaseException as error:
            self._error = error

    def _take(self, chunk: dict) -> None:
        assert "error" not in chunk, chunk
        self.instances.append(chunk["aegaeon"]["instance"])
        choice = chunk["choices"][0]
        self.finish_reason = choice["finish_reason"]
        self.times_s.append(time.monotonic())
        self.pieces.append(choice["text"])


def stream_chunks(url: str, body: dict) -> Iterator[dict]:
    """Yield the chunks of a streaming answer as `curl -N` would see them, up to [DONE]."""
    with httpx.stream("POST", url, json=body, timeout=90) as answer:
        answer.raise_for_status()
        is_done = False
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                assert line == "" or line.startswith(":"), line
                continue
            assert not is_done, line
            if line == "data: [DONE]":
                is_done = True
                continue
            yield json.loads(line.removeprefix("data: "))
        assert is_done
