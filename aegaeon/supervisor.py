"""The parent of a node's processes: starts, watches, restarts, drains and reaps them.

One thread owns the children; the public verbs only tell it what is wanted. Nothing is computed
or served here.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from aegaeon.child import REAP_S, Child
from aegaeon.config import Settings
from aegaeon.device.neighbours import clear_seat
from aegaeon.errors import AegaeonError, ConfigError, InstanceLost, RegionError, StoreUnavailable
from aegaeon.holding import Holding, Keeper, Layout, WholeDomain
from aegaeon.instance.launch import EXIT_CANNOT_START, Launch, mailbox_address, neighbours_path
from aegaeon.keeper import DeathKeeper
from aegaeon.ports import check_port, is_listening
from aegaeon.proxy.launch import ProxyLaunch
from aegaeon.specs import Catalog
from aegaeon.store.base import Domain, MetadataStore
from aegaeon.store.domains import open_domain, sweep_mailboxes
from aegaeon.types import ModelSpec
from aegaeon.watch import Watch

log = logging.getLogger(__name__)

POLL_S = 0.05
SWEEP_S = 5.0
KILL_GRACE_S = 5.0  # beyond drain_s, before SIGKILL
MAILBOX_BYTES = 1 << 16  # the least; nothing is sent there


@dataclass(slots=True)
class _Wanted:
    """What the public verbs ask of the owning thread, and what it reports; under `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    should_stop: bool = False
    should_kill: bool = False
    is_ready: bool = False
    has_ended: bool = False
    failure: AegaeonError | None = None


class Supervisor:
    """Owns the domain and its processes from `start` to `stop`. A context manager, too."""

    def __init__(
        self,
        settings: Settings,
        specs: tuple[ModelSpec, ...],
        with_proxy: bool = False,
        holding: Holding | None = None,
    ) -> None:
        """Nothing runs yet. It has the whole domain, or what is its `holding`."""
        self._settings = settings
        self._specs = specs
        self._holding = holding or WholeDomain()
        self._instances = self._holding.instances(settings)
        self._proxy = Child(self._holding.proxy, None) if with_proxy else None
        self._watch = Watch(self._settings)
        self._wanted = _Wanted()
        self._thread = threading.Thread(target=self._own, name="supervisor")
        self._layout = Layout(self._settings)
        self._domain: Domain | None = None
        self._store: MetadataStore | None = None
        self._keeper: Keeper | None = None
        self._deaths: DeathKeeper | None = None
        self._swept_s = 0.0

    @property
    def settings(self) -> Settings:
        """The settings with everything chosen that they left open."""
        return self._settings

    def start(self) -> None:
        """Claim the domain and start the processes; returns at once.

        Raises ConfigError when the port is taken or the domain belongs to a living server, and
        BudgetTooSmall when the layout of bytes does not fit the models or the machine.
        """
        if self._proxy is not None:
            check_port(self._settings.host, self._settings.port)
        try:
            self._layout = self._holding.take(self._settings, self._specs)
            self._settings = self._layout.settings
            self._instances = self._holding.instances(self._settings)  # there may be room for fewer
            self._domain = open_domain(self._settings)
            self._store = self._domain.metadata()
            self._deaths = DeathKeeper(self._domain.board())
            self._keeper = self._holding.keeper(self._domain, self._settings, self._specs)
        except BaseException:
            self._release()
            raise
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when all instances (and the proxy) serve; raises what kept them from starting."""
        wanted = self._wanted
        with wanted.changed:
            wanted.changed.wait_for(lambda: wanted.is_ready or wanted.has_ended, timeout_s)
            if wanted.failure is not None:
                raise wanted.failure
            if not wanted.is_ready:
                raise InstanceLost(
                    f"the server was not ready within {timeout_s:.0f} s; see its log"
                )

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until all processes have ended and been reaped; say whether they have."""
        with self._wanted.changed:
            return self._wanted.changed.wait_for(lambda: self._wanted.has_ended, timeout_s)

    def change(self, edit: Callable[[Catalog], Catalog]) -> None:
        """Change what is served, from `start` to `stop`. Raises StoreUnavailable, RegionError, and
        what `edit` raises."""
        assert self._domain is not None
        self._domain.catalog().change(edit)

    def ask_stop(self, at_once: bool = False) -> None:
        """Begin to drain, or (`at_once`) to kill; returns at once. For signal handlers, too."""
        # Plain assignments: a handler may interrupt a thread that holds the condition.
        self._wanted.should_kill = self._wanted.should_kill or at_once
        self._wanted.should_stop = True

    def stop(self) -> None:
        """Drain, end and reap everything; nothing stays in shared memory. Idempotent."""
        self.ask_stop()
        if self._thread.ident is not None:
            self._thread.join(2 * (self._settings.drain_s + KILL_GRACE_S + REAP_S))
        self._release()

    @property
    def children(self) -> tuple[Child, ...]:
        """The instances, then the proxy; to look at, from any thread."""
        proxy = (self._proxy,) if self._proxy is not None else ()
        return (*self._instances, *proxy)

    @property
    def is_ready(self) -> bool:
        """Whether all processes have served at one time since the start."""
        return self._wanted.is_ready

    @property
    def is_stopping(self) -> bool:
        """Whether it has been asked to stop."""
        return self._wanted.should_stop

    @property
    def is_killed(self) -> bool:
        """Whether it was asked to end without draining."""
        return self._wanted.should_kill

    @property
    def failure(self) -> AegaeonError | None:
        """Why the server could not start, if so."""
        return self._wanted.failure

    def __enter__(self) -> "Supervisor":
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _release(self) -> None:
        if self._deaths is not None:
            self._deaths.close()
        domain, self._domain = self._domain, None
        if domain is not None:
            domain.close()
        self._holding.release()

    # The owning thread

    def _own(self) -> None:
        children = list(self.children)
        try:
            while not self._wanted.should_stop:
                self._tend(children)
                self._look_ready(children)
                if self._keeper is not None:
                    self._keeper.tend(time.monotonic())
                self._end_hung()
                self._sweep(time.monotonic())
                time.sleep(POLL_S)
            self._drain()
        except Exception as error:
            log.exception("supervisor crashed")
            self._wanted.failure = InstanceLost(f"the supervisor crashed ({error}); see the log")
        finally:
            for child in children:
                child.kill()
            with self._wanted.changed:
                self._wanted.has_ended = True
                self._wanted.changed.notify_all()

    def _tend(self, children: list[Child]) -> None:
        """Reap the dead and start those that are due."""
        for child in children:
            if child.process is not None and child.process.poll() is not None:
                self._on_death(child)
            if self._wanted.should_kill:
                return
            if child.process is None and time.monotonic() >= child.restart_at_s:
                self._spawn(child)

    def _spawn(self, child: Child) -> None:
        # Higher than that of any earlier server on the same store, too.
        child.incarnation = max(child.incarnation + 1, time.time_ns() // 1_000_000)
        is_proxy = child.index is None
        module = "aegaeon.proxy.worker" if is_proxy else "aegaeon.instance.worker"
        try:
            child.start(module, lambda status_fd: self._launch_of(child, status_fd))
            child.was_hung = False
        except OSError as error:
            # The system is short of processes, memory or descriptors; it may not stay so.
            wait_s = child.back_off()
            log.error("cannot start name=%s error=%s restart_in_s=%.1f", child.name, error, wait_s)

    def _launch_of(self, child: Child, status_fd: int) -> bytes:
        """What the process is told."""
        assert self._keeper is not None
        catalog = self._keeper.current()
        if child.index is None:
            address = mailbox_address(child.name, child.incarnation)
            return msgspec.json.encode(
                ProxyLaunch(
                    settings=self._settings,
                    specs=catalog.models,
                    address=address,
                    status_fd=status_fd,
                    parent_pid=os.getpid(),
                    was_hung=child.was_hung,
                )
            )
        return msgspec.json.encode(
            Launch(
                settings=self._settings,
                specs=catalog.on(self._holding.node),
                kv_shapes=self._layout.kv_shapes,
                kv_spare=self._layout.kv_spare,
                node=self._holding.node,
                address=self._holding.address,
                catalog=catalog.version,
                instance=child.name,
                index=child.index,
                incarnation=child.incarnation,
                status_fd=status_fd,
                work_fd=child.work_fd,
                parent_pid=os.getpid(),
                was_hung=child.was_hung,
            )
        )

    def _on_death(self, child: Child) -> None:
        code, reason = child.bury()
        self._clear_seat(child)
        self._forget(child)
        if not (self._wanted.is_ready or self._wanted.should_stop):
            if code == EXIT_CANNOT_START and reason:
                self._fail(ConfigError(reason))
                return
            if child.index is None:
                self._fail(ConfigError(f"the proxy ended with status {code}; see the log above"))
                return
        lived_s = time.monotonic() - child.started_s
        wait_s = child.back_off()
        log.warning(
            "died name=%s status=%d lived_s=%.1f restart_in_s=%.1f reason=%s",
            *(child.name, code, lived_s, wait_s, reason or "see above"),
        )

    def _clear_seat(self, child: Child) -> None:
        """It may have died in a step: it has no part of the processors until it is back."""
        if child.index is None:
            return
        try:
            clear_seat(neighbours_path(self._settings, self._holding.node), child.index)
        except RegionError as error:  # its successor clears it
            log.warning("seat not cleared name=%s error=%s", child.name, error)

    def _forget(self, child: Child) -> None:
        """Take the dead one's row and mailbox out: an instance's requests go elsewhere now, and
        those of a proxy are cancelled where they run."""
        if self._store is None or self._domain is None:
            return
        try:
            if child.index is not None and self._deaths is not None:
                # First: who sees it gone is to know whose fault that may have been.
                self._deaths.note(child)
            if child.index is not None:
                self._store.remove_instance(child.name, child.incarnation)
            # Only a mailbox's reader removes it, for every backend: so take its place first.
            address = mailbox_address(child.name, child.incarnation)
            mailbox = self._domain.create_mailbox(address, MAILBOX_BYTES)
            mailbox.close()
            mailbox.unlink()
        except (StoreUnavailable, RegionError) as error:
            # A row ends with its lease; a mailbox's name is gone even where there was no room to
            # take its place.
            log.warning("not all removed of the dead name=%s error=%s", child.name, error)

    def _end_hung(self) -> None:
        """Kill what lives and does nothing; it is then dead as any other."""
        assert self._store is not None
        children = self.children
        for name, reason in self._watch.hung(self._instances, self._proxy, self._store).items():
            child = next(child for child in children if child.name == name)
            log.error("hung name=%s reason=%s; it is killed and started again", name, reason)
            if child.process is not None:
                child.was_hung = True
                child.process.kill()

    def _sweep(self, now: float) -> None:
        if now - self._swept_s >= SWEEP_S:
            self._swept_s = now
            sweep_mailboxes(self._settings.domain_name)
            if self._deaths is not None:
                with suppress(StoreUnavailable):
                    self._deaths.tell()

    def _fail(self, error: AegaeonError) -> None:
        self._wanted.failure = error
        self._wanted.should_stop = True
        self._wanted.should_kill = True

    def _look_ready(self, children: list[Child]) -> None:
        if self._wanted.is_ready or not all(child.process for child in children):
            return
        assert self._store is not None
        try:
            rows = {row.record.id: row for row in self._store.sync_for_routing()}
        except StoreUnavailable:
            return
        for child in self._instances:
            row = rows.get(child.name)
            if row is None or row.record.incarnation != child.incarnation:
                return
            if row.status.state != "ready":
                return
        if self._proxy is None or is_listening(self._settings.host, self._settings.port):
            with self._wanted.changed:
                self._wanted.is_ready = True
                self._wanted.changed.notify_all()

    def _drain(self) -> None:
        """The proxy first, which ends its streams on instances that still live; then those."""
        if self._proxy is not None:
            self._end([self._proxy], lambda: self._tend(self._instances))
        self._end(self._instances, lambda: None)

    def _end(self, children: list[Child], meanwhile: Callable[[], None]) -> None:
        for child in children:
            if child.process is not None:
                child.process.terminate()
        give_up_s = time.monotonic() + self._settings.drain_s + KILL_GRACE_S
        while any(child.process is not None and child.process.poll() is None for child in children):
            if self._wanted.should_kill or time.monotonic() >= give_up_s:
                break
            meanwhile()
            time.sleep(POLL_S)
        for child in children:
            child.kill()
