"""The requests at one device, their KV, and what others see of them: half of every scheduler.

What to do with them stands in `device` and in the policies.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from aegaeon.errors import InvalidRequest, KeyQueueFull, ModelNotFound, Overloaded
from aegaeon.metrics import Target
from aegaeon.scheduler.base import Scheduler, SchedulerSnapshot
from aegaeon.scheduler.deadlines import Deadlines
from aegaeon.scheduler.fairness import RESERVE, Shares, is_beyond_share
from aegaeon.scheduler.groups import Counts, Entry, Group, counts_of
from aegaeon.scheduler.kv_line import KvLine
from aegaeon.scheduler.loads import Loads
from aegaeon.scheduler.ranks import Ranks, room_of
from aegaeon.scheduler.residency import Residency
from aegaeon.specs import Priority
from aegaeon.types import Begun, Failure, InstanceId, ModelId, Request, RequestId, Role

GroupT = TypeVar("GroupT", bound=Group)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one device. A prefill takes at least one request, whatever its size."""

    max_batch: int = 16
    max_waiting: int = 1024
    max_running: int = 32  # per model; beyond max_batch they decode in rotation
    prefill_requests: int = 4
    prefill_tokens: int = 2048


class Ledger(Scheduler, Generic[GroupT]):
    """Knows every request of a device; a request is forgotten once it ended."""

    def __init__(
        self, residency: Residency, models: Sequence[ModelId], limits: Limits, role: Role
    ) -> None:
        """`models` are those served. Nothing is resident yet."""
        self._id = ""
        self._residency = residency
        self._models = set(models)
        self._limits = limits
        self._role = role
        self._targets: dict[ModelId, Target] = {}  # of models with one of their own
        self._groups: dict[ModelId, GroupT] = {}
        self._active: dict[ModelId, GroupT] = {}  # where anything waits or runs
        self._kv = KvLine(self._groups)
        self._loads = Loads(residency)
        self._model_of: dict[RequestId, ModelId] = {}
        self._waiting_count = 0
        self._deadlines = Deadlines()
        self._shares = Shares()
        self._ranks = Ranks(self._active)
        self._asked_s: dict[ModelId, float] = {}  # when a model's last request came
        self._hopeless: list[Failure] = []
        self._current: ModelId | None = None
        self._switches = 0
        # Nothing is decided anew while nothing happens but steps of a decode within its stretch.
        self._is_stale = True  # something else has
        self._is_load_stale = True
        self._counts: Counts | None = None  # steps of a decode change none of them

    @abstractmethod
    def _new_group(self, model: ModelId) -> GroupT:
        """Return an empty group."""

    def _entered(self, group: GroupT, entry: Entry, now: float) -> None:
        """A request came."""

    def _expected(self, group: GroupT, entry: Entry, before: int, now: float) -> None:
        """Of a request that waits another number of tokens is known than `before`."""

    def _changed(self, group: GroupT) -> None:
        """A request of `group` ended, or was put back."""

    def _quieted(self, group: GroupT) -> None:
        """The last request of `group` ended."""

    # What a dispatcher sees

    @property
    def id(self) -> InstanceId:
        """What dispatchers call this device."""
        return self._id

    @property
    def role(self) -> Role:
        """What this device does."""
        return self._role

    @property
    def load(self) -> float:
        """How busy it is, in the policy's measure: here requests."""
        return len(self._model_of)

    def requests_of(self, model: ModelId) -> int:
        """Return how many requests of `model` wait or run here."""
        group = self._groups.get(model)
        return len(group.waiting) + len(group.running) if group is not None else 0

    def is_resident(self, model: ModelId) -> bool:
        """Whether the weights of `model` are here, or on their way."""
        return self._residency.is_resident(model) or self._residency.loading == model

    def joins(self, model: ModelId) -> bool:
        """Whether one more request of `model` would not make it switch once more."""
        return model in self._active

    def name(self, device: InstanceId) -> None:
        """Let dispatchers call this device so."""
        self._id = device

    # Models

    def promise(self, model: ModelId, target: Target) -> None:
        """Promise something else of `model` than of all. Not every policy goes by it."""
        self._targets[model] = target

    def prioritise(self, model: ModelId, priority: Priority) -> None:
        """Let `model` come before others, or behind them, where not all can be done. Of the
        policies only `slack` goes by it; the bound on those that wait does with all."""
        self._ranks.set(model, priority)
        self._something_happened()

    def preload(self, models: Iterable[ModelId]) -> None:
        """Load `models` when the copy lane has nothing else to do and there is free room."""
        self._loads.preload(models)
        self._something_happened()

    def begin_model(self, model: ModelId, weight_bytes: int) -> None:
        """Serve `model`, too, whose costs are known. Raises BudgetTooSmall."""
        self._residency.enter(model, weight_bytes)
        self._models.add(model)
        self._something_happened()

    def end_model(self, model: ModelId) -> bool:
        """Serve `model` no more, and count its weights as gone; or return False: it has requests,
        or its weights are on their way."""
        if self._is_used(model):
            return False
        self._forget_weights(model)
        self._loads.forget(model)
        self._models.discard(model)
        self._targets.pop(model, None)
        self._asked_s.pop(model, None)
        self._ranks.set(model, "normal")
        self._residency.leave(model)
        self._groups.pop(model, None)
        self._something_happened()
        return True

    def asked_s(self, model: ModelId, now: float) -> float | None:
        """Return when `model` was last asked for, `now` while it has requests or is on its way;
        None: never."""
        return now if self._is_used(model) else self._asked_s.get(model)

    def let_go(self, model: ModelId) -> bool:
        """Count the weights of `model`, which the caller drops, as gone; or return False: they are
        not here, or are to stay."""
        is_kept = self._residency.is_pinned(model) or self._is_used(model)
        if is_kept or not self._residency.is_resident(model):
            return False
        self._forget_weights(model)
        self._something_happened()
        return True

    def _is_used(self, model: ModelId) -> bool:
        """Whether it has requests, or its weights are on their way."""
        group = self._groups.get(model)
        has_requests = group is not None and bool(group.has_requests or group.leaving)
        return has_requests or self._residency.loading == model

    def _forget_weights(self, model: ModelId) -> None:
        """The weights of `model` are dropped."""

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """Put `request` behind its model's others. Raises ModelNotFound and, at its first attempt,
        Overloaded: the proxies bound how many there are of the others."""
        group = self._group_of(request)
        if not request.attempt:  # else it has been let in, and may be in the midst of its tokens
            self._check_room(request)
        entry = Entry(request.id, request.arrival_s, _tokens(request))
        group.waiting[request.id] = entry
        self._waiting_count += 1
        self._enter(request, group, entry, now)

    def expect(self, request: RequestId, known_tokens: int, now: float) -> None:
        """Reckon with a shorter prefill of `request`, or a longer one again."""
        model = self._model_of.get(request)
        entry = None if model is None else self._groups[model].waiting.get(request)
        if model is None or entry is None or entry.known == known_tokens:
            return
        if request in self._groups[model].begun:
            return  # it is known what it has
        before, entry.known = entry.known, known_tokens
        self._expected(self._groups[model], entry, before, now)
        self._something_happened()

    def adopt(self, request: Request, now: float, is_back: bool = False) -> None:
        """Run `request` beside its model's others. Raises Overloaded, also when others here lack
        KV, ModelNotFound, and InvalidRequest with the role `prefill`. One that `is_back`, whose KV
        has been here all the time, is never too much."""
        if self._role == "prefill":
            raise InvalidRequest("this instance does not decode; hand it to one that does")
        group = self._group_of(request)
        if self._kv.first() is not None and not is_back:
            raise Overloaded("sequences here wait for KV; try again later")
        if len(self._model_of) >= self._limits.max_waiting and not is_back:
            raise Overloaded(f"{len(self._model_of)} requests are here; try again later")
        entry = Entry(request.id, request.arrival_s, _tokens(request), made=1, first_s=now)
        group.running[request.id] = entry
        if self._residency.kv_bytes(request.model, 1):
            entry.is_here = False  # its KV is on the host
            group.away += 1
        self._enter(request, group, entry, now)

    def bound(self, max_waiting: int, max_running: int) -> None:
        """Go by other limits from here on; those that are in stay."""
        self._limits = msgspec.structs.replace(
            self._limits, max_waiting=max_waiting, max_running=max_running
        )
        self._something_happened()

    def cancel(self, request: RequestId, now: float) -> None:  # noqa: ARG002  part of the seam
        """Forget `request`; if an action with it is under way, its part of the outcome is too."""
        self._forget(request)

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Return, once, the requests whose deadline is not after `now`."""
        return self._deadlines.expired(now, self._model_of)

    def given_up(self) -> tuple[Failure, ...]:
        """Return, once, the requests that waited in vain."""
        if not self._hopeless:
            return ()
        hopeless, self._hopeless = self._hopeless, []
        return tuple(failure for failure in hopeless if failure[0] in self._model_of)

    def snapshot(self) -> SchedulerSnapshot:
        """Counts per model, those without requests left out."""
        counts = self._counts
        if counts is None or len(counts.to_prefill) != len(self._groups):
            counts = self._counts = counts_of(self._groups)
        return SchedulerSnapshot(
            current=self._current,
            resident=self._residency.resident,
            loading=self._residency.loading,
            waiting=counts.waiting,
            running=counts.running,
            switches=self._switches,
            preloading=self._loads.preloading,
            load=self.load,
            joins=tuple(filter(self.joins, self._groups)),
            to_prefill=counts.to_prefill,
        )

    def _check_room(self, request: Request) -> None:
        """Raise Overloaded, or KeyQueueFull, where `request` would be one too many to wait here. As
        at the proxies' door: of the last room no key has more than its share, no low priority any.
        """
        most, taken = self._limits.max_waiting, self._waiting_count
        model = request.model
        if taken >= most:
            raise Overloaded(
                f"{most} requests are waiting; try again later, or raise --max-waiting"
            )
        if self._ranks.are_used:
            served = map(self._ranks.of, self._models)
            if taken >= room_of(most, self._ranks.of(model), served):
                raise Overloaded(
                    f"{taken} requests are waiting, and the room that is left is for models of a "
                    "higher priority; try again later"
                )
        if not request.key or taken < most * (1 - RESERVE):
            return
        key_of = self._shares.key_of
        waiting = [r for group in self._active.values() for r in group.waiting]
        own = sum(key_of(one) == request.key for one in waiting)
        share = self._shares.share_of(request.key, request.weight)
        if own and is_beyond_share(most, taken, own, share):
            raise KeyQueueFull(
                f"this key has {own} requests waiting here, and the room that is left is for other "
                "keys; try again later"
            )

    def _group_of(self, request: Request) -> GroupT:
        if request.model not in self._models:
            raise ModelNotFound(f"model {request.model} is not served here; see GET /v1/models")
        group = self._groups.get(request.model)
        if group is None:
            group = self._groups[request.model] = self._new_group(request.model)
        return group

    def _enter(self, request: Request, group: GroupT, entry: Entry, now: float) -> None:
        self._something_happened()
        self._model_of[request.id] = request.model
        self._deadlines.add(request.id, request.deadline_s)
        self._shares.enter(request.id, request.key, request.weight, request.model)
        self._asked_s[request.model] = now
        self._entered(group, entry, now)
        self._active[request.model] = group
        self._ranks.changed()

    def _hold_kv(self, group: GroupT, tokens: int) -> None:
        group.here_tokens += tokens
        self._residency.hold_kv(group.model, tokens)

    def _put_back(self, group: GroupT, requests: Iterable[RequestId]) -> bool:
        """Let `requests` wait in front of `group`. Those with KV give it up, and are prefilled
        again when there is room. Says whether any did."""
        waited = len(group.waiting)
        held = group.put_back(requests)
        self._waiting_count += len(group.waiting) - waited
        self._hold_kv(group, -sum(entry.tokens for entry in held if entry.is_here))
        return bool(held)

    def _begin(self, group: GroupT, begun: Begun) -> None:
        """A piece of a prompt has been prefilled; the room for all of it is taken."""
        entry = group.waiting.get(begun.request_id)
        if entry is None:
            return
        entry.known = begun.tokens
        if entry.id not in group.begun:
            group.begun[entry.id] = entry
            entry.is_here = True
            self._hold_kv(group, entry.tokens)

    def has_begun(self, request: RequestId) -> bool:
        """Whether `request` waits with a piece of its prompt prefilled and its KV held."""
        model = self._model_of.get(request)
        return model is not None and request in self._groups[model].begun

    def _forget(self, request: RequestId) -> None:
        model = self._model_of.pop(request, None)
        if model is None:
            return
        self._something_happened()
        self._shares.leave(request)
        group = self._groups[model]
        self._waiting_count -= request in group.waiting
        entry = group.remove(request)
        if entry is not None:
            if entry.is_here:
                self._hold_kv(group, -entry.tokens)
            self._kv.freed()
        if not group.waiting:
            self._kv.leave(group)
        self._quiet(group)
        self._changed(group)

    def _quiet(self, group: GroupT) -> None:
        if not group.has_requests and self._active.pop(group.model, None) is not None:
            self._ranks.changed()
            self._quieted(group)

    def _steps_that_fit(self, group: GroupT, requests: int) -> int:
        """How many steps of so many requests of `group` there is free memory for."""
        per_step = self._residency.kv_bytes(group.model, requests)
        return self._residency.free_bytes // per_step if per_step else 1 << 30

    def _kv_of(self, models: Iterable[ModelId]) -> tuple[RequestId, ...]:
        """The requests of `models` whose KV is on the device."""
        return tuple(
            entry.id for model in models for entry in self._groups[model].holders if entry.is_here
        )

    def _move_kv(self, request: RequestId, is_here: bool) -> None:
        group = self._groups[self._model_of[request]]
        entry = group.holder(request)
        assert entry is not None and entry.is_here != is_here
        entry.is_here = is_here
        group.away += -1 if is_here else 1
        self._hold_kv(group, entry.tokens if is_here else -entry.tokens)

    def _something_happened(self) -> None:
        self._is_stale = self._is_load_stale = True
        self._counts = None

    def _group(self, model: ModelId) -> GroupT:
        """The group of `model`, which may have been loaded without ever having a request."""
        if model not in self._groups:
            self._groups[model] = self._new_group(model)
        return self._groups[model]

    def _runnable(self, now: float) -> Mapping[ModelId, GroupT]:
        """The groups that could make progress, were their model on the device."""
        return self._kv.runnable(self._active, now)


def _tokens(request: Request) -> int:
    return len(request.prompt_token_ids) + len(request.generated_token_ids)
