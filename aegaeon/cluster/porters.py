"""Who owns the porter of a node: the first of its members, and, when that ends, another one."""

import logging
import os
import secrets
import socket
import threading
import time

import msgspec

from aegaeon.child import Child
from aegaeon.cluster.porter import PorterLaunch
from aegaeon.config import Settings
from aegaeon.instance.launch import memory_name
from aegaeon.nodes import WeightsSettings
from aegaeon.transfer.wire import read_secret

log = logging.getLogger(__name__)

LOOK_S = 0.5
END_S = 40.0  # for the owning thread to end
SECRET_BYTES = 32
MODULE = "aegaeon.cluster.porter"


def cluster_secret(ways: WeightsSettings) -> bytes:
    """Return what the porters of a cluster prove to each other: of the settings' file, else made
    now. Raises ConfigError."""
    return read_secret(ways.secret_file) if ways.secret_file else secrets.token_bytes(SECRET_BYTES)


class PorterPost:
    """One member's claim to own the porter of its node: from `start` to `close` a thread of its own
    waits for the post, and while it has it keeps a porter, started again as any process is."""

    def __init__(self, settings: Settings, node: str, address: str, secret: bytes) -> None:
        """Nothing is started yet. `settings` are those of the node."""
        launch = PorterLaunch(
            settings=settings,
            node=node,
            address=address,
            secret=secret,
            status_fd=0,
            parent_pid=os.getpid(),
        )
        self._launch = launch
        self._name = f"\0aegaeon-porter-{memory_name(settings.domain_name, node)}"
        self._stop = threading.Event()
        self._child = Child("porter", None)
        self._thread = threading.Thread(target=self._own, name="porter")

    @property
    def pid(self) -> int | None:
        """Of the porter, where it is ours and lives."""
        process = self._child.process
        return None if process is None else process.pid

    def start(self) -> None:
        """Begin to wait for the post."""
        self._thread.start()

    def close(self) -> None:
        """End the porter, if it is ours, and let others have the post. Idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(END_S)

    def _own(self) -> None:
        # The kernel takes such a name back with the process that has it, however that ends.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as post:
            while not self._stop.is_set():
                try:
                    post.bind(self._name)
                    break
                except OSError:
                    self._stop.wait(LOOK_S)
            try:
                while not self._stop.wait(LOOK_S):
                    self._tend()
            except Exception:
                log.exception("nobody keeps this node's porter any more")
            finally:
                self._child.kill()

    def _tend(self) -> None:
        child = self._child
        if child.process is not None and child.process.poll() is not None:
            code, reason = child.bury()
            wait_s = child.back_off()
            log.warning(
                "porter died status=%d restart_in_s=%.1f reason=%s",
                *(code, wait_s, reason or "see above"),
            )
        if child.process is None and time.monotonic() >= child.restart_at_s:
            try:
                child.start(MODULE, self._told)
            except OSError as error:
                log.error("porter not started error=%s restart_in_s=%.1f", error, child.back_off())

    def _told(self, status_fd: int) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self._launch, status_fd=status_fd))
