"""The process that renders chat templates: `-m aegaeon.proxy.render_worker FD SECONDS BYTES`.

A template is a stranger's program. The sandbox keeps it from reaching out, the bounds on this
process keep it from taking more than its share.
"""

import sys
from typing import Any

import msgspec

from aegaeon.errors import CheckpointError, InvalidRequest
from aegaeon.proxy.bounded_worker import run
from aegaeon.proxy.chat import ChatTemplate

# Beyond what came in: the least that a template may write.
LEAST_CHARS = 1 << 20
GROWTH = 4


class Render(msgspec.Struct, frozen=True, tag=True):
    """Render the template `key`; `source` and its `tokens` come with its first use."""

    key: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    extras: dict[str, Any] | None
    add_generation_prompt: bool = True
    source: str | None = None
    tokens: dict[str, str] = {}


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The prompt."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template refuses the conversation, or takes more than it may."""

    message: str


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The template cannot be compiled."""

    message: str


Rendering = Rendered | Refused | Unusable


def _answer(templates: dict[int, ChatTemplate], asked: Render, frame_bytes: int) -> Rendering:
    try:
        if asked.source is not None:
            templates[asked.key] = ChatTemplate(asked.source, asked.tokens)
        max_chars = LEAST_CHARS + GROWTH * frame_bytes
        text = templates[asked.key].render(
            asked.messages, asked.tools, asked.extras, asked.add_generation_prompt, max_chars
        )
        text.encode()  # half a surrogate pair is no text
        return Rendered(text)
    except CheckpointError as error:
        return Unusable(str(error))
    except InvalidRequest as error:
        return Refused(str(error))
    except UnicodeEncodeError:
        return Refused("the model's chat template makes what is no text of this conversation")
    except MemoryError:
        return Refused("the model's chat template needs too much memory for this conversation")


def main() -> int:
    """Answer each Render."""
    templates: dict[int, ChatTemplate] = {}
    decoder = msgspec.msgpack.Decoder(Render)

    def answer(frame: bytes) -> bytes:
        return msgspec.msgpack.encode(_answer(templates, decoder.decode(frame), len(frame)))

    return run(answer)


if __name__ == "__main__":
    sys.exit(main())
