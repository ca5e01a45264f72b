"""The engine seam: executes actions on one device and owns the sequences' tokens and memory.

No torch here: processes without a model use NullEngine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec

from aegaeon.engine.exchange import KvExchange, Room
from aegaeon.errors import ContextLengthExceeded, InvalidRequest
from aegaeon.measures import Phase, PhaseTotal
from aegaeon.types import (
    Begun,
    ComputeAction,
    Decode,
    KvHandle,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    ModelSpec,
    NewToken,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)

NO_BOUND_BYTES = 1 << 62


class EngineUsage(msgspec.Struct, frozen=True):
    """Bytes held now, against their budgets; what the node's cache holds, and what share
    of those that come there; and since the start:
    bytes moved, evictions from that cache by model and reason, forward passes, tokens that
    sequences began with, those of them whose KV was found, and blocks of KV that were kept to be
    found and made room for others. `stage_bytes` are those of the buffers that loads and copies go
    through, `grammar_host_bytes` what the process that follows schemas has in memory now."""

    weight_bytes: int
    weight_budget_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    moved: dict[Phase, PhaseTotal] = {}
    cached: tuple[ModelId, ...] = ()
    coming: dict[ModelId, float] = {}
    evicted: dict[ModelId, dict[str, int]] = {}
    passes: int = 0
    looked_up_tokens: int = 0
    found_tokens: int = 0
    evicted_blocks: int = 0
    stage_bytes: int = 0
    grammar_host_bytes: int = 0


class Engine(ABC):
    """One device's worker. `execute` and `load` may run at the same time, each on its own thread;
    the other verbs are called by the loop. Errors of a request or a model come back in the outcome;
    only a broken engine raises."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Make the sequence known. Raises InvalidRequest, ContextLengthExceeded, OutOfBlocks (would
        not fit even alone)."""

    @abstractmethod
    def known_tokens(self, request: RequestId) -> int:
        """Return how many tokens of a sequence, that is part of no running action, its next step
        need not run, as things stand: others may take the room of what is kept for it. 0 for
        unknown ids."""

    @abstractmethod
    def release(self, request: RequestId) -> None:
        """Forget the sequence and free what of its KV is still ours; unknown ids are ignored. Never
        called for a request that is part of a running action."""

    @abstractmethod
    def set_apart(self, request: RequestId) -> None:
        """A known sequence is to be handed over, once that costs nobody time: it is part of no
        action any more, and nothing takes its blocks."""

    @abstractmethod
    def hand_over(self, request: RequestId, by_host: bool = False) -> KvHandle:
        """Name the KV of a known sequence so that another instance of the node may adopt it. May
        copy all of it; actions go on meanwhile.

        It stays ours until adopted or released, and nothing else takes its blocks meanwhile. The
        sequence is part of no action any more. `by_host`: one of them could not reach it where it
        was, so it goes to memory that all do, now and from here on.
        """

    @abstractmethod
    def resume(self, request: RequestId) -> bool:
        """A sequence that was set apart, and perhaps named to others, goes on here; False where one
        of them has its KV by now: then it is to be released. Nobody gets it by an old name."""

    @property
    def exchange(self) -> KvExchange | None:
        """How keys and values go to and come from engines that share no memory with this one; None
        where there are none."""
        return None

    @abstractmethod
    def adopt(self, request: Request, kv: KvHandle, room: Room | None = None) -> None:
        """Make the sequence known, with KV that another instance handed over: ours from here on. It
        has been brought to `room`, or else is where `kv` says.

        Raises KvGone (not its sender's any more, or no KV that we could use), KvUnreachable (where
        we cannot read it), OutOfBlocks (no room for it now), and what `submit` raises.
        """

    @abstractmethod
    def execute(self, action: ComputeAction) -> Outcome:
        """Do a Switch, Prefill or Decode and say how it went; blocks. Raises DeviceLost."""

    @abstractmethod
    def load(self, action: Load) -> Outcome:
        """Evict and load weights; blocks. Never asked to evict a model while it computes. Raises
        DeviceLost."""

    @abstractmethod
    def begin_model(self, spec: ModelSpec) -> None:
        """Serve `spec`, too. No load is under way. Raises what keeps this engine from it, numbers
        and all: BudgetTooSmall, UnsupportedModel, ConfigError, CheckpointError."""

    @abstractmethod
    def end_model(self, model: ModelId) -> None:
        """Let go of a model that has no sequences and is part of no action; no load is under way.
        Unknown ids are ignored."""

    @abstractmethod
    def let_go(self, model: ModelId, idle_s: float | None) -> None:
        """Give up the weights of a model that is part of no action; no load is under way. The
        node's cache gives them up, too, soon, where nobody has used them for `idle_s` (None: it
        keeps them)."""

    @abstractmethod
    def usage(self) -> EngineUsage:
        """Return the bytes held now."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent."""


