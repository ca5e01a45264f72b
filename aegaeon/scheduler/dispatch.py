"""Where live requests go: instances of a routing snapshot as places, for a policy's dispatcher.

New and resumed requests go to an instance that prefills, prefilled ones to one that decodes. Where
a policy sends a new one stands, unless another place has kept so much of the prompt that its first
token comes sooner there. Recording the assignment and sending it are the business of who asks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from aegaeon.measures import Speed
from aegaeon.scheduler.places import Dispatcher, Place
from aegaeon.types import Instance, InstanceId, ModelId, Role

PREFILLING: tuple[Role, ...] = ("prefill", "colocated")
DECODING: tuple[Role, ...] = ("decode", "colocated")
UNKNOWN_LOAD = 0.05  # of a request at an instance whose load says nothing of what one is
# For the sake of what it has kept of a prompt, a place gets no more requests than so many beyond
# those of where the policy would send it; nor for less than so much time.
MOST_AHEAD = 16
LEAST_GAIN_S = 0.05

# Per instance and model, requests that were sent there and that it has not published yet.
Unseen = Mapping[InstanceId, Mapping[ModelId, int]]
Why = Literal["only_one", "home", "resident", "least_load", "prefix", "least_wait"]


class Choice(NamedTuple):
    """The instance chosen, and why."""

    instance: InstanceId
    reason: Why


class Prompt(NamedTuple):
    """How long a prompt is, and of how many of its first tokens instances may have kept keys and
    values."""

    tokens: int = 0
    known: Mapping[InstanceId, int] = {}


class LivePlace:
    """An instance as its row says, and what was sent there since."""

    def __init__(self, row: Instance, unseen: Mapping[ModelId, int]) -> None:
        self._status = row.status
        self._unseen = unseen
        self.id = row.record.id
        self.role: Role = row.record.role

    @property
    def load(self) -> float:
        """As published; each request since counts as the others there do."""
        status = self._status
        known = sum(status.waiting.values()) + sum(status.running.values())
        each = status.load / known if known and status.load > 0 else UNKNOWN_LOAD
        return status.load + each * sum(self._unseen.values())

    @property
    def requests(self) -> int:
        """Those of all models, published and sent since."""
        status = self._status
        known = sum(status.waiting.values()) + sum(status.running.values())
        return known + sum(self._unseen.values())

    @property
    def speeds(self) -> Mapping[ModelId, Speed]:
        """As published, of models that have had requests there."""
        return self._status.speeds

    def wait_s(self, each_s: float) -> float:
        """Seconds of prefilling before one more: those published, `each_s` for each sent since."""
        return self._status.ahead_s + each_s * sum(self._unseen.values())

    def requests_of(self, model: ModelId) -> int:
        """Those published and those sent since."""
        status = self._status
        known = status.waiting.get(model, 0) + status.running.get(model, 0)
        return known + self._unseen.get(model, 0)

    def is_resident(self, model: ModelId) -> bool:
        """As published."""
        return model in self._status.resident or model == self._status.loading

    def joins(self, model: ModelId) -> bool:
        """As published, or because some were sent since."""
        return model in self._status.joins or model in self._unseen


class LiveDispatcher:
    """A policy's choice among the instances that can serve a request."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        dispatcher.has_peers = True
        self._dispatcher = dispatcher

    def dispatch(
        self,
        rows: Sequence[Instance],
        model: ModelId,
        unseen: Unseen,
        prompt: Prompt = Prompt(),  # noqa: B008  frozen
    ) -> Choice | None:
        """Return the instance that should prefill `prompt` for `model`, or None when none can:
        only ready ones that prefill and serve the model can."""
        able = [row for row in rows if row.record.role in PREFILLING and is_able(row, model)]
        return _chosen(self._dispatcher.dispatch, able, model, unseen, prompt)

    def dispatch_prefilled(
        self, rows: Sequence[Instance], model: ModelId, kv_bytes: int, unseen: Unseen
    ) -> Choice | None:
        """Return the instance that should decode a request with `kv_bytes` of KV, or None.

        As `dispatch`, among those that decode and have room for the KV by what they published.
        """
        able = [
            row
            for row in rows
            if row.record.role in DECODING
            and is_able(row, model)
            and row.status.kv_free_bytes >= kv_bytes
        ]
        return _chosen(self._dispatcher.dispatch_prefilled, able, model, unseen)


def can_serve(instances: tuple[Instance, ...]) -> bool:
    """Whether some ready instance prefills and some ready one decodes."""
    roles = {i.record.role for i in instances if i.status.state == "ready"}
    return not roles.isdisjoint(PREFILLING) and not roles.isdisjoint(DECODING)


def is_able(instance: Instance, model: ModelId) -> bool:
    """Whether an instance is ready and serves `model`."""
    return instance.status.state == "ready" and model in instance.record.models


def _chosen(
    choose: Callable[[Sequence[Place], ModelId], int],
    able: Sequence[Instance],
    model: ModelId,
    unseen: Unseen,
    prompt: Prompt = Prompt(),  # noqa: B008  frozen
) -> Choice | None:
    if not able:
        return None
    places = [LivePlace(row, unseen.get(row.record.id, {})) for row in able]
    policys = places[choose(places, model)]
    place = soonest(places, policys, model, prompt)
    reason: Why = "least_load"
    if place is not policys:
        reason = "prefix"
    elif len(places) == 1:
        reason = "only_one"
    elif place.requests_of(model):
        reason = "home"
    elif place.is_resident(model):
        reason = "resident"
    return Choice(place.id, reason)


def soonest(
    places: Sequence[LivePlace], policys: LivePlace, model: ModelId, prompt: Prompt
) -> LivePlace:
    """Return the place of those that know more of `prompt` than `policys` where its first token
    comes soonest, if that is sooner than there; else `policys`.

    None is chosen that has MOST_AHEAD more requests: so what all prompts begin with is soon known
    in several places.
    """
    known = prompt.known
    nearer = [
        place
        for place in places
        if known.get(place.id, 0) > known.get(policys.id, 0)
        and place.requests < policys.requests + MOST_AHEAD
    ]
    speeds = [place.speeds[model] for place in (*nearer, *places) if model in place.speeds]
    if not nearer or not speeds:
        return policys
    first_s = {
        place.id: _first_token_s(place, place.speeds.get(model, speeds[0]), model, prompt)
        for place in (policys, *nearer)
    }
    best = min(nearer, key=lambda place: first_s[place.id])
    return best if first_s[best.id] < first_s[policys.id] - LEAST_GAIN_S else policys


def _first_token_s(place: LivePlace, speed: Speed, model: ModelId, prompt: Prompt) -> float:
    """When `place` would have prefilled `prompt`: behind those there, with the weights."""
    tokens = prompt.tokens - prompt.known.get(place.id, 0)
    prefill_s = tokens * speed.token_s
    load_s = 0.0 if place.is_resident(model) else speed.load_s
    return place.wait_s(prefill_s) + load_s + prefill_s
