"""Wires on this host: a TCP port that leads to another one, with faults put in."""

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
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._start(self._accept)

    def close(self):
        """End all."""
        _end(self._listener)
        self._threads[0].join(10)
        self.drop()
        for thread in self._threads:
            thread.join(10)

    def drop(self):
        """End the connections that there are."""
        while self._sockets:
            _end(self._sockets.pop())

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
            self._start(self._carry, near, far, self._forth)
            self._start(self._carry, far, near, self._back)

    def _forth(self, data):
        return data

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


class Cable(Wire):
    """One that can be cut."""

    def __init__(self, port):
        """Listen."""
        self._is_cut = False
        super().__init__(port)

    def cut(self):
        """From now on what is sent goes nowhere, and nobody is told."""
        self._is_cut = True

    def mend(self):
        """New connections pass again; those that were cut are reset."""
        self.drop()
        self._is_cut = False

    def _forth(self, data):
        return b"" if self._is_cut else data

    _back = _forth


def _end(one):
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