def check_request(request: Request, spec: ModelSpec) -> None:
    """Raise InvalidRequest or ContextLengthExceeded when `spec` can never serve `request`."""
    prompt = len(request.prompt_token_ids)
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    if request.max_tokens <= len(request.generated_token_ids):
        raise InvalidRequest(
            f"max_tokens {request.max_tokens} leaves nothing to generate; raise max_tokens"
        )
    # A prompt that is all the context can be scored: no token behind it is ever run.
    is_scored = request.max_tokens == 1
    if prompt + len(request.generated_token_ids) >= spec.context_tokens + is_scored:
        raise ContextLengthExceeded(
            f"{prompt} prompt tokens leave no room in the context of {spec.context_tokens} of "
            f"{spec.id}; shorten the prompt"
        )
    for token in (*request.prompt_token_ids, *request.generated_token_ids):
        if not 0 <= token < spec.vocab_tokens:
            raise InvalidRequest(f"token id {token} is outside the vocabulary of {spec.id}")


class Times:
    """How long a NullEngine takes, in seconds: each step as long as another, and each load."""

    def __init__(self, step_s: float = 0.0, load_s: float = 0.0) -> None:
        self._step_s = step_s
        self._load_s = load_s

    def load_s(self, model: ModelId) -> float:  # noqa: ARG002  other times are of the model
        """Of the weights of `model`."""
        return self._load_s

    def prefill_s(self, model: ModelId, spans: Sequence[tuple[int, int]]) -> float:  # noqa: ARG002
        """Of the tokens of prompts from one on and before another."""
        return self._step_s

    def decode_s(self, model: ModelId, context_tokens: int, requests: int) -> float:  # noqa: ARG002
        """Of a token for each of `requests`, which have `context_tokens` in all."""
        return self._step_s


