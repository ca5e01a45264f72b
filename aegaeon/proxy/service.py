"""What the routes do, without HTTP: a checked body becomes generations of a served model."""

import asyncio
import hashlib
import secrets
from functools import partial
from typing import Literal

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from aegaeon.explanations import Explanation
from aegaeon.proxy.answers import Health, InstanceHealth, ModelCard, ModelList
from aegaeon.proxy.chat import messages_for_template
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.failures import ApiError, as_api_error, invalid
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.openai import (
    COMPLETION_DEFAULT_TOKENS,
    Body,
    ChatBody,
    CompletionBody,
)
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.types import Instance, InstanceId, ModelId, ModelSpec, RequestId, SamplingParams

# Characters beyond the longest token's, for tokenizers and templates that drop some.
_SLACK = 4


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A checked and tokenised request: prompts times n generations, by choice index."""

    body: ChatBody | CompletionBody
    id: str  # of the answer
    generations: tuple[Generation, ...]
    text: TextModel
    prompt_tokens: int

    @property
    def is_chat(self) -> bool:
        """Whether the answer has the shape of a chat."""
        return isinstance(self.body, ChatBody)


class Service:
    """The served models and the way to them. One event loop owns it."""

    def __init__(
        self, settings: Settings, specs: tuple[ModelSpec, ...], gateway: Gateway, started_s: int
    ) -> None:
        self.settings = settings
        self.gateway = gateway
        self.is_draining = False
        self._specs = {spec.id: spec for spec in specs}
        self._texts: dict[ModelId, asyncio.Task[TextModel]] = {}
        self._started_s = started_s

    def warm(self) -> None:
        """Start reading every model's tokenizer, so that first requests do not wait for it."""
        for spec in self._specs.values():
            self._reading(spec)

    async def close(self) -> None:
        """Wait for what `warm` started."""
        await asyncio.gather(*self._texts.values(), return_exceptions=True)

    async def chat(self, body: ChatBody) -> Job:
        """Prepare a chat completion. Raises ApiError, or AegaeonError with a code of a request."""
        spec = self._spec(body.model)
        text = await self._text(spec)
        messages = messages_for_template(body.messages)
        _check_length(spec, text, sum(len(message["content"]) for message in messages), "messages")
        encode = partial(text.encode_chat, messages, None, body.chat_template_kwargs)
        try:
            prompt = await asyncio.to_thread(encode)
        except InvalidRequest as error:
            raise invalid("messages", str(error)) from None
        asked = body.max_completion_tokens or body.max_tokens
        return self._job(body, spec, text, [(prompt, asked or spec.context_tokens, bool(asked))])

    async def complete(self, body: CompletionBody) -> Job:
        """Prepare a text completion. Raises as `chat`."""
        spec = self._spec(body.model)
        text = await self._text(spec)
        asked = body.max_tokens
        prompts = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                _check_length(spec, text, len(prompt), "prompt")
                token_ids = await asyncio.to_thread(text.encode, prompt)
            else:
                token_ids = prompt
            prompts.append((token_ids, asked or COMPLETION_DEFAULT_TOKENS, bool(asked)))
        return self._job(body, spec, text, prompts)

    def choices(self, job: Job) -> Choices:
        """Return the running choices of `job`, to be entered as a context."""
        detokenizers = [job.text.detokenizer() for _ in job.generations]
        return Choices(self.gateway, job.generations, detokenizers, job.body.stops())

    def models(self) -> ModelList:
        """Return the served models, with where their weights are now."""
        rows = self.gateway.instances()
        return ModelList(data=[self._card(spec, rows) for spec in self._specs.values()])

    def model(self, model: ModelId) -> ModelCard:
        """Return one served model. Raises ModelNotFound."""
        return self._card(self._spec(model), self.gateway.instances())

    def health(self) -> Health:
        """Return how the instances are, as last published; wakes nobody."""
        instances = [_instance_health(row) for row in self.gateway.instances()]
        status: Literal["ok", "unavailable", "draining"] = "unavailable"
        if self.is_draining:
            status = "draining"
        elif self.gateway.is_ready():
            status = "ok"
        return Health(status, self.gateway.open_requests, instances)

    async def explain(
        self, request: RequestId | None, instance: InstanceId | None, limit: int
    ) -> Explanation:
        """Return what was decided lately; loads and delays nothing. Raises ApiError where nothing
        is known of `request` or `instance`."""
        names = [row.record.id for row in self.gateway.instances()]
        if instance is not None and instance not in names:
            known = ", ".join(names) or "none"
            raise ApiError(404, "not_found", f"no instance {instance!r} lives; living are: {known}")
        found = await self.gateway.explain(request, instance, limit)
        if request is not None and not (found.dispatched or found.decisions):
            message = f"nothing is remembered of request {request!r}; only the last ones are"
            raise ApiError(404, "not_found", message)
        return found

    def _spec(self, model: ModelId) -> ModelSpec:
        spec = self._specs.get(model)
        if spec is None:
            served = ", ".join(self._specs)
            raise ModelNotFound(f"no model {model!r} is served; served are: {served}")
        return spec

    def _reading(self, spec: ModelSpec) -> asyncio.Task[TextModel]:
        task = self._texts.get(spec.id)
        if task is None or (task.done() and task.exception() is not None):
            task = asyncio.create_task(asyncio.to_thread(TextModel, spec.path))
            self._texts[spec.id] = task
        return task

    async def _text(self, spec: ModelSpec) -> TextModel:
        # Shielded: the reading is shared by all who wait, and one of them may go away.
        return await asyncio.shield(self._reading(spec))

    def _job(
        self,
        body: ChatBody | CompletionBody,
        spec: ModelSpec,
        text: TextModel,
        prompts: list[tuple[tuple[int, ...], int, bool]],
    ) -> Job:
        sampling = _sampling(body, text)
        stop_token_ids = () if body.ignore_eos else text.stop_token_ids
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        answer_id = f"{'chatcmpl' if param == 'messages' else 'cmpl'}-{secrets.token_hex(12)}"
        generations = [
            Generation(
                model=spec.id,
                prompt_token_ids=token_ids,
                sampling=msgspec.structs.replace(sampling, seed=_child_seed(sampling.seed, choice)),
                max_tokens=_max_tokens(spec, token_ids, asked, is_firm, param),
                stop_token_ids=stop_token_ids,
            )
            for token_ids, asked, is_firm in prompts
            for choice in range(body.n or 1)
        ]
        return Job(
            body=body,
            id=answer_id,
            generations=tuple(
                msgspec.structs.replace(generation, id=f"{answer_id}.{index}")
                for index, generation in enumerate(generations)
            ),
            text=text,
            prompt_tokens=sum(len(token_ids) for token_ids, _, _ in prompts),
        )

    def _card(self, spec: ModelSpec, rows: tuple[Instance, ...]) -> ModelCard:
        return ModelCard(
            id=spec.id,
            created=self._started_s,
            max_model_len=spec.context_tokens,
            quantize=spec.quantize,
            status=_whereabouts(spec.id, rows),
        )


