"""An instance without a scheduler or an engine: answers what it is told to, as a thread."""

import threading
import time
from collections.abc import Callable

import msgspec

from aegaeon.deaths import Confirm, Death, Work, encode_deaths, name_of
from aegaeon.errors import AegaeonError, Forgotten
from aegaeon.explanations import Decision, Explain, Explained
from aegaeon.measures import Waited
from aegaeon.sampling import PromptScores, TokenLogProbs
from aegaeon.store.base import Domain, Mailbox
from aegaeon.store.codec import decode_instance_message, encode
from aegaeon.types import (
    Cancel,
    InstanceRecord,
    InstanceStatus,
    Moved,
    Preload,
    Request,
    RequestFailed,
    Submit,
    TokenEvent,
)

LEASE_S = 60.0
SCORED_AT_ONCE = 3  # tokens of a prompt
Reply = Callable[[Request], tuple[int, ...]]
ToProxy = TokenEvent | PromptScores | RequestFailed | Moved


def log_probs_of(token: int, best: int) -> TokenLogProbs:
    """What instances here say of a token, whatever came before it."""
    likeliest = tuple((token + rank, -0.25 - rank) for rank in range(best))
    return TokenLogProbs(-0.25, likeliest)


def wait_until(claim: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return once `claim` holds; fail the test when it does not within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline_s, "what the test waits for did not happen"
        time.sleep(0.005)


class FakeInstance:
    """Sends `reply(request)` token by token. A request stops after `hold_after` tokens until
    `release`; with `fail_with`, requests end in that error. `waited` is told with first
    tokens. One that `is_hung` reads nothing until `recover`."""

    waited: Waited | None = None
    confirmed = 0  # how often it was asked what it has

    def __init__(
        self,
        domain: Domain,
        reply: Reply,
        *,
        id: str = "instance-0",
        incarnation: int = 1,
        models: tuple[str, ...] = ("m",),
        role: str = "colocated",
        state: str = "ready",
        capacity_bytes: int = 4 << 20,
        is_hung: bool = False,
        node: str = "",
    ) -> None:
        self.domain, self.reply, self.id, self.incarnation = domain, reply, id, incarnation
        self.submitted: list[Request] = []
        self.cancelled, self.preloaded = list[str](), list[str]()
        self.asked: list[str | None] = []
        self.decisions: list[Decision] | None = []  # what it tells; None: it does not answer
        self.hold_after: int | None = None
        self.fail_with: tuple[str, str] | None = None
        self._should_hang, self._hangs = is_hung, threading.Event()
        self._running: dict[str, tuple[Request, list[int]]] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._stop = threading.Event()
        address = f"{id}-{incarnation}"
        self._mailbox = domain.create_mailbox(address, capacity_bytes)
        self._store = domain.metadata()
        self._record = InstanceRecord(
            id=id, incarnation=incarnation, role=role, device="fake", mailbox=address, pid=1,
            models=models, node=node,
        )  # fmt: skip
        self._store.register_instance(self._record, LEASE_S)
        self.publish(state)
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def publish(self, state: str = "ready", **fields: object) -> None:
        status = InstanceStatus(state=state, **fields)
        self._store.update_instance_status(self.id, self.incarnation, status)

    def serve(self, *models: str) -> None:
        """Serve these from here on."""
        self._record = msgspec.structs.replace(self._record, models=models)
        self._store.register_instance(self._record, LEASE_S)
        self.publish()

    def move(self, request: Request, to: "FakeInstance") -> None:
        """Let `to` go on with a held request, as instances do among themselves."""
        left = self._running.pop(request.id)[1]
        to.say(request, Moved(request.id, request.attempt, to.id, to.incarnation))
        to._running[request.id] = (request, left)
        to._mailbox.wake()

    def say(self, request: Request, reply: ToProxy) -> None:
        """Tell the request's proxy something."""
        self._send(request, reply)

    def release(self) -> None:
        self.hold_after = None
        self._mailbox.wake()

    def hang(self) -> None:
        """Read nothing from here on."""
        self._should_hang = True
        self._mailbox.wake()
        assert self._hangs.wait(20.0)

    def recover(self) -> None:
        """Go on as before `hang`."""
        self._should_hang = False

    def forget(self) -> None:
        """Give all requests up, as those of a proxy that takes nothing."""
        self._running.clear()

    def die(self, work: Work | None = None) -> None:
        """Vanish as a killed process does once the supervisor has noticed it, which tells of its
        `work`: without a word, all it had."""
        self._stop.set()
        self._mailbox.wake()
        self._thread.join(10)
        death = Death(self.incarnation, work or Work("m", tuple(self._running)))
        self.domain.board().publish(name_of(self.id), encode_deaths((death,)))
        self._mailbox.close()
        self._store.remove_instance(self.id, self.incarnation)

    def _loop(self) -> None:
        while not self._stop.is_set():
            if self._should_hang:
                self._hangs.set()
                self._stop.wait(0.005)
                continue
            for record in self._mailbox.receive(0.05):
                self._take(record)
            for request, left in tuple(self._running.values()):
                self._send_tokens(request, left)

    def _take(self, record: bytes) -> None:
        match decode_instance_message(record):
            case Submit(request=request):
                self.submitted.append(request)
                if self.fail_with is not None:
                    code, message = self.fail_with
                    failed = RequestFailed(request.id, request.attempt, code, message, self.id)
                    self._send(request, failed)
                    return
                self._score(request)
                tokens = list(self.reply(request))[: request.max_tokens]
                self._running[request.id] = (request, tokens[len(request.generated_token_ids) :])
            case Explain(ticket=ticket, reply_to=reply_to, request=request):
                if self.decisions is not None:
                    told = Explained(ticket, self.id, tuple(self.decisions))
                    self.domain.open_mailbox(reply_to).send(encode(told), 1.0)
                self.asked.append(request)
            case Confirm(attempts=attempts, reply_to=reply_to):
                self.confirmed += 1
                for request_id, attempt in attempts:
                    if request_id not in self._running:
                        code = Forgotten.code
                        failed = RequestFailed(request_id, attempt, code, "gone", self.id)
                        self.domain.open_mailbox(reply_to).send(encode(failed), 1.0)
            case Preload(model=model):
                self.preloaded.append(model)
            case Cancel(request_id=request_id) as cancel:
                self.cancelled.append(request_id)
                request, _ = self._running.get(request_id, (None, []))
                if request is not None and cancel.covers(request.attempt):
                    del self._running[request_id]

    def _score(self, request: Request) -> None:
        prompt, best = request.prompt_token_ids, request.sampling.prompt_logprobs
        for first in range(1, len(prompt), SCORED_AT_ONCE) if best is not None else ():
            tokens = prompt[first : first + SCORED_AT_ONCE]
            told = tuple(log_probs_of(token, best) for token in tokens)
            self._send(request, PromptScores(request.id, request.attempt, first, told))

    def _send_tokens(self, request: Request, left: list[int]) -> None:
        total = min(len(self.reply(request)), request.max_tokens)
        while left and not self._stop.is_set():
            position = total - len(left)
            if self.hold_after is not None and position >= self.hold_after:
                return
            token = left.pop(0)
            finish = None
            if token in request.stop_token_ids:
                finish = "stop"
            elif not left:
                finish = "length"
            best = request.sampling.logprobs
            event = TokenEvent(
                request.id, request.attempt, position, (token,), self.id, finish,
                () if best is None else (log_probs_of(token, best),),
                waited=None if position else self.waited,
            )  # fmt: skip
            self._send(request, event)
            if finish is not None:
                break
        if not self._stop.is_set():  # what it had when it died, it has
            self._running.pop(request.id, None)

    def _send(self, request: Request, reply: ToProxy) -> None:
        try:
            if request.reply_to not in self._mailboxes:
                self._mailboxes[request.reply_to] = self.domain.open_mailbox(request.reply_to)
            self._mailboxes[request.reply_to].send(encode(reply), 1.0)
        except AegaeonError:
            self._running.pop(request.id, None)
