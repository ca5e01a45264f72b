"""The records that cross modules and processes: requests, messages, actions, outcomes, instances.

Only data lives here. All of it is frozen; alternatives are tagged unions taken apart with `match`.
"""

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from aegaeon.handles import DeviceKv as DeviceKv  # noqa: PLC0414  records of ours, too
from aegaeon.handles import KvHandle as KvHandle  # noqa: PLC0414
from aegaeon.handles import Preload as Preload  # noqa: PLC0414
from aegaeon.measures import NOT_WAITED, Phase, PhaseTotal, Speed, Waited
from aegaeon.sampling import PromptScores, SamplingParams, TokenLogProbs
from aegaeon.specs import ModelSpec as ModelSpec  # noqa: PLC0414
from aegaeon.specs import Quantize as Quantize  # noqa: PLC0414

ModelId: TypeAlias = str
RequestId: TypeAlias = str
InstanceId: TypeAlias = str

Role = Literal["colocated", "prefill", "decode"]
InstanceState = Literal["starting", "ready", "draining", "stuck"]
FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, as token ids. Times are seconds of the machine's monotonic clock.

    `generated_token_ids` are tokens that an earlier attempt already made and the client already
    has: the instance continues behind them. `max_tokens` counts them too. The requests of a `key`
    share what a device gives, by their keys' weights."""

    id: RequestId
    model: ModelId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    reply_to: str
    arrival_s: float
    deadline_s: float
    generated_token_ids: tuple[int, ...] = ()
    attempt: int = 0
    moves: int = 0  # of this attempt, which may come back to where it was
    key: str = ""
    weight: float = 1.0
    waited: Waited = NOT_WAITED  # before this attempt, and elsewhere
    is_suspect: bool = False  # of having ended instances: nobody is to be computed with it


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Proxy to instance: generate this. `ahead_s` is how far the wall's clock is ahead of the
    proxy's, where they may be on two machines (clocks.py)."""

    request: Request
    ahead_s: float | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """To an instance: nobody waits for this any more; free what it holds. Idempotent. Attempts
    later than `attempt` go on (None: no attempt does)."""

    request_id: RequestId
    attempt: int | None = None

    def covers(self, attempt: int) -> bool:
        """Whether `attempt` is to end."""
        return self.attempt is None or attempt <= self.attempt


class Drain(msgspec.Struct, frozen=True, tag=True):
    """To an instance: take nothing new, end what is running, then exit."""


class Transfer(msgspec.Struct, frozen=True, tag=True):
    """Instance to instance: go on with `request`, whose tokens so far its proxy already has.

    The KV may be adopted before `expires_s` only (the sender's monotonic clock; `ahead_s` as in
    Submit): later its blocks may hold something else. Answered to the mailbox `sender`."""

    request: Request
    kv: KvHandle
    sender: str
    expires_s: float
    ahead_s: float | None = None
    within_s: float | None = None  # on another node, in place of `expires_s`: since it came there


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Answer to a Transfer: the request lives at `instance` now."""

    request_id: RequestId
    attempt: int
    instance: InstanceId


class Declined(msgspec.Struct, frozen=True, tag=True):
    """Answer to a Transfer: not here; the KV has not been touched."""

    request_id: RequestId
    attempt: int
    instance: InstanceId
    code: str
    message: str


InstanceMessage = Submit | Cancel | Drain | Preload | Transfer | Accepted | Declined


class TokenEvent(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    """Instance to proxy: tokens of one request, the first at `position` among the generated ones.

    The event with a `finish_reason` is the request's last one. With `stop`, the stop token itself
    is the last of `token_ids`. `log_probs` are theirs, where the request asks for them; `waited`
    comes with the first, the last and whenever it has grown.
    """

    request_id: RequestId
    attempt: int
    position: int
    token_ids: tuple[int, ...]
    instance: InstanceId
    finish_reason: FinishReason | None = None
    log_probs: tuple[TokenLogProbs, ...] = ()
    waited: Waited | None = None
    cached_tokens: int = 0  # of the prompt, that had not to be prefilled; with the first


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    """Instance to proxy: the request ended without its tokens. `code` is the error class's code."""

    request_id: RequestId
    attempt: int
    code: str
    message: str
    instance: InstanceId


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Instance to proxy: the request lives here from now on; further tokens come from here."""

    request_id: RequestId
    attempt: int
    instance: InstanceId
    incarnation: int


Reply = TokenEvent | PromptScores | RequestFailed | Moved


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Compute lane: the device belongs to `model`, which is resident, from here on."""

    model: ModelId


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """Compute lane: run the prompts of `requests` and make one token for each.

    With `max_tokens` run only so many tokens, at least 1, those of the first request first: whose
    prompt does not end with them gets no token yet.
    """

    model: ModelId
    requests: tuple[RequestId, ...]
    max_tokens: int | None = None

    def shares(self, missing: Iterable[int]) -> list[int]:
        """Return how many tokens each prompt gets on by that lacks so many."""
        left = self.max_tokens
        if left is None:
            return list(missing)
        shares: list[int] = []
        for tokens in missing:
            shares.append(min(tokens, left))
            left -= shares[-1]
        return shares