def _max_tokens(
    spec: ModelSpec, token_ids: tuple[int, ...], asked: int, is_firm: bool, param: str
) -> int:
    """Return how much to generate; only a default gives way to the context."""
    if not token_ids:
        raise invalid(param, f"'{param}' has no tokens; send some text")
    wrong = next((t for t in token_ids if not 0 <= t < spec.vocab_tokens), None)
    if wrong is not None:
        text = f"token id {wrong} is not in the vocabulary of {spec.vocab_tokens} tokens"
        raise invalid(param, text)
    room = spec.context_tokens - len(token_ids)
    needed = asked if is_firm else 1
    if needed > room:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but the prompt has "
            f"{len(token_ids)} and {needed} more are to be generated; shorten one of them",
            param,
        )
    return min(asked, room)


def _check_length(spec: ModelSpec, text: TextModel, chars: int, param: str) -> None:
    """Refuse what cannot fit by far: to tokenise megabytes takes seconds of a processor."""
    if chars > _SLACK * spec.context_tokens * text.longest_token_chars:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but the prompt has {chars} "
            "characters; shorten it",
            param,
        )


def _too_long(message: str, param: str) -> ApiError:
    exceeded = as_api_error(ContextLengthExceeded(message))
    return ApiError(exceeded.status, exceeded.code, exceeded.message, param)


def _sampling(body: Body, text: TextModel) -> SamplingParams:
    """Merge what the client gave over the model's own defaults; a missing seed is drawn."""
    values = msgspec.structs.asdict(text.defaults)
    for name in values:
        given = getattr(body, name)
        if given is not None:
            values[name] = given
    if values["top_p"] == 0:
        # No probability at all still leaves the best token.
        values.update(top_p=1.0, top_k=1)
    values["top_k"] = max(values["top_k"], 0)
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    return SamplingParams(**values, seed=seed)


def _child_seed(seed: int, choice: int) -> int:
    """Choice 0 draws as if it were alone; the others from seeds of their own."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _whereabouts(
    model: ModelId, rows: tuple[Instance, ...]
) -> Literal["running", "resident", "loading", "idle"]:
    if any(row.status.running.get(model) for row in rows):
        return "running"
    if any(model in row.status.resident for row in rows):
        return "resident"
    if any(model == row.status.loading for row in rows):
        return "loading"
    return "idle"


def _instance_health(row: Instance) -> InstanceHealth:
    status = row.status
    return InstanceHealth(
        id=row.record.id,
        state=status.state,
        role=row.record.role,
        device=row.record.device,
        current=status.current,
        resident=status.resident,
        loading=status.loading,
        waiting=status.waiting,
        running=status.running,
        switches=status.switches,
        switch_s=status.switch_s,
        stall_s=status.stall_s,
        compute_s=status.compute_s,
        expected_s=status.expected_s,
        looked_up_tokens=status.looked_up_tokens,
        found_tokens=status.found_tokens,
        evicted_blocks=status.evicted_blocks,
    )
