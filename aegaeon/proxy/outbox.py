"""The proxy's way out to the instances: who lives, who gets a request, and the sending.

Everything here may block for a moment (a lock, a socket), so the gateway calls it on one thread
of its own, which makes it the only user of the store's sending side. It waits for no instance: an
instance that takes nothing gets no requests, and its cancels later.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from aegaeon.clocks import ahead_s
from aegaeon.config import Settings
from aegaeon.deaths import Confirm
from aegaeon.errors import (
    AegaeonError,
    InstanceLost,
    ModelLoading,
    Overloaded,
    RecordTooLarge,
    RingClosed,
    RingFull,
    StoreUnavailable,
)
from aegaeon.explanations import Dispatched, Explain
from aegaeon.proxy.questions import Asked, Choices
from aegaeon.scheduler.among import NodeDispatcher
from aegaeon.scheduler.dispatch import Choice, Prompt, Unseen
from aegaeon.scheduler.policies import POLICIES
from aegaeon.scheduler.prompts import SentPrompts
from aegaeon.store.base import Domain, Mailbox
from aegaeon.store.codec import encode
from aegaeon.types import (
    Cancel,
    Instance,
    InstanceId,
    ModelId,
    Preload,
    Request,
    RequestId,
    Submit,
)

log = logging.getLogger(__name__)

# A snapshot is good for this long; routing reads the store at most this often.
SNAPSHOT_AGE_S = 0.005
MAX_CANCELS = 4096  # kept for one instance; it ends the oldest's requests at their deadlines


class Target(NamedTuple):
    """One life of one instance."""

    instance: InstanceId
    incarnation: int


@dataclass(slots=True)
class _Way:
    """How to reach a target, and the cancels that its mailbox had no room for, oldest first."""

    mailbox: Mailbox
    cancels: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_CANCELS))


class Outbox:
    """Picks instances and sends to them. One thread calls all verbs but `assign` and `settle`."""

    def __init__(self, domain: Domain, settings: Settings) -> None:
        self._domain = domain
        self._settings = settings
        self._store = domain.metadata()
        self._dispatcher = NodeDispatcher(POLICIES[settings.policy].dispatcher)
        self._prompts = SentPrompts[Target]()
        self.choices = Choices()
        self._instances: tuple[Instance, ...] = ()
        self._read_s = float("-inf")
        self._ways: dict[Target, _Way] = {}
        # Lives whose mailbox was found closed; the table will notice a little later.
        self._closed: set[Target] = set()
        # What we sent and still expect answers to: newer than what instances publish.
        self._lock = threading.Lock()
        self._sent: Counter[tuple[Target, ModelId]] = Counter()

    def snapshot(self) -> tuple[Instance, ...]:
        """Return the live instances, at most SNAPSHOT_AGE_S old. Raises StoreUnavailable."""
        now = time.monotonic()
        if now - self._read_s >= SNAPSHOT_AGE_S:
            rows = self._store.sync_for_routing()
            self._read_s = now
            if rows is not self._instances:
                self._forget_dead(rows)
            self._instances = tuple(row for row in rows if target_of(row) not in self._closed)
        return self._instances

    def submit(self, request: Request, refused: frozenset[Target]) -> Target | None:
        """Send `request` to the instance that suits best, none of `refused`; None: nobody can.

        Raises Overloaded (no mailbox has room), RecordTooLarge, StoreUnavailable: then it may have
        been sent all the same, and is cancelled when it can be.
        """
        record = encode(Submit(request, self._ahead_s()))
        if len(record) > 1 << 20:
            raise RecordTooLarge("the prompt is too long for one message; shorten it")
        full: set[Target] = set()
        keys = self._keys(request)
        while True:
            barred = refused | self._closed | full
            rows = tuple(row for row in self.snapshot() if target_of(row) not in barred)
            choice = self._choose(request, rows, self._prompt(request, keys, rows))
            if choice is None and full:
                names = ", ".join(sorted(target.instance for target in full))
                raise Overloaded(f"{names} take no messages just now; try again")
            if choice is None:
                return None
            row = next(row for row in rows if row.record.id == choice.instance)
            target = target_of(row)
            sent_s = time.monotonic()  # the instance may act before we know that it was sent
            ttl_s = max(request.deadline_s - sent_s, 1.0)
            self._store.record_assignment(request.id, target.instance, ttl_s)
            try:
                way = self._way(target, row.record.mailbox)
                self._send_or_cancel(way, record, Cancel(request.id, request.attempt))
            except RingClosed:
                self._closed.add(target)
                continue
            except RingFull:
                full.add(target)
                continue
            self.assign(target, request.model)
            self._prompts.note(keys, target)
            self._note(request, choice, barred, sent_s)
            return target

    def ask(self, question: Explain | Preload, instance: InstanceId | None) -> Asked:
        """Put `question` to all instances, or to one, without waiting for room at any. Raises
        StoreUnavailable."""
        if isinstance(question, Explain):
            question = msgspec.structs.replace(question, ahead_s=self._ahead_s())
        record = encode(question)
        asked, deaf = set(), set()
        for row in self.snapshot():
            if instance not in (None, row.record.id):
                continue
            try:
                self._way(target_of(row), row.record.mailbox).mailbox.send(record)
                asked.add(row.record.id)
            except (RingClosed, RingFull):
                deaf.add(row.record.id)
        return Asked(frozenset(asked), frozenset(deaf))

    def confirm(self, confirm: Confirm, target: Target) -> None:
        """Ask `target` which requests it has, without waiting for room; who is deaf is asked again
        in a while."""
        try:
            way = self._way_to(target)
            if way is not None:
                way.mailbox.send(encode(confirm))
        except RingClosed:
            self._closed.add(target)
        except AegaeonError as error:
            log.warning("not asked instance=%s error=%s", target.instance, error)

    def preload(self, model: ModelId, instance: InstanceId) -> None:
        """Have `instance` bring a model in. Raises StoreUnavailable."""
        self.ask(Preload(model), instance)

    def _choose(
        self, request: Request, rows: tuple[Instance, ...], prompt: Prompt
    ) -> Choice | None:
        """Choose among those of `rows` at which one more may wait, or else among all: the door has
        let in as many as may wait at all of them."""
        unseen = self._unseen(rows)
        most = self._settings.max_waiting
        roomy = tuple(row for row in rows if _waiting(row, unseen) < most)
        choice = self._dispatcher.dispatch(roomy, request.model, unseen, prompt)
        if choice is None and len(roomy) < len(rows):
            choice = self._dispatcher.dispatch(rows, request.model, unseen, prompt)
        return choice

    def _keys(self, request: Request) -> list[int]:
        """The hashes of a prompt, where it matters who has run it before: on devices with memory of
        their own, of which one cannot reach the other's. Elsewhere all find what any has left."""
        settings = self._settings
        is_apart = settings.prefix_cache and (settings.has_own_memory or settings.clustered)
        if not is_apart or len(self.snapshot()) < 2:
            return []
        return self._prompts.keys(request.model, request.prompt_token_ids)

    def _prompt(self, request: Request, keys: list[int], rows: tuple[Instance, ...]) -> Prompt:
        """What those of `rows` may know of a prompt: lives, for a new one knows nothing."""
        sent = self._prompts.known(keys)
        known = {row.record.id: sent.get(target_of(row), 0) for row in rows} if sent else {}
        return Prompt(len(request.prompt_token_ids), known)

    def _note(
        self, request: Request, choice: Choice, barred: Collection[Target], sent_s: float
    ) -> None:
        self.choices.note(
            Dispatched(
                at_s=sent_s,
                arrival_s=request.arrival_s,
                request=request.id,
                attempt=request.attempt,
                model=request.model,
                instance=choice.instance,
                reason=choice.reason,
                excluded=tuple(sorted({target.instance for target in barred})),
                key=request.key,
            )
        )

    def cancel(self, cancel: Cancel, target: Target) -> None:
        """Tell `target`, if it still lives, that nobody waits for a request; now, or by `flush`."""
        try:
            way = self._way_to(target)
        except RingClosed:
            self._closed.add(target)
        except AegaeonError as error:
            log.warning("cancel not delivered request=%s error=%s", cancel.request_id, error)
        else:
            if way is None:
                return
            way.cancels.append(encode(cancel))
            self._send_cancels(target, way)

    def flush(self) -> None:
        """Send the cancels for which there was no room, where there is some now."""
        for target, way in self._ways.items():
            self._send_cancels(target, way)

    def fence(self, target: Target) -> None:
        """See to it that a life, which is held to be over, is: one that was only cut off finds
        itself replaced when it is back. Raises StoreUnavailable."""
        self._store.remove_instance(*target)

    def note_move(self, request: RequestId, target: Target, ttl_s: float) -> None:
        """Record that `request` lives at `target` now."""
        try:
            self._store.record_assignment(request, target.instance, max(ttl_s, 1.0))
        except AegaeonError as error:
            log.warning("move not recorded request=%s error=%s", request, error)

    def assign(self, target: Target, model: ModelId) -> None:
        """Count one request at `target` that came there without us. Callable from any thread."""
        with self._lock:
            self._sent[target, model] += 1

    def settle(self, target: Target, model: ModelId) -> None:
        """Stop counting one request at `target`: it ended or moved. Callable from any thread."""
        with self._lock:
            self._sent[target, model] -= 1
            if self._sent[target, model] <= 0:
                del self._sent[target, model]

    def close(self) -> None:
        """Let go of the mailboxes and the table."""
        for way in self._ways.values():
            way.mailbox.close()
        self._ways.clear()
        self._store.close()

    def _way_to(self, target: Target) -> _Way | None:
        """Return how to reach a life that has requests of ours; None where it has ended."""
        way = self._ways.get(target)
        if way is None:  # what runs there came from another instance
            row = next((row for row in self.snapshot() if target_of(row) == target), None)
            way = None if row is None else self._way(target, row.record.mailbox)
        return way

    def _ahead_s(self) -> float | None:
        """What brings our times to the clocks of instances, where they may be other ones."""
        return ahead_s() if self._settings.metadata_backend == "redis" else None

    def _way(self, target: Target, address: str) -> _Way:
        way = self._ways.get(target)
        if way is None:
            way = self._ways[target] = _Way(self._domain.open_mailbox(address))
        return way

    def _send_or_cancel(self, way: _Way, record: bytes, cancel: Cancel) -> None:
        try:
            way.mailbox.send(record)
        except StoreUnavailable:
            way.cancels.append(encode(cancel))
            raise

    def _send_cancels(self, target: Target, way: _Way) -> None:
        try:
            while way.cancels:
                way.mailbox.send(way.cancels[0])
                way.cancels.popleft()
        except (RingFull, StoreUnavailable):
            return  # tried again until its lease ends
        except RingClosed:
            self._closed.add(target)
            way.cancels.clear()
        except AegaeonError as error:
            # The instance ends the request itself at its deadline.
            log.warning("cancel not delivered instance=%s error=%s", target.instance, error)
            way.cancels.popleft()

    def _forget_dead(self, rows: tuple[Instance, ...]) -> None:
        alive = {target_of(row) for row in rows}
        for target in self._ways.keys() - alive:
            self._ways.pop(target).mailbox.close()
        self._closed &= alive
        self._dispatcher.forget(frozenset(row.record.node for row in rows))

    def _unseen(self, rows: tuple[Instance, ...]) -> dict[InstanceId, dict[ModelId, int]]:
        """Count per instance and model what we sent there and it has not published yet."""
        published = {target_of(row): row.status for row in rows}
        unseen: dict[InstanceId, dict[ModelId, int]] = {}
        with self._lock:
            for (target, model), sent in self._sent.items():
                status = published.get(target)
                if status is not None:
                    known = status.waiting.get(model, 0) + status.running.get(model, 0)
                    if sent > known:
                        unseen.setdefault(target.instance, {})[model] = sent - known
        return unseen


def _waiting(row: Instance, unseen: Unseen) -> int:
    """How many requests wait there, and were sent there since it said so."""
    return sum(row.status.waiting.values()) + sum(unseen.get(row.record.id, {}).values())


def target_of(row: Instance) -> Target:
    """Return the life that `row` describes."""
    return Target(row.record.id, row.record.incarnation)


def nobody_for(model: ModelId, rows: Sequence[Instance]) -> AegaeonError:
    """Return why no instance of `rows` takes a request for `model`."""
    if any(row.status.state == "starting" for row in rows):
        text = "instances still load the models they start with; try again later"
        return ModelLoading(f"no instance is ready for {model!r} yet: {text}")
    if any(row.record.node for row in rows) and not any(model in r.record.models for r in rows):
        text = "its files are still on their way to the nodes of the cluster; try again later"
        return ModelLoading(
            f"no node serves {model!r} yet: {text} (`aegaeon status` tells how far)"
        )
    return InstanceLost(f"no instance is ready for {model!r}; see the log")