class Stretch(msgspec.Struct, frozen=True):
    """How long a scheduler would say the same decode again if nothing but its steps happened.

    It wants to be asked again after `steps` steps; after the first that ends at or after
    `until_s`; and after the first that ends with the most urgent request `lead_s` ahead. That one
    had `made` tokens, the first at `first_s`; n steps on, the next is due at `first_s` +
    (`made` + n) * `tbt_s`.
    """

    steps: int = 1
    until_s: float = math.inf
    lead_s: float = math.inf
    first_s: float = 0.0
    made: int = 0
    tbt_s: float = 0.0

    def is_over(self, steps: int, now: float) -> bool:
        """Whether the scheduler wants to be asked, `steps` steps on."""
        if steps >= self.steps or now >= self.until_s:
            return True
        return self.first_s + (self.made + steps) * self.tbt_s - now >= self.lead_s

    def after(self, steps: int) -> "Stretch":
        """What is left of it, `steps` steps on."""
        left, made = self.steps - steps, self.made + steps
        return Stretch(left, self.until_s, self.lead_s, self.first_s, made, self.tbt_s)


ONE_STEP = Stretch()


class Decode(msgspec.Struct, frozen=True, tag=True):
    """Compute lane: make the next token of each of `requests`, in one step.

    Who knows how long each step takes may do as many as `stretch` allows before it asks again.
    """

    model: ModelId
    requests: tuple[RequestId, ...]
    stretch: Stretch = ONE_STEP


class Load(msgspec.Struct, frozen=True, tag=True):
    """Copy lane: drop the weights of `evict`, move the KV of the requests `offload` to the host,
    then bring in the weights of `model`, unless they are there, and the KV of `bring`.

    Without weights or KV to bring in it only makes room. Engines that move KV by themselves are
    never told to.
    """

    model: ModelId
    evict: tuple[ModelId, ...] = ()
    offload: tuple[RequestId, ...] = ()
    bring: tuple[RequestId, ...] = ()


class Idle(msgspec.Struct, frozen=True, tag=True):
    """Compute lane: nothing to do before `until_s` (None: until a message or an outcome comes)."""

    until_s: float | None = None


class Handoff(msgspec.Struct, frozen=True, tag=True):
    """No lane: pass `request`, prefilled and not ended, to an instance that decodes."""

    request: RequestId


ComputeAction = Switch | Prefill | Decode
Action = Switch | Prefill | Decode | Handoff | Idle


class NewToken(msgspec.Struct, frozen=True):
    """A token just made; with a finish reason it is the request's last and its KV is free again.
    The step began behind `cached_tokens` whose KV others had left."""

    request_id: RequestId
    token_id: int
    finish_reason: FinishReason | None = None
    log_probs: TokenLogProbs | None = None
    cached_tokens: int = 0


class Begun(msgspec.Struct, frozen=True):
    """A prompt that a prefill has run a piece of: the first `tokens` of the request have keys and
    values, of which the step found `cached_tokens`. Room is held for all of them."""

    request_id: RequestId
    tokens: int
    cached_tokens: int


