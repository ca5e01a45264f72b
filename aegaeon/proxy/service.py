"""What the routes do, without HTTP: a checked body becomes generations of a served model."""

import asyncio
import secrets
from collections.abc import Iterable
from functools import partial
from typing import Literal

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import DeadlineExceeded, InvalidRequest, ModelNotFound
from aegaeon.explanations import Explanation
from aegaeon.logs import set_level
from aegaeon.models.here import Here
from aegaeon.proxy.answers import Health, InstanceHealth, ModelCard, ModelList, Ready
from aegaeon.proxy.asked import (
    Asked,
    Prompt,
    chars_of,
    check_length,
    child_seed,
    held_to,
    ids_of,
    kept_of,
    max_tokens,
    sampling_of,
)
from aegaeon.proxy.chat import messages_for_template
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.grammars import (
    GrammarChecker,
    Tools,
    answer_grammar,
    for_template,
    tools_of,
)
from aegaeon.proxy.keys import Key
from aegaeon.proxy.logprobs import TokenBytes
from aegaeon.proxy.metrics_text import Text as MetricsText
from aegaeon.proxy.metrics_text import write
from aegaeon.proxy.openai import (
    COMPLETION_DEFAULT_TOKENS,
    ChatBody,
    CompletionBody,
)
from aegaeon.proxy.readiness import Readiness
from aegaeon.proxy.rendering import Renderer
from aegaeon.proxy.status import Status, card_of, failed_pins, status_of
from aegaeon.proxy.texts import Texts
from aegaeon.proxy.tokenize import (
    DetokenizeBody,
    Detokenized,
    TokenizeBody,
    Tokenized,
    chat_ids,
    detokenize,
    tokenize,
)
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.proxy.traces import Trace
from aegaeon.proxy.transcript import Echo, Transcript
from aegaeon.proxy.values import size_of
from aegaeon.specs import Catalog
from aegaeon.types import Instance, InstanceId, ModelId, ModelSpec, RequestId


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A checked and tokenised request: prompts times n generations, by choice index."""

    body: Asked  # what is kept of it
    id: str  # of the answer
    generations: tuple[Generation, ...]
    text: TextModel
    prompt_tokens: int
    echoes: tuple[Echo | None, ...]  # as the generations
    tools: Tools | None = None

    @property
    def bytes_of(self) -> TokenBytes | None:
        """What names tokens, where log-probabilities are asked for."""
        return None if self.body.logprobs is None else self.text.token_bytes

    @property
    def is_chat(self) -> bool:
        """Whether the answer has the shape of a chat."""
        return self.body.is_chat

    def traced(self, trace: Trace | None) -> "Job":
        """Return it as part of what `trace` is of, if anything."""
        if trace is None:
            return self
        trace.asks(self.body.named, self.id, self.generations[0].model, self.prompt_tokens)
        traced = (msgspec.structs.replace(one, trace=trace) for one in self.generations)
        return msgspec.structs.replace(self, generations=tuple(traced))

    def asked_with(self, key: Key | None) -> "Job":
        """Return it as of whoever bears `key`, among whom devices are shared."""
        if key is None:
            return self
        share = {"key": key.name, "weight": key.weight}
        owned = (msgspec.structs.replace(one, **share) for one in self.generations)
        return msgspec.structs.replace(self, generations=tuple(owned))


class Service:
    """The served models and the way to them. One event loop owns it."""

    def __init__(
        self, settings: Settings, specs: tuple[ModelSpec, ...], gateway: Gateway, started_s: int
    ) -> None:
        self.settings = settings
        self.gateway = gateway
        self.is_draining = False
        self.complaint = ""  # what is wrong with the configuration, if anything
        self._catalog = Catalog(models=specs)
        self._named = self._catalog.by_name()
        self._renderer = Renderer()
        here = Here(settings.models_dir) if settings.clustered is not None else None
        self._texts = Texts(self._renderer.template, here=here)
        self._started_s = started_s
        self._checker = GrammarChecker()
        self._readiness = Readiness(gateway, settings)
        self._exposition = MetricsText()

    @property
    def catalog(self) -> Catalog:
        """What is served."""
        return self._catalog

    def follow(self, catalog: Catalog) -> None:
        """Serve what the domain's catalogue says from here on; open answers go on."""
        if catalog.version <= self._catalog.version:
            return
        self._catalog = catalog
        self.complaint = catalog.complaint
        if catalog.bounds is not None:
            bounds = msgspec.structs.asdict(catalog.bounds)
            self.settings = msgspec.structs.replace(self.settings, **bounds)
            self.gateway.bound(catalog.bounds)
            set_level(catalog.bounds.log_level)
        self.gateway.serve(catalog.models)
        self._named = catalog.by_name()
        self.warm()

    def warm(self) -> None:
        """Start reading the models' tokenizers, so that first requests do not wait for them."""
        self._texts.follow(self._catalog.models)

    def names_of(self, model: ModelId) -> tuple[ModelId, ...]:
        """Return all names of the model that is called so; the name itself where none is."""
        spec = self._named.get(model)
        return (model,) if spec is None else spec.names

    async def close(self) -> None:
        """End what `warm` started, and what renders."""
        self._checker.close()
        await self._texts.close()
        await asyncio.to_thread(self._renderer.close)

    async def chat(self, body: ChatBody, asker: str = "") -> Job:
        """Prepare a chat completion. Raises ApiError, or AegaeonError with a request's code."""
        spec = self._spec(body.model)
        text = await self._text(spec)
        messages = messages_for_template(body.messages)
        tools = tools_of(body, text)
        shown = None if tools is None else for_template(body)
        chars = chars_of(messages)
        check_length(spec, text, chars + len(msgspec.json.encode(shown)), "messages")
        grammar = answer_grammar(body) if tools is None else tools.grammar()
        if grammar:
            param = "response_format" if tools is None else "tools"
            await self._checker.check(grammar, param, asker)
        encode = partial(chat_ids, spec, text, messages, shown, body.chat_template_kwargs)
        try:
            prompt = await asyncio.to_thread(encode)
        except InvalidRequest as error:
            raise invalid("messages", str(error)) from None
        asked = body.max_completion_tokens or body.max_tokens
        whole = Prompt(prompt, asked or spec.context_tokens, bool(asked))
        job = self._job(body, spec, text, [whole])
        kept_bytes = 0 if tools is None else size_of(tools.functions)
        held = tuple(held_to(grammar, one, kept_bytes) for one in job.generations)
        return msgspec.structs.replace(job, tools=tools, generations=held)

    async def complete(self, body: CompletionBody) -> Job:
        """Prepare a text completion. Raises as `chat`."""
        spec = self._spec(body.model)
        text = await self._text(spec)
        asked = body.max_tokens
        most = COMPLETION_DEFAULT_TOKENS if asked is None else asked
        prompts = []
        for given in body.prompts():
            if isinstance(given, str):
                encode = partial(ids_of, spec, text, given, "prompt", add_special_tokens=True)
                prompt = Prompt(await asyncio.to_thread(encode), most, asked is not None)
                shown = given
            else:
                prompt = Prompt(given, most, asked is not None)
                max_tokens(spec, prompt, "prompt")  # before more is done with them
                shown = await asyncio.to_thread(text.decode, given) if body.echo else ""
            if body.echo:
                echo = Echo(shown, prompt.token_ids, is_all=asked == 0)
                prompt = msgspec.structs.replace(prompt, echo=echo)
            prompts.append(prompt)
        return self._job(body, spec, text, prompts)

    async def tokenize(self, body: TokenizeBody) -> Tokenized:
        """Return the ids of a prompt or conversation. Raises as `chat`; loads no model."""
        spec = self._spec(body.model)
        work = partial(tokenize, spec, await self._text(spec), body)
        try:
            return await asyncio.to_thread(work)
        except InvalidRequest as error:
            raise invalid("messages", str(error)) from None

    async def detokenize(self, body: DetokenizeBody) -> Detokenized:
        """Return the text of ids. Raises as `chat`; loads no model."""
        spec = self._spec(body.model)
        return await asyncio.to_thread(detokenize, spec, await self._text(spec), body)

    def has_text(self, model: ModelId) -> bool:
        """Whether nobody has to wait for the tokenizer of `model`, served or not."""
        spec = self._named.get(model)
        return spec is None or self._texts.has(spec)

    async def try_text(self, spec: ModelSpec) -> None:
        """Read the text side of a model that is to be served, its chat template, too. Raises
        CheckpointError, Overloaded."""
        await asyncio.to_thread((await self._text(spec)).try_template)

    def choices(self, job: Job) -> Choices:
        """Return the running choices of `job`, to be entered as a context."""
        stops, is_scored = job.body.stops, job.bytes_of is not None
        transcripts = [
            Transcript(
                (job.text.detokenizer(), job.text.detokenizer()),
                stops,
                echo,
                is_scored,
                None if job.tools is None else job.tools.reader(),
            )
            for echo in job.echoes
        ]
        return Choices(self.gateway, job.generations, transcripts)

    def models(self) -> ModelList:
        """Return the served models, with where their weights are now."""
        return ModelList(data=self._cards(self._catalog.models))

    def model(self, model: ModelId) -> ModelCard:
        """Return one served model. Raises ModelNotFound."""
        return self._cards((self._known(model),))[0]

    def health(self) -> Health:
        """Return how the instances are, as last published; wakes nobody."""
        instances = [_instance_health(row) for row in self.gateway.instances()]
        status: Literal["ok", "unavailable", "draining"] = "unavailable"
        if self.is_draining:
            status = "draining"
        elif self.gateway.is_ready():
            status = "ok"
        return Health(status, self.gateway.open_requests, instances, self.complaint or None)

    async def ready(self) -> Ready:
        """Return whether requests sent now will be served, and what is wrong."""
        if self.is_draining:
            return Ready("unready", ("the server is about to stop",))
        found = await self._readiness.look()
        # What was valid before still serves, so it tells of these and stays ready.
        told = failed_pins(self._catalog.models, self.gateway.instances())
        told += (self.complaint,) if self.complaint else ()
        return msgspec.structs.replace(found, reasons=(*found.reasons, *told))

    def metrics(self, is_openmetrics: bool) -> bytes:
        """Return what has been counted, as text for Prometheus; waits for nobody."""
        self._exposition.begin(is_openmetrics)
        sums = self.gateway.meter.sums()
        write(
            self._exposition,
            sums,
            self.gateway.instances(),
            tuple(spec.id for spec in self._catalog.models),
        )
        return self._exposition.end()

    def status(self) -> Status:
        """Return what goes on now, for people; waits for nobody."""
        return status_of(self.gateway.meter, self.gateway.instances(), self._catalog)

    def _cards(self, specs: Iterable[ModelSpec]) -> list[ModelCard]:
        rows, meter = self.gateway.instances(), self.gateway.meter
        cached, files = meter.cached(), tuple(meter.files.values())
        return [card_of(spec, rows, cached, self._started_s, files) for spec in specs]

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
        spec = self._known(model)
        if spec.is_draining:
            # Nothing to wait for: it is gone soon.
            raise ModelNotFound(f"model {model!r} is being removed and takes no new requests")
        return spec

    def _known(self, model: ModelId) -> ModelSpec:
        spec = self._named.get(model)
        if spec is None:
            text = f"no model {model!r} is served; GET /v1/models lists those that are"
            raise ModelNotFound(text)
        return spec

    async def _text(self, spec: ModelSpec) -> TextModel:
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                return await self._texts.get(spec)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the tokenizer of {spec.id} was not read within "
                f"{self.settings.request_timeout_s:g} s; try again later"
            ) from None

    def _job(
        self,
        body: ChatBody | CompletionBody,
        spec: ModelSpec,
        text: TextModel,
        prompts: list[Prompt],
    ) -> Job:
        sampling = sampling_of(body, spec, text)
        stop_token_ids = () if body.ignore_eos else text.stop_token_ids
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        answer_id = f"{'chatcmpl' if param == 'messages' else 'cmpl'}-{secrets.token_hex(12)}"
        generations = [
            Generation(
                model=spec.id,
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(sampling, seed=child_seed(sampling.seed, choice)),
                max_tokens=max_tokens(spec, prompt, param),
                stop_token_ids=stop_token_ids,
                kept_bytes=size_of(prompt.echo.text) if prompt.echo is not None else 0,
                is_streamed=bool(body.stream),
            )
            for prompt in prompts
            for choice in range(body.n or 1)
        ]
        return Job(
            body=kept_of(body),
            id=answer_id,
            generations=tuple(
                msgspec.structs.replace(generation, id=f"{answer_id}.{index}")
                for index, generation in enumerate(generations)
            ),
            text=text,
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            echoes=tuple(prompt.echo for prompt in prompts for _ in range(body.n or 1)),
        )


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
