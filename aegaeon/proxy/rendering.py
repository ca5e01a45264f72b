"""Chat templates rendered where they can do no harm: in processes of their own, with bounds on time
and memory that the kernel holds.
"""

import itertools
from typing import Any

import msgspec

from aegaeon.errors import CheckpointError, InvalidRequest, Overloaded
from aegaeon.proxy.bounded import BoundedProcesses, Bounds
from aegaeon.proxy.render_worker import Refused, Render, Rendered, Rendering, Unusable

CPU_S = 2.0  # of one rendering; an ordinary one takes a millisecond
MEMORY_BYTES = 1 << 30  # addresses of a process, with interpreter and libraries
MAX_PROCESSES = 4
TRIES = 2  # where a process is killed, or stops, by others

_TOO_MUCH = "the model's chat template takes too long for this conversation; shorten it"


class Renderer:
    """Renders templates, some at a time. Owns its processes, which start when first needed, until
    `close`. Any thread may call any verb."""

    def __init__(self, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        bounds = Bounds(cpu_s, memory_bytes, MAX_PROCESSES)
        self._processes = BoundedProcesses("aegaeon.proxy.render_worker", bounds)
        self._keys = itertools.count()
        self._decoder: msgspec.msgpack.Decoder[Rendering] = msgspec.msgpack.Decoder(Rendering)

    def template(self, source: str, tokens: dict[str, str]) -> "BoundTemplate":
        """Return the template `source`, compiled when first used."""
        return BoundTemplate(self, next(self._keys), source, tokens)

    def render(self, asked: Render, source: str, tokens: dict[str, str]) -> str:
        """Return the prompt. Raises CheckpointError, InvalidRequest, Overloaded."""
        for _ in range(TRIES):
            result = self._try(asked, source, tokens)
            if result is not None:
                break
        match result:
            case None:
                raise Overloaded("the process that writes prompts was lost; ask again")
            case Rendered(text=text):
                return text
            case Refused(message=message):
                raise InvalidRequest(message)
            case Unusable(message=message):
                raise CheckpointError(message)

    def _try(self, asked: Render, source: str, tokens: dict[str, str]) -> Rendering | None:
        """Return what came of it, or None when the process was lost, through no fault of it."""
        process = self._processes.take()
        try:
            if asked.key not in process.known:
                asked = msgspec.structs.replace(asked, source=source, tokens=tokens)
            frame = msgspec.msgpack.encode(asked)
        except (OverflowError, TypeError, RecursionError) as error:
            self._processes.give_back(process)
            raise InvalidRequest(
                f"the conversation holds what no template takes: {error}"
            ) from None
        try:
            answer = process.ask(frame)
        except BaseException:
            self._processes.bury(process)
            raise
        if answer is None:
            if self._processes.bury(process):
                raise InvalidRequest(_TOO_MUCH)
            return None
        result = self._decoder.decode(answer)
        if not isinstance(result, Unusable):
            process.known.add(asked.key)
        self._processes.give_back(process)
        return result

    def close(self) -> None:
        """End the processes. What is being rendered ends with them. Idempotent."""
        self._processes.close()


class BoundTemplate:
    """A model's template, rendered by `renderer`: the same prompts as a ChatTemplate's."""

    def __init__(self, renderer: Renderer, key: int, source: str, tokens: dict[str, str]) -> None:
        self._renderer = renderer
        self._key = key
        self.source = source
        self._tokens = tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt, ending where the assistant's answer begins, unless that is to be left.

        Raises InvalidRequest when the template refuses the conversation or takes more than it may,
        CheckpointError when it cannot be compiled, Overloaded.
        """
        asked = Render(self._key, messages, tools, extras, add_generation_prompt)
        return self._renderer.render(asked, self.source, self._tokens)
