"""The scheduler seam: a pure state machine that says what one device does next.

Time is an argument, decisions are data. The live loop and the simulator drive the same object.
"""

from abc import ABC, abstractmethod

import msgspec

from aegaeon.explanations import Decision
from aegaeon.types import Action, Failure, Load, ModelId, Outcome, Request, RequestId


class SchedulerSnapshot(msgspec.Struct, frozen=True):
    """What the scheduler knows, for publishing: requests per model, residency, switches so far.

    `running` counts those on their way to another instance, too. `preloading` are models still to
    be loaded because the settings ask for it at start. `load` and `joins` are what a dispatcher
    goes by: how busy the device is in its policy's measure, and the models of which one request
    more makes no switch more. `to_prefill` are tokens that wait for it, of each model that has ever
    had requests.
    """

    current: ModelId | None
    resident: tuple[ModelId, ...]
    loading: ModelId | None
    waiting: dict[ModelId, int]
    running: dict[ModelId, int]
    switches: int
    preloading: tuple[ModelId, ...] = ()
    load: float = 0.0
    joins: tuple[ModelId, ...] = ()
    to_prefill: dict[ModelId, int] = {}


class Scheduler(ABC):
    """Decides for one device. The caller runs at most one compute action and one load at a time
    and reports every outcome; a request is forgotten once finished, failed or cancelled."""

    @abstractmethod
    def submit(self, request: Request, now: float) -> None:
        """Take a request in. Raises Overloaded when the bound on waiting requests is reached."""

    @abstractmethod
    def expect(self, request: RequestId, known_tokens: int, now: float) -> None:
        """Learn that, as it looks, so many of the tokens of a request that waits need not be run;
        others are ignored."""

    @abstractmethod
    def adopt(self, request: Request, now: float) -> None:
        """Take a request in that another instance has prefilled: it runs, the engine has its KV.

        Raises Overloaded, also when others here lack KV, and InvalidRequest where nothing decodes.
        """

    @abstractmethod
    def cancel(self, request: RequestId, now: float) -> None:
        """Forget a request, wherever it stands; unknown ids are ignored."""

    @abstractmethod
    def next_action(self, now: float) -> Action:
        """Return what the compute lane does now; the lane is free, and stays so with a Handoff.

        A request of a Handoff holds KV and is known until it is cancelled, however that ended.
        """

    @abstractmethod
    def next_load(self, now: float) -> Load | None:
        """Return what the copy lane brings in now, or None; the lane is free."""

    @abstractmethod
    def complete(self, outcome: Outcome, now: float) -> None:
        """Learn what an action did: tokens, finished, pre-empted and failed requests, residency.

        After LoadFailed every request of that model that is not leaving is forgotten; the caller
        answers them. After WeightsLost none is.
        """

    @abstractmethod
    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Return requests whose deadline has passed; the caller fails and cancels them."""

    @abstractmethod
    def given_up(self) -> tuple[Failure, ...]:
        """Return, once, requests for which there is no hope any more; the caller fails and cancels
        them before it asks for an action."""

    @abstractmethod
    def recent(
        self, request: RequestId | None, model: ModelId | None, limit: int
    ) -> tuple[Decision, ...]:
        """Return the last decisions: all, or those that concern `request`, and the weights and
        turns of `model`; changes nothing."""

    @abstractmethod
    def snapshot(self) -> SchedulerSnapshot:
        """Return the present state for the routing table; changes nothing."""
