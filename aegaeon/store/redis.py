"""The table of many hosts, in Redis, and the domain that joins it with the mailboxes there.

What was acknowledged survives a restart of the server as far as its persistence goes; with
`appendonly yes` and `appendfsync always` nothing is lost.
"""

import math
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

from redis.exceptions import WatchError

from aegaeon.errors import AegaeonError, ConfigError, StaleIncarnation, StoreUnavailable
from aegaeon.store.base import LOOK_S, Board, Domain, Join, Mailbox, MetadataStore
from aegaeon.store.catalog import CatalogStore
from aegaeon.store.codec import decode_record, decode_status, encode
from aegaeon.store.names import check_name
from aegaeon.store.redis_catalog import RedisCatalogStore
from aegaeon.store.redis_link import RedisLink
from aegaeon.store.redis_mailbox import RedisMailbox
from aegaeon.store.redis_scripts import ABANDONED_MS, REGISTER, REMOVE, SYNC, UPDATE
from aegaeon.types import Instance, InstanceId, InstanceRecord, InstanceStatus, RequestId

PATIENCE_S = 5.0
# Of a lease, that an answer is waited for: who is cut off without a word tries several times to
# renew its lease before that ends.
LEASE_SHARE = 1 / 6
WRITER_LEASE_S = 60.0  # of a record on the board
OUTAGE_S = 1.0  # without an answer, in which leases may have ended
REENTRY_S = 3.0  # for instances to enter themselves again


class RedisMetadataStore(MetadataStore):
    """The table as expiring keys under `prefix`; every update is one script, so atomic.

    An instance that the server has lost by a restart, or whose lease ended while it was away or
    answered nobody, is entered again with its next status, unless a newer incarnation is there or
    somebody has removed this one: who sends its requests elsewhere does so first (a fence), so
    that they run at one place. Those who look go by what they saw before until there has been time
    for that.
    """

    def __init__(self, link: RedisLink, prefix: str) -> None:
        """Use `link`, which stays its owner's."""
        self._link = link
        self._prefix = prefix
        self._register = link.script(REGISTER)
        self._update = link.script(UPDATE)
        self._remove = link.script(REMOVE)
        self._sync = link.script(SYNC)
        # What this process registered, and in which run of the server.
        self._registered: dict[InstanceId, tuple[InstanceRecord, float, str]] = {}
        self._renewals: dict[InstanceId, _Renewals] = {}
        self._rows: tuple[Instance, ...] = ()  # as last seen
        self._is_away = False
        self._patient_until_s = float("-inf")

    def register_instance(self, record: InstanceRecord, lease_s: float) -> None:
        """See MetadataStore."""
        self._enter(record, lease_s, InstanceStatus())

    def update_instance_status(
        self, instance: InstanceId, incarnation: int, status: InstanceStatus
    ) -> None:
        """See MetadataStore."""
        keys, args = [self._instance_key(instance)], [incarnation, encode(status)]
        record, lease_s, run = self._registered.get(instance, (None, 0.0, ""))
        renewals = self._renewals.setdefault(instance, _Renewals())
        began_s = time.monotonic()
        silent_s = began_s - max(renewals.tried_s, self._link.unheard_s)
        try:
            answer = self._link.call(lambda: self._update(keys, args))
        finally:
            renewals.tried_s = time.monotonic()
        if answer == 1:
            renewals.done_s = began_s
            return
        is_ours = record is not None and record.incarnation == incarnation
        if answer == 0 or record is None or not is_ours:
            raise _stale(instance, incarnation)
        # It ended in the server's silence, not in ours, of which it bears some.
        was_unheard = 2 * silent_s < lease_s <= renewals.tried_s - renewals.done_s
        if not was_unheard and run == self._link.server_run():
            raise _stale(instance, incarnation)
        self._enter(record, lease_s, status)

    def remove_instance(self, instance: InstanceId, incarnation: int) -> None:
        """See MetadataStore."""
        keys, args = self._keys(instance), [instance, incarnation, ABANDONED_MS]
        self._link.call(lambda: self._remove(keys, args))
        self._registered.pop(instance, None)
        self._renewals.pop(instance, None)

    def sync_for_routing(self) -> tuple[Instance, ...]:
        """See MetadataStore."""
        began_s = time.monotonic()
        try:
            found = self._read()
        except StoreUnavailable:
            self._is_away = True
            raise
        now = time.monotonic()
        if self._is_away or now - began_s > OUTAGE_S:
            self._is_away = False
            self._patient_until_s = now + REENTRY_S
        if now < self._patient_until_s:
            # Leases have ended meanwhile of instances that could not renew them.
            ids = {row.record.id for row in found}
            found += tuple(row for row in self._rows if row.record.id not in ids)
        self._rows = found
        return tuple(sorted(found, key=lambda instance: instance.record.id))

    def _read(self) -> tuple[Instance, ...]:
        keys, args = [self._instances_key], [self._instance_key("")]
        rows: list[Any] = self._link.call(lambda: self._sync(keys, args))
        return tuple(
            Instance(decode_record(record), decode_status(status), left_ms / 1000)
            for record, status, left_ms in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        )

    def record_assignment(self, request: RequestId, instance: InstanceId, ttl_s: float) -> None:
        """See MetadataStore."""
        key, ttl_ms = self._assignment_key(request), _milliseconds(ttl_s)
        self._link.call(lambda: self._link.client.set(key, instance, px=ttl_ms))

    def get_assignment(self, request: RequestId) -> InstanceId | None:
        """See MetadataStore."""
        key = self._assignment_key(request)
        value = self._link.call(lambda: self._link.client.get(key))
        return value.decode() if isinstance(value, bytes) else None

    def close(self) -> None:
        """See MetadataStore. The connection belongs to the domain."""

    def unlink(self) -> None:
        """See MetadataStore."""
        for pattern in (*self._keys("*"), self._assignment_key("*")):
            remove_keys(self._link, pattern)

    def _enter(self, record: InstanceRecord, lease_s: float, status: InstanceStatus) -> None:
        keys = self._keys(record.id)
        values = [encode(record), encode(status)]
        args = [record.id, record.incarnation, _milliseconds(lease_s), *values]
        run, began_s = self._link.server_run(), time.monotonic()
        if not self._link.call(lambda: self._register(keys, args)):
            raise StaleIncarnation(
                f"{record.id} is registered as a newer incarnation than {record.incarnation}, or "
                "its requests have gone elsewhere; this process has been replaced and must exit"
            )
        self._registered[record.id] = (record, lease_s, run)
        self._renewals[record.id] = _Renewals(began_s, time.monotonic())

    @property
    def _instances_key(self) -> str:
        return f"{self._prefix}instances"

    def _keys(self, instance: InstanceId) -> list[str]:
        return [
            *(self._instance_key(instance), self._instances_key),
            f"{self._prefix}fence:{instance}",
        ]

    def _instance_key(self, instance: InstanceId) -> str:
        return f"{self._prefix}instance:{instance}"

    def _assignment_key(self, request: RequestId) -> str:
        return f"{self._prefix}assignment:{request}"


