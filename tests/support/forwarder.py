"""A wire that can be cut: a TCP port that leads to another one, until nothing passes any more."""

import socket
import threading
from contextlib import suppress


class Forwarder:
    """Leads `port` to `target` on this host, from the start to `close`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._passes = threading.Event()
        self._passes.set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """From now on what is sent goes nowhere, and nobody is told."""
        self._passes.clear()

    def mend(self) -> None:
        """New connections pass again; those that were cut are reset."""
        self._drop()
        self._passes.set()

    def close(self) -> None:
        """End all connections and threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(5.0)
        self._listener.close()
        self._drop()
        for thread in self._threads:
            thread.join(5.0)

    def _drop(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._sockets += [near, far]
            self._start(self._pass_on, near, far)
            self._start(self._pass_on, far, near)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._passes.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def _start(self, run: object, *args: socket.socket) -> None:
        assert callable(run)
        self._threads.append(threading.Thread(target=run, args=args, daemon=True))
        self._threads[-1].start()