class NullEngine(Engine):
    """An engine without a model, for tests of what stands around it; needs no torch.

    Token k of a request is a hash of its prompt, its seed and k, never a stop token, so requests
    end by length and resumed ones continue the same. Steps and loads take `step_s` and `load_s` of
    whatever `pause` waits on, or what `keep_to` says. Memory has no bounds; it is counted all the
    same. There is no KV to hand over, so adopting always succeeds.
    """

    def __init__(
        self,
        specs: tuple[ModelSpec, ...],
        pause: Callable[[float], None],
        step_s: float = 0.0,
        load_s: float = 0.0,
    ) -> None:
        self._specs = {spec.id: spec for spec in specs}
        self._pause = pause
        self._times = Times(step_s, load_s)
        self._requests: dict[RequestId, Request] = {}
        self._generated: dict[RequestId, int] = {}
        self._prefilled: dict[RequestId, int] = {}  # of prompts of which a piece has been run
        self._resident: dict[ModelId, int] = {}
        self._troubles: dict[ModelId, Outcome] = {}

    def keep_to(self, times: Times) -> None:
        """Take as long as `times` say from now on."""
        self._times = times

    def spoil(self, trouble: WeightsLost | LoadFailed) -> None:
        """For tests: the weights are gone, and the model's next action ends in `trouble`."""
        self._resident.pop(trouble.model, None)
        self._troubles[trouble.model] = trouble

    def submit(self, request: Request) -> None:
        check_request(request, self._specs[request.model])
        asked = request.sampling
        if asked.logprobs is not None or asked.prompt_logprobs is not None or asked.grammar:
            raise InvalidRequest("--device null has no logits; serve a model to ask for them")
        self._requests[request.id] = request
        self._generated[request.id] = len(request.generated_token_ids)

    def known_tokens(self, request: RequestId) -> int:  # noqa: ARG002  it keeps nothing
        return 0

    def release(self, request: RequestId) -> None:
        for known in (self._requests, self._generated, self._prefilled):
            known.pop(request, None)

    def set_apart(self, request: RequestId) -> None:
        """Nothing takes anything."""

    def hand_over(self, request: RequestId, by_host: bool = False) -> KvHandle:  # noqa: ARG002
        known = self._requests[request]
        tokens = len(known.prompt_token_ids) + self._generated[request]
        kv_bytes = tokens * self._specs[known.model].kv_token_bytes
        return KvHandle(owner=0, blocks=(), cached_tokens=tokens - 1, kv_bytes=kv_bytes)

    def resume(self, request: RequestId) -> bool:
        return request in self._requests

    def adopt(self, request: Request, kv: KvHandle, room: Room | None = None) -> None:  # noqa: ARG002
        self.submit(request)

    def execute(self, action: ComputeAction) -> Outcome:
        trouble = self._troubles.pop(action.model, None)
        if trouble is not None:
            return trouble
        if action.model not in self._resident:
            raise RuntimeError(f"{action} of a model that is not resident")
        match action:
            case Switch(model=model):
                return Switched(model, 0.0)
            case Prefill():
                return self._prefill(action)
            case Decode(model=model, requests=requests):
                known = [self._requests[request] for request in requests]
                context = sum(map(self._length, known))
                step_s = self._times.decode_s(model, context, len(known))
                self._pause(step_s)
                return Stepped(model, tuple(map(self._step, known)), step_s)

    def _prefill(self, action: Prefill) -> Stepped:
        known = [self._requests[request] for request in action.requests]
        starts = [self._prefilled.get(request.id, 0) for request in known]
        missing = [self._length(r) - start for r, start in zip(known, starts, strict=True)]
        shares = action.shares(missing)
        spans = [(at, at + share) for at, share in zip(starts, shares, strict=True)]
        step_s = self._times.prefill_s(action.model, spans)
        self._pause(step_s)
        tokens: list[NewToken] = []
        begun: list[Begun] = []
        for request, lacking, share in zip(known, missing, shares, strict=True):
            before = self._prefilled.pop(request.id, 0)
            if share == lacking:
                tokens.append(self._step(request))
            else:
                self._prefilled[request.id] = before + share
                begun.append(Begun(request.id, before + share, before))
        return Stepped(action.model, tuple(tokens), step_s, begun=tuple(begun))

    def _length(self, request: Request) -> int:
        return len(request.prompt_token_ids) + self._generated[request.id]

    def load(self, action: Load) -> Outcome:
        self._troubles.pop(action.model, None)
        for model in action.evict:
            self._resident.pop(model, None)
        load_s = self._times.load_s(action.model)
        self._pause(load_s)
        weight_bytes = self._specs[action.model].weight_bytes
        self._resident[action.model] = weight_bytes
        return Loaded(action.model, weight_bytes, load_s)

    def begin_model(self, spec: ModelSpec) -> None:
        self._specs[spec.id] = spec

    def end_model(self, model: ModelId) -> None:
        self._specs.pop(model, None)
        self._resident.pop(model, None)
        self._troubles.pop(model, None)

    def let_go(self, model: ModelId, idle_s: float | None) -> None:  # noqa: ARG002  no cache
        self._resident.pop(model, None)

    def usage(self) -> EngineUsage:
        kv_bytes = sum(
            (len(request.prompt_token_ids) + self._generated[request.id])
            * self._specs[request.model].kv_token_bytes
            for request in tuple(self._requests.values())
        )
        weight_bytes = sum(tuple(self._resident.values()))
        return EngineUsage(weight_bytes, NO_BOUND_BYTES, kv_bytes, NO_BOUND_BYTES)

    def close(self) -> None:
        for known in (self._requests, self._generated, self._prefilled):
            known.clear()
        self._resident.clear()

    def _step(self, request: Request) -> NewToken:
        spec = self._specs[request.model]
        position = self._generated[request.id]
        token_id = null_token(request, position, spec.vocab_tokens)
        self._generated[request.id] = position + 1
        total = len(request.prompt_token_ids) + position + 1
        if position + 1 < request.max_tokens and total < spec.context_tokens:
            return NewToken(request.id, token_id)
        self.release(request.id)
        return NewToken(request.id, token_id, "length")


def null_token(request: Request, position: int, vocab_tokens: int) -> int:
    """Return the token a NullEngine makes for `request` at `position` among the generated ones."""
    text = f"{request.prompt_token_ids} {request.sampling.seed} {position}"
    token_id = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") % vocab_tokens
    while token_id in request.stop_token_ids:
        token_id = (token_id + 1) % vocab_tokens
    return token_id
