"""A wire between a node that fetches and one that shares, with faults put in."""

import contextlib
import socket
import threading


class Wire:
    """Carries connections to `port`; `fault` may change or end what comes back from there.

    `fault(count, data)` gets how many bytes came before on all connections, and the next ones; it
    returns them as they go on, None to end the connection, or waits.
    """

    def __init__(self, port, fault=lambda _count, data: data):
        """Listen."""
        self._to, self.fault, self.carried = port, fault, 0
        self._lock = threading.Lock()
        self._sockets, self._threads = [], []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self):
        """End all."""
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # nobody is there just now
                near.close()
                continue
            self._sockets += [near, far]
            self._start(self._carry, near, far, lambda data: data)
            self._start(self._carry, far, near, self._back)

    def _back(self, data):
        with self._lock:
            before, self.carried = self.carried, self.carried + len(data)
        return self.fault(before, data)

    def _carry(self, source, target, change):
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and (data := change(data)) is not None:
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