@dataclass(slots=True)
class _Renewals:
    """Of a lease, by this process."""

    done_s: float = float("inf")  # the last one that was answered, when it began
    tried_s: float = float("-inf")  # the last one, answered or not, when it ended


class RedisBoard(Board):
    """The board as a hash at `key`, and a lease of each name beside it."""

    def __init__(self, link: RedisLink, key: str) -> None:
        """Use `link`, which stays its owner's."""
        self._link = link
        self._key = key

    def publish(self, name: str, record: bytes) -> None:
        """See Board."""
        check_name("record", name)
        client, lease_ms = self._link.client, int(WRITER_LEASE_S * 1000)

        def put() -> None:
            with client.pipeline() as both:
                both.hset(self._key, name, record)
                both.set(self._lease(name), b"", px=lease_ms)
                both.execute()

        self._link.call(put)

    def read(self) -> dict[str, bytes]:
        """See Board."""
        found = self._link.call(lambda: self._link.client.hgetall(self._key))
        return {
            name.decode(): record
            for name, record in found.items()
            if isinstance(name, bytes) and isinstance(record, bytes)
        }

    def fold(self, name: str, into: str, join: Join) -> bool:
        """See Board. A writer has ended when its lease has; who changes the board meanwhile comes
        first."""
        client, lease = self._link.client, self._lease(name)

        def fold() -> bool:
            with client.pipeline() as all_or_nothing:
                all_or_nothing.watch(self._key, lease)  # type: ignore[no-untyped-call]
                ended, before = all_or_nothing.hmget(self._key, [name, into])
                if all_or_nothing.exists(lease) or not isinstance(ended, bytes):
                    return False
                joined = join(before if isinstance(before, bytes) else None, ended)
                all_or_nothing.multi()
                all_or_nothing.hset(self._key, into, joined)
                all_or_nothing.hdel(self._key, name)
                try:
                    all_or_nothing.execute()
                except WatchError:
                    return False
                return True

        return self._link.call(fold)

    def close(self) -> None:
        """See Board. The connection belongs to the domain."""

    def _lease(self, name: str) -> str:
        return f"{self._key}:{name}"


