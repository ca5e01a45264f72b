"""A lane: one thread that does one action at a time for the runtime, which owns and joins it."""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from aegaeon.types import Outcome

ActionT = TypeVar("ActionT")
POLL_S = 60.0  # no wait is for ever; an unused lane merely waits again


class Lane(ABC, Generic[ActionT]):
    """Runs one action at a time; `take` is polled by the owner."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether an action has been started whose outcome has not been taken."""

    @abstractmethod
    def start(self, action: ActionT) -> None:
        """Begin `action`; the lane must not be busy."""

    @abstractmethod
    def take(self) -> Outcome | None:
        """Return the outcome when the action has ended. Raises whatever the action raised."""

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """Let the lane end and wait for it; say whether it did. Idempotent."""


class ThreadLane(Lane[ActionT]):
    """A lane on a thread of its own. `on_end` is called on that thread after each action."""

    def __init__(
        self, name: str, run: Callable[[ActionT], Outcome], on_end: Callable[[], None]
    ) -> None:
        self._run = run
        self._on_end = on_end
        # One action, and behind it None: the end.
        self._actions: queue.Queue[ActionT | None] = queue.Queue(maxsize=2)
        self._outcomes: queue.Queue[Outcome | BaseException] = queue.Queue(maxsize=1)
        self._is_busy = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether an action has been started whose outcome has not been taken."""
        return self._is_busy

    def start(self, action: ActionT) -> None:
        """Hand `action` to the thread."""
        assert not self._is_busy and not self._is_closed, "one action at a time"
        self._is_busy = True
        self._actions.put_nowait(action)

    def take(self) -> Outcome | None:
        """Return the outcome, once; never waits."""
        try:
            outcome = self._outcomes.get_nowait()
        except queue.Empty:
            return None
        if isinstance(outcome, BaseException):
            raise outcome  # stays busy: a crashed lane takes nothing more
        self._is_busy = False
        return outcome

    def close(self, timeout_s: float) -> bool:
        """An action under way is not interrupted; the thread is a daemon if it outlasts us."""
        if not self._is_closed:
            self._is_closed = True
            self._actions.put_nowait(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            try:
                action = self._actions.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if action is None:
                return
            try:
                self._outcomes.put_nowait(self._run(action))
            except BaseException as error:
                self._outcomes.put_nowait(error)
            self._on_end()
