"""The gateway: sends generations to instances and streams their tokens back, whatever instances
come and go. No text and no HTTP here; the offline benchmark uses it as the routes do.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import (
    AegaeonError,
    DeadlineExceeded,
    InstanceLost,
    ModelNotFound,
    Overloaded,
    QueueFull,
    StoreUnavailable,
)
from aegaeon.explanations import Explain, Explained, Explanation
from aegaeon.proxy.generation import Generation, OpenRequest
from aegaeon.proxy.living import Living, end_overdue, waits
from aegaeon.proxy.losses import Losses
from aegaeon.proxy.metrics import Meter
from aegaeon.proxy.outbox import Outbox, Target, nobody_for, target_of
from aegaeon.proxy.outlook import Outlook
from aegaeon.proxy.questions import Asked, Questions
from aegaeon.proxy.queue import Place, Queue
from aegaeon.proxy.receiver import Receiver
from aegaeon.proxy.waits import again, within
from aegaeon.scheduler.dispatch import can_serve
from aegaeon.specs import Bounds
from aegaeon.store.base import Domain, Mailbox
from aegaeon.types import Cancel, Instance, InstanceId, ModelId, ModelSpec, Moved, Reply, RequestId

log = logging.getLogger(__name__)

# How often the table is looked at for instances that vanished.
WATCH_S = 0.1
# How long a request waits for an instance to appear when none is ready: what dies again and again
# is begun anew after 30 s, and takes a while to start.
PATIENCE_S = 60.0
# Tokens come all the time where many streams are open: the loop needs the processor more than they
# need the last 50 us.
_LOOK_S = 0.00005
_T = TypeVar("_T")


class Gateway:
    """One proxy process's end of the domain. Use it from one event loop; owns a receiver, one
    sender thread and three watching tasks, from `start` to `close`."""

    def __init__(
        self,
        domain: Domain,
        settings: Settings,
        specs: tuple[ModelSpec, ...],
        address: str | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._domain = domain
        self._settings = settings
        self._models: set[ModelId] = set()
        self._address = address or f"proxy-{os.getpid()}-{secrets.token_hex(4)}"
        self._patience_s = patience_s
        self._open: dict[RequestId, OpenRequest] = {}
        self._outlook = Outlook(settings, self._open.values, lambda: self._instances)
        self._queue = Queue(settings, self._outlook)
        self._living = Living()
        self._instances: tuple[Instance, ...] = ()
        self._seen_s = float("-inf")
        self._changed = asyncio.Event()
        self._away: AegaeonError | None = None  # why the store could not be asked, the last time
        self._questions = Questions()
        self.relay = _native.StreamRelay()  # takes tokens of streams that are lent to it
        self.meter = Meter(settings, lambda now: waits(self._open.values(), now))
        self.serve(specs)
        self.is_broken = False  # no answer can come
        self._tasks: set[asyncio.Task[None]] = set()  # cancels and records under way
        self._loop: asyncio.AbstractEventLoop
        self._mailbox: Mailbox
        self._outbox: Outbox
        self._losses: Losses
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="aegaeon-sender")
        self._receiver: Receiver
        self._watchers: tuple[asyncio.Task[None], ...] = ()

    def serve(self, specs: Iterable[ModelSpec]) -> None:
        """Take requests for these from here on; open ones go on."""
        served = tuple(specs)
        self._models = {spec.id for spec in served}
        self.meter.serve(served)
        self._queue.serve(served)
        self._outlook.serve(served)

    async def preload(self, model: ModelId, instance: InstanceId) -> None:
        """Have `instance` bring a model in. Raises StoreUnavailable."""
        await self._blocking(partial(self._outbox.preload, model, instance))

    def bound(self, bounds: Bounds) -> None:
        """Go by other bounds from here on; `serve` what there is then."""
        self._queue.bound(bounds)
        self._outlook.bound(bounds)
        self.meter.bound(bounds)

    async def start(self) -> None:
        """Join the domain. Raises RegionError or StoreUnavailable."""
        self._loop = asyncio.get_running_loop()
        self._mailbox = self._domain.create_mailbox(self._address, look_s=_LOOK_S)
        self._outbox = await self._blocking(partial(Outbox, self._domain, self._settings))
        self._losses = Losses(self._domain.board(), self._outbox.fence)
        self._instances = await self._blocking(self._outbox.snapshot)
        self._seen_s = time.monotonic()
        await self._blocking(partial(self.meter.join, self._domain, self._address))
        self._receiver = Receiver(
            *(self._mailbox, self._loop, self._take_in, self._break), self.relay.take
        )
        self._receiver.start()
        tend, end_late = lambda: self.meter.tend(self._blocking), partial(end_overdue, self._open)
        looks = (again(WATCH_S, look) for look in (self._look, tend, end_late))
        self._watchers = tuple(map(asyncio.create_task, looks))

    def abandon(self) -> None:
        """Let go of what a `start` that raised has opened."""
        for opened in (getattr(self, "_outbox", None), getattr(self, "_mailbox", None)):
            if opened is not None:
                opened.close()
        self._sender.shutdown(wait=False)

    async def close(self) -> None:
        """Cancel what is open at the instances and leave the domain."""
        self.fail_all(InstanceLost("the server is shutting down; try again"))
        for opened in tuple(self._open.values()):
            self.leave(opened)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, *self._tasks, return_exceptions=True)
        await self._receiver.stop()
        await self.meter.leave(self._blocking)
        await self._blocking(self._outbox.close)
        await self._blocking(self._losses.close)
        self._mailbox.close()
        self._mailbox.unlink()
        self._sender.shutdown(wait=False)

    def finish(self, request: RequestId) -> None:
        """The text of a request is complete: that its tokens are left is no cancel."""
        if request in self._open:
            self._open[request].is_stopped = True

    def fail_all(self, error: AegaeonError) -> None:
        """End all open requests with `error`; their streams raise it and are cancelled."""
        for opened in tuple(self._open.values()):
            opened.fail(error)

    def instances(self) -> tuple[Instance, ...]:
        """Return the live instances as last seen, at most about WATCH_S ago; wakes nobody."""
        return self._instances

    def is_ready(self) -> bool:
        """Return whether some instance takes requests and its answers can come."""
        return not self.is_broken and can_serve(self._instances)

    @property
    def table_age_s(self) -> float:
        """How long ago the table was read."""
        return time.monotonic() - self._seen_s

    @property
    def open_requests(self) -> int:
        """Requests that have neither ended nor been left."""
        return len(self._open)

    def retry_after_s(self, error: AegaeonError) -> float:
        """Return when to try again after `error`; where it was for want of room, by prediction."""
        if isinstance(error, QueueFull) and error.retry_after_s:
            return error.retry_after_s
        return self._queue.retry_after_s() if isinstance(error, Overloaded) else 1.0

    def open(self, generation: Generation, on_tokens: Callable[[], None]) -> OpenRequest:
        """Enter `generation`, to be run by `keep`. `on_tokens` is called when there are tokens to
        take from what is returned. Raises as `open_all`."""
        opened = self.open_all((generation,))[0]
        opened.on_tokens = on_tokens
        return opened

    def open_all(self, generations: Sequence[Generation]) -> list[OpenRequest]:
        """Enter all of them, of one model and key, or none, each to be kept or left. Raises
        ModelNotFound, QueueFull, InstanceLost, InvalidRequest for more than there is room for."""
        model = generations[0].model
        if model not in self._models:
            raise ModelNotFound(f"no model {model!r} is served; see /v1/models")
        if self.is_broken:
            raise InstanceLost("the server has lost its mailbox; it must be started again")
        try:
            places = self._queue.enter_all(generations)
        except QueueFull as error:
            self.meter.refused(model, error.code)
            raise
        return [self._enter(place) for place in places]

    async def keep(self, opened: OpenRequest) -> None:
        """Keep what was opened running at some instance, whichever are lost; return when all its
        tokens have come. It is cancelled at its instance if this is. Raises Overloaded,
        DeadlineExceeded, InstanceLost, or the class of the code with which the instance failed the
        request."""
        try:
            await self._place(opened)
            while not opened.is_over:
                if opened.error is not None:
                    raise opened.error
                if opened.target is None:
                    await self._place(opened)
                await opened.wait()
        except AegaeonError as error:
            opened.fail(error)
            raise
        finally:
            self.leave(opened)

    async def explain(
        self, request: RequestId | None, instance: InstanceId | None, limit: int
    ) -> Explanation:
        """Return what was decided lately, of `request` or of all, here and at the instances; waits
        a bounded time for those, and delays nobody. Raises StoreUnavailable."""
        dispatched = self._outbox.choices.recent(request, limit)
        model = dispatched[-1].model if request is not None and dispatched else None

        question = partial(Explain, reply_to=self._address, request=request, limit=limit)

        def ask(ticket: int) -> Coroutine[None, None, Asked]:
            asked = question(ticket=ticket, model=model)
            return self._blocking(partial(self._outbox.ask, asked, instance))

        decisions, silent = await self._questions.put(ask, limit)
        now_s = time.monotonic()
        return Explanation(now_s=now_s, dispatched=dispatched, decisions=decisions, silent=silent)

    def _enter(self, place: Place) -> OpenRequest:
        generation = place.generation
        now = time.monotonic()
        name = generation.id or f"req-{secrets.token_hex(12)}"
        opened = OpenRequest(name, generation, now, now + self._queue.request_timeout_s)
        opened.on_begun = partial(self._queue.begin, place)
        opened.on_left = partial(self._queue.leave, place)
        opened.on_held = partial(self._queue.hold, place)
        prompt_tokens = len(generation.prompt_token_ids)
        opened.timing = self.meter.begin(generation.model, prompt_tokens, now)
        if generation.trace is not None:
            opened.timing.run = generation.trace.run(generation.model, prompt_tokens, now)
        return self._open.setdefault(opened.id, opened)

    async def _place(self, opened: OpenRequest) -> None:
        """Send the request to some instance, waiting a bounded time for one, or for the store."""
        give_up_s = time.monotonic() + self._patience_s
        while True:
            changed = self._changed
            if self._away is None and await self._try_place(opened):
                return
            now = time.monotonic()
            if now >= opened.deadline_s:
                raise DeadlineExceeded("the request's time is over and no instance came up")
            if now >= give_up_s:
                raise self._away or nobody_for(opened.generation.model, self._instances)
            with contextlib.suppress(asyncio.TimeoutError):
                await within(WATCH_S * 10, changed.wait())

    async def _try_place(self, opened: OpenRequest) -> bool:
        """Send the request to an instance that is ready; say whether it needs no place any more."""
        while opened.error is None:
            request = opened.next_request(self._address, time.monotonic())
            refused = frozenset(opened.refused)
            job = self._blocking(partial(self._outbox.submit, request, refused))
            opened.placing = asyncio.ensure_future(job)
            try:
                target = await asyncio.shield(opened.placing)
            except StoreUnavailable as error:
                self._away = error
                opened.give_up_attempt()
                return False
            if target is None:
                return False
            if opened.placed(target, request.attempt):
                self._living.attach(opened, target)
                return True
            self._outbox.settle(target, request.model)
            if opened.target is not None:
                return True  # it moved on before we knew where it went
            # The attempt was over before; nobody is to compute for it.
            self._soon(self._cancel(opened, request.attempt, target))
        return True

    def leave(self, opened: OpenRequest) -> None:
        """Forget the request; what still runs for it anywhere is cancelled. Idempotent."""
        if self._open.pop(opened.id, None) is None:
            return
        opened.on_left()
        target = self._detach(opened)
        opened.count_end(time.monotonic())
        if opened.is_over:
            self._outlook.note_end(opened.generation, opened.made)
        if opened.placing is not None or (target is not None and not opened.is_over):
            # One that is over may not even know yet where it went: that is counted, too.
            self._soon(self._cancel(opened, opened.attempt, target))

    def _detach(self, opened: OpenRequest) -> Target | None:
        """The request lives nowhere from here on; return where it did."""
        target = self._living.detach(opened)
        if target is not None:
            self._outbox.settle(target, opened.generation.model)
        return target

    def _soon(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, opened: OpenRequest, attempt: int, target: Target | None) -> None:
        """End `attempt` and those before it at `target`, or where it is just being sent."""
        if opened.placing is not None and opened.id not in self._open:
            # Left while it was being sent: wait to learn where it went.
            try:
                placed = await opened.placing
            except AegaeonError:
                placed = None
            if placed is not None:
                self._outbox.settle(placed, opened.generation.model)
            target = target or placed
        if target is not None:
            await self._blocking(partial(self._outbox.cancel, Cancel(opened.id, attempt), target))

    def _on_moved(self, moved: Moved) -> None:
        """An instance has handed the request to another one, or to nobody who waits for it."""
        target, opened = Target(moved.instance, moved.incarnation), self._open.get(moved.request_id)
        if opened is None or not opened.is_moved_by(moved):
            cancel = Cancel(moved.request_id, moved.attempt)
            self._soon(self._blocking(partial(self._outbox.cancel, cancel, target)))
            return
        self._detach(opened)
        self._outbox.assign(target, opened.generation.model)
        self._living.attach(opened, target)
        ttl_s = opened.deadline_s - time.monotonic()
        self._soon(self._blocking(partial(self._outbox.note_move, opened.id, target, ttl_s)))

    async def _look(self) -> None:
        """Refresh the view of the instances; requests of vanished ones are placed again."""
        try:
            self._instances = await self._blocking(self._outbox.snapshot)
            alive = {target_of(row) for row in self._instances}
            await self._lose_all(self._living.targets - alive)
        except AegaeonError as error:
            # Whatever it is, it may be over the next time.
            log.warning("table not readable error=%s", error)
            self._away = error
        else:
            self._away = None
            self._seen_s = time.monotonic()
            self._changed.set()
            self._changed = asyncio.Event()
        for target, confirm in tuple(self._living.silent(time.monotonic(), self._address)):
            await self._blocking(partial(self._outbox.confirm, confirm, target))
        await self._blocking(self._outbox.flush)

    async def _lose_all(self, gone: AbstractSet[Target]) -> None:
        """Give up those lives of `gone` of which it is known what they did, or will not be."""
        if not gone:
            return
        for lost in await self._blocking(partial(self._losses.judge, gone, self.meter.made())):
            for opened in self._living.at(lost.target):
                self._detach(opened)
                opened.lose(lost.work, lost.bad.get(opened.generation.model))

    def _break(self) -> None:
        """No answer will ever come: say so to those who wait and to those who look."""
        self.is_broken = True
        self.fail_all(InstanceLost("the server has lost its mailbox; see its log"))

    def _take_in(self, reply: Reply | Explained, received_s: float) -> None:
        if isinstance(reply, Explained):
            self._questions.take(reply)
            return
        if isinstance(reply, Moved):
            self._on_moved(reply)
            return
        opened = self._open.get(reply.request_id)
        if opened is not None and opened.take_in(reply, received_s):
            target = self._detach(opened)
            if target is not None and not opened.has_ended:
                self._soon(self._cancel(opened, reply.attempt, target))

    async def _blocking(self, call: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(self._sender, call)
