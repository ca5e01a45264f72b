"""Copies that make progress only when a test says so, behind the verbs of a CopyEngine."""

import ctypes
import threading

from aegaeon.errors import CopyError


class HeldTicket:
    """One copy; see CopyTicket. It keeps its priority for tests to see."""

    def __init__(self, segments, priority, lock):
        self.segments = segments
        self.priority = priority
        self.total_bytes = sum(size for _, _, size in segments)
        self.progress_bytes = 0
        self.is_cancelled = False
        self.failure = ""
        self.seconds = 0.0
        self._changed = lock

    @property
    def has_failed(self):
        return bool(self.failure)

    @property
    def has_ended(self):
        return self.is_done or self.is_cancelled or self.has_failed

    @property
    def is_done(self):
        return self.progress_bytes == self.total_bytes

    def wait(self, bytes=None, timeout_s=0.0):
        wanted = self.total_bytes if bytes is None else bytes
        with self._changed:
            self._changed.wait_for(
                lambda: self.progress_bytes >= wanted or self.has_ended, timeout_s
            )
            return self.progress_bytes >= wanted

    def cancel(self):
        with self._changed:
            self.is_cancelled = not self.is_done
            self._changed.notify_all()

    def raise_priority(self, priority):
        self.priority = min(self.priority, priority)


class HeldCopier:
    """Submits are kept in `tickets`; with `is_open` they are made at once."""

    def __init__(self, is_open=False):
        self.tickets = []
        self.is_open = is_open
        self.is_full = False
        self._changed = threading.Condition()

    def submit(self, segments, priority=1, after=(), is_outward=False):
        if self.is_full:
            raise CopyError("too many copies are open")
        ticket = HeldTicket(segments, priority, self._changed)
        self.tickets.append(ticket)
        if self.is_open:
            self.let_in()
        return ticket

    def let_in(self, count=None):
        """Copy `count` more bytes of what is open, in order; everything, if not told."""
        with self._changed:
            for ticket in self.tickets:
                if not ticket.has_ended:
                    left = ticket.total_bytes - ticket.progress_bytes
                    part = left if count is None else min(left, count)
                    self._copy(ticket, part)
                    count = None if count is None else count - part
            self._changed.notify_all()

    def fail(self, why):
        """End all that is open with an error."""
        with self._changed:
            for ticket in self.tickets:
                if not ticket.has_ended:
                    ticket.failure = why
            self._changed.notify_all()

    def close(self):
        for ticket in self.tickets:
            ticket.cancel()

    def _copy(self, ticket, count):
        at = ticket.progress_bytes
        ticket.progress_bytes += count
        for to, start, size in ticket.segments:
            part = min(max(0, size - at), count)
            ctypes.memmove(to + at, start + at, part)
            at = max(0, at - size)
            count -= part