class Switched(msgspec.Struct, frozen=True, tag=True):
    """The device now belongs to `model`."""

    model: ModelId
    took_s: float


Failure = tuple[RequestId, str, str]  # with the error's code and message


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """A prefill or decode ended.

    `preempted` lost their KV for want of blocks and must be prefilled again (their tokens so far
    stay); `shortage` says why there were none. `failed` are out; other requests are unharmed.
    `scores` come before the tokens. `begun` hold KV and have no token yet. `is_apart`: not all were
    computed together.
    """

    model: ModelId
    tokens: tuple[NewToken, ...]
    took_s: float
    preempted: tuple[RequestId, ...] = ()
    failed: tuple[Failure, ...] = ()
    shortage: str = ""
    scores: tuple[PromptScores, ...] = ()
    begun: tuple[Begun, ...] = ()
    is_apart: bool = False


class Ran(msgspec.Struct, frozen=True, tag=True):
    """`steps` steps of one decode ended: each of its requests has that many more tokens, and
    those in `ended` have all they wanted."""

    model: ModelId
    steps: int
    ended: tuple[RequestId, ...]
    took_s: float


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """`model` is resident and computes from here on; `evicted` made room and no longer are."""

    model: ModelId
    weight_bytes: int
    took_s: float
    evicted: tuple[ModelId, ...] = ()
    is_whole: bool = True  # else the last layers still come


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """`model` could not be loaded; its requests end with `code` and `message`. From the compute
    lane, too: later layers come in while the first ones compute."""

    model: ModelId
    code: str
    message: str


class WeightsLost(msgspec.Struct, frozen=True, tag=True):
    """The action did nothing: others took the room of `model`'s weights, which must be loaded
    again. Its requests keep their tokens and their KV. Of a Load: it is long in coming; others may
    be loaded until it is asked for again."""

    model: ModelId


Outcome = Switched | Stepped | Ran | Loaded | LoadFailed | WeightsLost


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance says once, when it registers. A restart has a higher `incarnation`."""

    id: InstanceId
    incarnation: int
    role: Role
    device: str
    mailbox: str
    pid: int
    models: tuple[ModelId, ...]
    node: str = ""  # only those of one have each other's memory


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance publishes. Counts are requests; seconds, `switches`, `moved` since start:
    `stall_s` with requests and nothing computed, `compute_s` in steps (`expected_s` by the costs).
    `weight_bytes`: of the cache, or the device's memory. One request more of `joins`: no switch.
    `refused` cannot be served here, with the reason, `failed` were not loaded; of `loading` the
    share `coming` is cached. `catalog` is the version that is served. `ahead_s` of prefilling wait,
    by `speeds`, which are of models that have had requests."""

    state: InstanceState = "starting"
    current: ModelId | None = None
    resident: tuple[ModelId, ...] = ()
    loading: ModelId | None = None
    waiting: dict[ModelId, int] = {}
    running: dict[ModelId, int] = {}
    kv_free_bytes: int = 0
    load: float = 0.0
    joins: tuple[ModelId, ...] = ()
    switches: int = 0
    switch_s: float = 0.0
    stall_s: float = 0.0
    compute_s: float = 0.0
    expected_s: float = 0.0
    weight_bytes: int = 0
    moved: dict[Phase, PhaseTotal] = {}
    refused: dict[ModelId, str] = {}
    failed: dict[ModelId, str] = {}
    coming: float = 0.0
    catalog: int = 0
    looked_up_tokens: int = 0  # of prompts, of which `found_tokens` had not to be prefilled
    found_tokens: int = 0
    evicted_blocks: int = 0  # of KV that was kept to be found
    ahead_s: float = 0.0
    speeds: dict[ModelId, Speed] = {}


class Instance(msgspec.Struct, frozen=True):
    """A row of the routing snapshot: an instance whose lease is alive, for `lease_left_s` more if
    nobody renews it, where the store tells."""

    record: InstanceRecord
    status: InstanceStatus
    lease_left_s: float | None = None