class RedisDomain(Domain):
    """All keys `aegaeon:{<name>}:*` of one server. Handles of mailboxes are not cached.

    The braces keep a domain on one node of a cluster. `patience_s` is how long an operation tries
    to reach a server that is away before it raises StoreUnavailable; who `holds_lease`, of
    `lease_s`, tries for a part of that once it has joined.
    """

    def __init__(
        self,
        name: str,
        url: str,
        patience_s: float = PATIENCE_S,
        lease_s: float = math.inf,
        holds_lease: bool = False,
    ) -> None:
        """Connect. Raises ConfigError on a bad name or URL, StoreUnavailable."""
        self._prefix = f"aegaeon:{{{check_name('domain', name)}}}:"
        self._link = RedisLink(url, patience_s, lease_s * LEASE_SHARE)
        self._store = RedisMetadataStore(self._link, self._prefix)
        self._mailboxes: weakref.WeakSet[RedisMailbox] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the set; whoever meets another run looks at all of it
        self._is_closed = False
        self._link.on_new_run = self._repair
        try:
            check_memory(self._link)
        except AegaeonError:
            self._link.close()
            raise
        if holds_lease:
            self._link.patience_s = min(patience_s, lease_s * LEASE_SHARE)

    def metadata(self) -> MetadataStore:
        """See Domain."""
        return self._store

    def catalog(self) -> CatalogStore:
        """See Domain."""
        return RedisCatalogStore(self._link, f"{self._prefix}catalog")

    def board(self) -> Board:
        """See Domain."""
        return RedisBoard(self._link, f"{self._prefix}board")

    def create_mailbox(
        self,
        address: str,
        capacity_bytes: int = 4 << 20,
        look_s: float = LOOK_S,  # noqa: ARG002  it sleeps at once
    ) -> Mailbox:
        """See Domain."""
        mailbox = RedisMailbox.create(self._link, self._mailbox_key(address), capacity_bytes)
        return self._note(mailbox)

    def open_mailbox(self, address: str) -> Mailbox:
        """See Domain."""
        mailbox = RedisMailbox.open(self._link, self._mailbox_key(address))
        return self._note(mailbox)

    def close(self) -> None:
        """See Domain."""
        if self._is_closed:
            return
        self._is_closed = True
        for mailbox in self._noted():
            mailbox.close()
        self._link.close()

    def unlink(self) -> None:
        """See Domain."""
        remove_keys(self._link, f"{self._prefix}*")

    def _note(self, mailbox: RedisMailbox) -> RedisMailbox:
        with self._lock:
            self._mailboxes.add(mailbox)
        return mailbox

    def _noted(self) -> list[RedisMailbox]:
        with self._lock:
            return list(self._mailboxes)

    def _repair(self) -> bool:
        # All of them, also behind one that is full.
        done = [mailbox.repair() for mailbox in self._noted()]
        return all(done)

    def _mailbox_key(self, address: str) -> str:
        return f"{self._prefix}mailbox:{check_name('mailbox', address)}"


def remove_keys(link: RedisLink, pattern: str) -> None:
    """Remove all keys that match the glob `pattern`, a bounded number at a time."""

    def remove() -> None:
        found = list(link.client.scan_iter(match=pattern, count=1000))
        for start in range(0, len(found), 1000):
            link.client.unlink(*found[start : start + 1000])

    link.call(remove)


def check_memory(link: RedisLink) -> None:
    """Raise ConfigError where the server removes keys when its memory is full: rows, with their
    leases, and records would vanish without a word. Raises StoreUnavailable."""
    memory = link.call(lambda: link.client.info("memory"))
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if int(memory.get("maxmemory", 0)) and policy != "noeviction":
        raise ConfigError(
            f"Redis at {link.shown_url} removes keys when its memory is full (maxmemory-policy "
            f"{policy}); run: redis-cli config set maxmemory-policy noeviction"
        )


def _stale(instance: InstanceId, incarnation: int) -> StaleIncarnation:
    return StaleIncarnation(
        f"incarnation {incarnation} of {instance} holds no lease; register it again, "
        "or exit when it has been replaced"
    )


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
